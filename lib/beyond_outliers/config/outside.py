"""An optimizer from outside beside a scale: its definition, and the scale file with it in place of all others.

The study "pocket+lion" is scale pocket with the optimizer of data/runs/pocket+lion/optimizer.toml; its runs and tables
lie under that name, so that nothing of the scale's own changes.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from beyond_outliers import paths
from beyond_outliers.config.loading import is_own
from beyond_outliers.config.parsing import check_values, different, parse
from beyond_outliers.config.run import Rate


@dataclass(frozen=True, kw_only=True)
class Outside:
    """optimizer.toml. `source`: module:Class; `hyper`: what the class is given, and the keys of `optimizers.outside`.

    learning_rates: the grid that is swept. auxiliary: where the search for the rate of embedding and vectors begins, at
    scales that tune; the first of `learning_rates` is where that of the matrices does.
    """

    source: str
    label: str
    learning_rates: Annotated[tuple[Rate, ...], different()]
    auxiliary: Rate | None = None
    hyper: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_own(self.source):
            raise ValueError(f"source must be module:Class, for instance torch.optim:SGD, not {self.source!r}")
        check_values(self.hyper, "hyper")

    def write(self, file: Path) -> None:
        import tomli_w  # not on every machine that trains

        file.parent.mkdir(parents=True, exist_ok=True)
        paths.write_whole(file, tomli_w.dumps({name: part for name, part in vars(self).items() if part is not None}))


def parted(scale: str) -> tuple[str, str]:
    """The scale and the name of the optimizer from outside beside it: of "pocket", or of an arm, that is ""."""
    return (scale, "") if arm_file(scale).exists() else (scale.partition("+")[0], scale.partition("+")[2])


def arm_file(scale: str) -> Path:
    """The file of a scale, or of an arm of one: of "confirm2+decay" data/scales/confirm2/decay.toml."""
    return paths.SCALES / f"{scale.replace('+', '/')}.toml"


def optimizer_file(scale: str) -> Path:
    """Where the definition of "pocket+lion" lies: beside its committed tables if there are some, else its runs."""
    committed = paths.RESULTS / scale / "optimizer.toml"
    return committed if committed.exists() else paths.RUNS / scale / "optimizer.toml"


def read_outside(scale: str) -> Outside:
    """The optimizer of "pocket+lion". ValueError where it is not defined, or does not fit."""
    file = optimizer_file(scale)
    if not file.exists():
        base, _ = parted(scale)
        raise ValueError(f"no optimizer at {file}: run `make compare OPTIMIZER=module:Class SCALE={base}` first")
    found: Outside = parse(tomllib.loads(file.read_text(encoding="utf-8")), Outside, "")
    return found


def beside(table: dict[str, Any], scale: str) -> dict[str, Any]:
    """The scale file `table` of the base, with the optimizer of `scale` in place of its own."""
    one = read_outside(scale)
    table = {**table, "hyper": {one.source: one.hyper}, "labels": {one.source: one.label}}
    table["plan"] = {purpose: runs for purpose, runs in table["plan"].items() if purpose != "schemes"}
    if "tuning" in table:
        if one.auxiliary is None:
            raise ValueError(f"{optimizer_file(scale)} lacks ['auxiliary']: this scale tunes it")
        start = {"lr": one.learning_rates[0], "auxiliary": one.auxiliary}
        table["tuning"] = {**table["tuning"], "start": {one.source: start}}
    else:
        if table.pop("rates_from", None):  # nobody chose one from outside: it is swept at every size
            del table["rates"]
            table["plan"]["sweep"] = {**table["plan"]["sweep"], "sizes": list(table["sizes"])}
        table["learning_rates"] = {one.source: list(one.learning_rates)}
    return table
