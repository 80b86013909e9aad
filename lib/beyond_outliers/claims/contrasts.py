"""Optimizers compared over several sizes: sizes are strata, seeds replicates, Welch's interval for unequal variances.

The difference of two optimizers is the unweighted mean over sizes of the differences of their means over seeds. With
w_i = s_i^2 / (n_i S^2) for each of the 2 S samples behind it (S sizes), its squared standard error is sum(w_i) and its
degrees of freedom are sum(w_i)^2 / sum(w_i^2 / (n_i - 1)) (Welch 1947, Satterthwaite 1946); for one size this is the
usual Welch interval. Seeds are not paired, although one seed gives all optimizers the same batches: where that makes
runs of one seed alike (a positive correlation), the intervals are too wide, never too narrow.

Leading axes are free, so that thousands of simulated studies are judged by the code that judges the real one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

LEAST_SEEDS = 3  # of an optimizer at a size; fewer tell too little of their spread
USUAL, STRICT = 0.95, 0.99
VERDICTS = REPRODUCED, NOT_REPRODUCED, TIE, UNDECIDED = "reproduced", "not reproduced", "tie", "undecided"


@dataclass(frozen=True)
class Cells:
    """Seeds summed up: `mean` and `variance` (..., O, S) of O optimizers at S sizes, `n` (O, S) seeds."""

    optimizers: tuple[str, ...]
    sizes: tuple[str, ...]
    mean: np.ndarray
    variance: np.ndarray
    n: np.ndarray

    def of(self, names: Sequence[str]) -> list[int]:
        """Places of optimizers on the axis O."""
        return [self.optimizers.index(name) for name in names]

    def one_size(self, size: str) -> "Cells":
        place = [self.sizes.index(size)]
        parts = (values[..., place] for values in (self.mean, self.variance, self.n))
        return Cells(self.optimizers, (size,), *parts)


@dataclass(frozen=True)
class Contrasts:
    """Differences first - second of R pairs: `estimate`, `error` (standard) and `dof`, all (..., R); NaN where a cell
    has fewer than LEAST_SEEDS seeds."""

    pairs: tuple[tuple[str, str], ...]
    estimate: np.ndarray
    error: np.ndarray
    dof: np.ndarray

    def interval(self, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        half = self.error * student.ppf((1 + confidence) / 2, self.dof)
        return self.estimate - half, self.estimate + half


def cells(table: pd.DataFrame, value: str, optimizers: Sequence[str], sizes: Sequence[str]) -> Cells:
    """Sums up a tidy table with the columns size, optimizer, seed and `value`, one row a run.

    Other optimizers and sizes are left out, and rows without a value (diverged runs). ValueError for missing columns
    and for a seed that stands twice in a cell.
    """
    missing = sorted({"size", "optimizer", "seed", value} - set(table.columns))
    if missing:
        raise ValueError(f"the table lacks the columns {missing}; there are: {list(table.columns)}")
    kept = table[table["optimizer"].isin(optimizers) & table["size"].isin(sizes)].dropna(subset=[value])
    twice = kept[kept.duplicated(["size", "optimizer", "seed"])]
    if len(twice):
        raise ValueError(f"two rows for {twice[['size', 'optimizer', 'seed']].iloc[0].tolist()}, one is needed")
    grouped = kept.groupby(["optimizer", "size"])[value].agg(["mean", "var", "count"])
    whole = grouped.reindex(pd.MultiIndex.from_product([optimizers, sizes]))
    mean, variance, n = (whole[c].to_numpy(float).reshape(len(optimizers), -1) for c in ("mean", "var", "count"))
    return Cells(tuple(optimizers), tuple(sizes), mean, variance, np.nan_to_num(n).astype(int))


def contrast(cells: Cells, pairs: Sequence[tuple[str, str]]) -> Contrasts:
    """First minus second optimizer of every pair, over all sizes of `cells`."""
    first, second = (cells.of([pair[i] for pair in pairs]) for i in (0, 1))
    n = np.where(cells.n >= LEAST_SEEDS, cells.n, np.nan)
    parts = cells.variance / (n * len(cells.sizes) ** 2)  # (..., O, S)
    squares = (parts**2 / (n - 1)).sum(-1)
    squared_error = parts.sum(-1)[..., first] + parts.sum(-1)[..., second]
    both = squares[..., first] + squares[..., second]
    # no spread at all: the interval is the estimate, whatever the degrees of freedom
    dof = np.divide(squared_error**2, both, out=np.where(np.isnan(both), np.nan, 1.0), where=both > 0)
    means = np.where(cells.n >= LEAST_SEEDS, cells.mean, np.nan).mean(-1)
    return Contrasts(tuple(pairs), means[..., first] - means[..., second], np.sqrt(squared_error), dof)


def judge_extreme(found: Contrasts, side: str, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Is every first member of the pairs the lower ("lowest") or higher ("highest") one? Verdicts (...) and the places
    (...) of the nearest pair, the one that speaks most against it.

    reproduced: every contrast excludes 0 on that side at 95 % (intersection-union, so no correction is due);
    not reproduced: one excludes 0 on the other side at 99 %; tie: the interval of the nearest pair lies inside
    +-margin; undecided: the rest. In this order: a difference that is certain and small is a difference.
    """
    sign = sign_of(side)
    against = sign * found.estimate  # the higher, the worse for the claim
    low, high = (sign * end for end in found.interval(USUAL)[:: int(sign)])
    strict = sign * found.interval(STRICT)[0 if sign > 0 else 1]
    computed = np.isfinite(against)
    nearest = np.where(computed, against, -np.inf).argmax(-1)
    inside = (low > -margin) & (high < margin)
    tie = np.take_along_axis(inside, nearest[..., None], -1)[..., 0] & computed.all(-1)
    return decide((high < 0).all(-1), (strict > 0).any(-1), tie), nearest


