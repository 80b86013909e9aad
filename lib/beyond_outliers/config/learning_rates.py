"""Learning rates of a scale: the choice among the losses of a sweep, and the table of what was chosen."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from beyond_outliers import checksums, paths


class EdgeWarning(UserWarning):
    """The best learning rate lies at the edge of its grid: the true optimum may lie outside."""


@dataclass(frozen=True)
class Rates:
    """The learning rates of a run: of the hidden matrices, and, where a scale tunes it, of embedding and vectors."""

    lr: float
    auxiliary: float | None = None


def choose_learning_rate(lrs: list[float], losses: list[float]) -> tuple[float, bool]:
    """(best learning rate, whether it lies at the edge of the grid) from one loss a learning rate; nan = diverged.

    Inside the grid: the vertex of the parabola through the best point and its two neighbours in log(lr), rounded to
    two digits. At the edge, or beside a diverged run, the best point itself. ValueError when every run diverged.
    """
    order = np.argsort(lrs)
    x, y = np.log(np.asarray(lrs, float)[order]), np.asarray(losses, float)[order]
    if np.isnan(y).all():
        raise ValueError(f"every learning rate of {sorted(lrs)} diverged: extend the grid downwards")
    best = int(np.nanargmin(y))
    edge = best in (0, len(y) - 1)
    if not edge and np.isfinite(y[best - 1 : best + 2]).all():
        a, b, _ = np.polyfit(x[best - 1 : best + 2] - x[best], y[best - 1 : best + 2], 2)
        if a > 0:
            shift = float(np.clip(-b / (2 * a), x[best - 1] - x[best], x[best + 1] - x[best]))
            return float(f"{math.exp(x[best] + shift):.1e}"), False
    return float(np.exp(x[best]).round(12)), edge


def read_rates(scale: str, results: Path | None = None) -> dict[tuple[str, str], Rates]:
    """(swept size, optimizer) -> chosen rates; empty before the sweep is done. results: a folder of tables to read."""
    file = (results or paths.results(scale)) / "learning_rates.csv"
    if not file.exists():
        return {}
    checksums.check(file.parent, file.name, remedy=f"`git restore {file}`, or choose them again")
    # every bit counts: run ids are hashed from them; sizes of one table may have an auxiliary rate or none
    exact = {"lr": float, "auxiliary": lambda text: float(text) if text else None}
    rows = pd.read_csv(file, dtype={"size": str, "optimizer": str}, converters=exact).to_dict("records")
    rates = ((row, row.get("auxiliary")) for row in rows)
    return {(row["size"], row["optimizer"]): Rates(row["lr"], None if pd.isna(rate) else rate) for row, rate in rates}


def read_learning_rates(scale: str) -> dict[tuple[str, str], float]:
    """(swept size, optimizer) -> chosen learning rate of the hidden matrices; empty before the sweep is done."""
    return {of: rates.lr for of, rates in read_rates(scale).items()}
