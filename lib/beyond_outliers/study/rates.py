"""Learning rates of a study: chosen from its sweep, or from the search of a tuned scale, and written to its table."""

import warnings
from typing import TYPE_CHECKING, Any

import pandas as pd

from beyond_outliers import checksums
from beyond_outliers.config.protocol import Planned
from beyond_outliers.config.rates import EdgeWarning, choose_learning_rate, tune
from beyond_outliers.config.run import RunConfig
from beyond_outliers.study.publish import take_up

if TYPE_CHECKING:
    from beyond_outliers.study.study import Study


def choose(study: "Study", size: str) -> pd.DataFrame:
    """Best rates of every optimizer at a swept size, from the final losses of its sweep, or of its search.

    Returns the table `learning_rates` with the rows of that size replaced, and writes it.
    """
    rows = _searched(study, size) if study.protocol.tuned else _swept(study, size)
    table, file = pd.DataFrame(rows), take_up(study) / "learning_rates.csv"
    if file.exists():
        old = study.table(file.stem)
        table = pd.concat([old[(old["size"] != size) & old["size"].isin(study.sizes_of("sweep"))], table])
    if lent := study.protocol.lent:
        source = study.protocol.settings.rates_from
        keys = [{"size": at, "optimizer": name, **vars(rates)} for (at, name), rates in lent.items()]
        table = pd.concat([table, pd.DataFrame(keys).assign(edge=False, n_runs=0, chosen_by=source)])
        table["chosen_by"] = table.chosen_by.fillna(study.scale)
    table = table.sort_values("size", key=lambda sizes: sizes.map(study.protocol.sizes.index), kind="stable")
    checksums.write_text(file, table.to_csv(index=False))
    return table.reset_index(drop=True)


def _swept(study: "Study", size: str) -> list[dict[str, Any]]:
    """Rows of `learning_rates` from grids: losses averaged over seeds, a diverged seed makes a rate diverged."""
    rows = []
    runs = study.protocol.sweep_runs(size)
    keys = [(p.config.optimizer, p.config.lr, study.ended_loss(p)) for p in runs]
    found = pd.DataFrame(keys, columns=["optimizer", "lr", "val_loss"])
    for optimizer, runs in found.groupby("optimizer", sort=False):
        losses = runs.groupby("lr").val_loss.apply(lambda values: values.mean(skipna=False))
        lr, edge = choose_learning_rate(list(losses.index), list(losses))
        if edge:
            warnings.warn(
                f"{size}, {optimizer}: the best learning rate {lr:g} is at the edge of {list(losses.index)}",
                EdgeWarning,
                stacklevel=4,
            )
        grid = " ".join(f"{lr:g}" for lr in losses.index)
        rows.append({"size": size, "optimizer": optimizer, "lr": lr, "edge": edge, "grid": grid, "n_runs": len(runs)})
    return rows


def _searched(study: "Study", size: str) -> list[dict[str, Any]]:
    """Rows of `learning_rates` from the search of a tuned scale, which never ends at an edge."""

    def val_loss(config: RunConfig) -> float:
        return study.ended_loss(Planned("sweep", config))

    rows = []
    for optimizer in study.protocol.optimizers:
        found = tune(study.protocol, size, optimizer, val_loss)
        tried = {line: " ".join(f"{rate:g}" for rate in rates) for line, rates in found["lines"].items()}
        row = {"size": size, "optimizer": optimizer, "lr": found["lr"], "edge": False, "grid": tried["lr"]}
        row |= {"n_runs": found["n_runs"], "auxiliary": found["auxiliary"], "auxiliary_grid": tried["auxiliary"]}
        rows.append(row)
    return rows