def decide(holds, fails, tie=False) -> np.ndarray:
    """The verdict of the first condition that is true, else undecided."""
    return np.select([holds, fails, tie], [REPRODUCED, NOT_REPRODUCED, TIE], UNDECIDED)


def sign_of(side: str) -> float:
    if side not in ("lowest", "highest"):
        raise ValueError(f"unknown side {side!r}; valid: lowest, highest")
    return 1.0 if side == "lowest" else -1.0


def whole(verdicts: Sequence[str]) -> str:
    """The verdict on a claim of several parts: all must hold; one that fails is enough; an open part leaves it open."""
    for verdict in (NOT_REPRODUCED, UNDECIDED, TIE):
        if verdict in verdicts:
            return verdict
    return REPRODUCED


def exists(verdicts: Sequence[str]) -> str:
    """The verdict on a claim that holds if it holds somewhere: it fails only where it fails everywhere."""
    if REPRODUCED in verdicts:
        return REPRODUCED
    return NOT_REPRODUCED if set(verdicts) == {NOT_REPRODUCED} else UNDECIDED


def judge_threshold(low, high, threshold: float, side: str) -> np.ndarray:
    """reproduced when the interval lies on the `side` ("above", "below") of the threshold, not when on the other."""
    if side not in ("above", "below"):
        raise ValueError(f"unknown side {side!r}; valid: above, below")
    above, below = np.asarray(low) > threshold, np.asarray(high) < threshold
    return decide(above, below) if side == "above" else decide(below, above)


def t_interval(values: np.ndarray, confidence: float = USUAL) -> tuple[float, float, float]:
    """Mean of independent values (n,) and its t interval; NaN for fewer than two."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return float(values.mean()) if n else np.nan, np.nan, np.nan
    half = values.std(ddof=1) / np.sqrt(n) * student.ppf((1 + confidence) / 2, n - 1)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def common_slope(groups: Sequence[tuple[np.ndarray, np.ndarray]], confidence: float = USUAL) -> tuple[float, ...]:
    """Least-squares slope common to several groups (x, y), each with an intercept of its own, and its t interval from
    the residuals, with n - groups - 1 degrees of freedom: (slope, low, high). NaN when nothing is left for a spread."""
    x = np.concatenate([np.asarray(x, float) - np.mean(x) for x, _ in groups]) if len(groups) else np.zeros(0)
    y = np.concatenate([np.asarray(y, float) - np.mean(y) for _, y in groups]) if len(groups) else np.zeros(0)
    dof, spread = len(x) - len(groups) - 1, float((x * x).sum())
    if dof < 1 or spread == 0:
        return np.nan, np.nan, np.nan
    slope = float((x * y).sum() / spread)
    half = np.sqrt(((y - slope * x) ** 2).sum() / dof / spread) * student.ppf((1 + confidence) / 2, dof)
    return slope, float(slope - half), float(slope + half)
