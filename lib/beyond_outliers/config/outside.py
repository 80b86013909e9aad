"""An optimizer from outside beside a scale: its definition, and the scale file with it in place of all others.

The study "pocket+lion" is scale pocket with the optimizer of data/runs/pocket+lion/optimizer.toml; its runs and tables
lie under that name, so that nothing of the scale's own changes.
"""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from beyond_outliers import paths
from beyond_outliers.config.loading import is_own
from beyond_outliers.config.parsing import Different, Range, check_values, parse
from beyond_outliers.config.run import Rate


@dataclass(frozen=True, kw_only=True)
class Outside:
    """optimizer.toml. `source`: module:Class; `hyper`: what the class is given, and the keys of `optimizers.outside`.

    learning_rates: the grid that is swept. auxiliary: where the search for the rate of embedding and vectors begins, at
    scales that tune; the first of `learning_rates` is where that of the matrices does.
    """

    source: str
    label: str
    learning_rates: Annotated[tuple[Rate, ...], Different()]
    auxiliary: Annotated[float, Range(0, 1000, "(]")] | None = None
    hyper: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_own(self.source):
            raise ValueError(f"source must be module:Class, for instance torch.optim:SGD, not {self.source!r}")
        check_values(self.hyper, "hyper")

    def write(self, file: Path) -> None:
        import tomli_w  # not on every machine that trains

        text = tomli_w.dumps({name: v for name, v in dataclasses.asdict(self).items() if v is not None})
        file.parent.mkdir(parents=True, exist_ok=True)
        paths.write_whole(file, text)


def parted(scale: str) -> tuple[str, str]:
    """The scale and the name of the optimizer from outside beside it: of "pocket", or of an arm, that is ""."""
    if (paths.SCALES / f"{scale}.toml").exists():
        return scale, ""
    base, _, own = scale.partition("+")
    return base, own


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
        if table.pop("rates_from", None):  # which nobody lends to an optimizer from outside: it is swept at every size
            table["plan"]["sweep"] = {**table["plan"]["sweep"], "sizes": list(table["sizes"])}
        table["learning_rates"] = {one.source: list(one.learning_rates)}
    return table
