"""Optimizers compared: estimates with 95 % intervals, in one vocabulary for rules, sentences and figures.

Sizes are strata, seeds replicates. A contrast of two optimizers is the weighted sum over sizes of the differences of
their means over seeds. With w_s the weight of a size and v = w_s^2 s^2 / n for each of the 2 S samples behind it, its
squared standard error is sum(v) and its degrees of freedom are sum(v)^2 / sum(v^2 / (n - 1)) (Welch 1947, Satterthwaite
1946); for one size this is the usual Welch interval. Seeds are not paired, although one seed gives all optimizers the
same batches: where that makes runs of one seed alike, intervals are too wide, never too narrow.

Leading axes of `Cells` are free: simulated studies are judged by the thousand, by the code that judges the real one.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap
from scipy.stats import f as f_distribution
from scipy.stats import t as student

from beyond_outliers.config.loading import is_own
from beyond_outliers.config.registry import REGISTRY, entry

PAPER_OPTIMIZERS = ("adamw", "muon", "psgd", "scion", "shampoo", "soap")  # whom the paper's claims are about
LEAST_SEEDS = 3  # of an optimizer at a size; fewer tell too little of their spread
USUAL, STRICT = 0.95, 0.99
REFERENCE = "adamw"
ALL_SIZES = "mean over sizes"
DRAWS = 2000  # of a bootstrap


class NothingToCompare(ValueError):
    """No size has a run of every optimizer yet; the message says what is there."""


@dataclass(frozen=True)
class Estimate:
    """A number, its interval (NaN where there is none), the runs behind it, and its unit."""

    value: float = np.nan
    low: float = np.nan
    high: float = np.nan
    n: int = 0
    unit: str = ""

    @property
    def interval(self) -> tuple[float, float, float]:
        return self.value, self.low, self.high

    @property
    def certain(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite(self.high - self.low))

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0; False where there is none."""
        return self.low > 0 or self.high < 0

    def map(self, function: Callable) -> "Estimate":
        """The estimate of an increasing function of the number, for instance `numpy.exp`."""
        value, low, high = (float(function(number)) for number in self.interval)
        return Estimate(value, low, high, self.n, self.unit)

    def text(self, digits: int = 3, scale: float = 1.0) -> str:
        """ "0.163 [0.150, 0.176]", or the number alone where it has no interval."""
        value, low, high = (f"{scale * number:.{digits}f}" for number in self.interval)
        return f"{value} [{low}, {high}]" if self.certain else value


def label(name: str) -> str:
    """An optimizer's name in figures and sentences."""
    return entry(name).label if name in REGISTRY or is_own(name) else name


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"; "none" of nothing."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "none"


# --------------------------------------------------------------------------------------------------------- contrasts


@dataclass(frozen=True)
class Cells:
    """Seeds summed up: `mean` and `variance` (..., O, S) of O optimizers at S sizes, `n` (O, S) seeds.

    tuning: variance (O, S) of a mean that comes with the choice of its learning rates; 0 where it is not counted.
    """

    optimizers: tuple[str, ...]
    sizes: tuple[str, ...]
    mean: np.ndarray
    variance: np.ndarray
    n: np.ndarray
    tuning: Any = 0.0

    def of(self, names: Sequence[str | None]) -> list[int]:
        """Places of optimizers on the axis O; None: one behind the last."""
        return [-1 if name is None else self.optimizers.index(name) for name in names]

    def at(self, *sizes: str) -> "Cells":
        """Those of some sizes alone."""
        places = [self.sizes.index(size) for size in sizes]
        parts = self.mean, self.variance, self.n, self.tuning + 0 * self.n
        return Cells(self.optimizers, sizes, *(values[..., places] for values in parts))


@dataclass(frozen=True)
class Contrasts:
    """Differences first - second of R pairs: `estimate`, `error` (standard) and `dof`, all (..., R); NaN where a cell
    has fewer than LEAST_SEEDS seeds."""

    estimate: np.ndarray
    error: np.ndarray
    dof: np.ndarray

    def interval(self, confidence: float = USUAL) -> tuple[np.ndarray, np.ndarray]:
        half = self.error * student.ppf((1 + confidence) / 2, self.dof)
        return self.estimate - half, self.estimate + half

    def one(self, place: int = 0, n: int = 0) -> Estimate:
        """That of one pair, of contrasts without leading axes."""
        value, low, high = (float(ends[place]) for ends in (self.estimate, *self.interval()))
        return Estimate(value, low, high, n)


@dataclass(frozen=True)
class Drawn(Contrasts):
    """Differences of R pairs with percentile intervals from resampled ones, `error` (draws, R)."""

    dof: Any = None

    def interval(self, confidence: float = USUAL) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.quantile(self.error, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        return low, high


def cells(table: pd.DataFrame, value: str, optimizers: Sequence[str], sizes: Sequence[str]) -> Cells:
    """Sums up a tidy table with the columns size, optimizer, seed and `value`, one row a run.

    Other optimizers and sizes are left out, and rows without a value (diverged runs). ValueError for a seed that stands
    twice in a cell.
    """
    keys = ["optimizer", "size", "seed"]
    kept = table[table["optimizer"].isin(optimizers) & table["size"].isin(sizes)].dropna(subset=[value])
    if len(twice := kept[kept.duplicated(keys)]):
        raise ValueError(f"two rows for {twice[keys].iloc[0].tolist()}, one is needed")
    grouped = kept.groupby(keys[:2])[value].agg(["mean", "var", "count"])
    whole = grouped.reindex(pd.MultiIndex.from_product([optimizers, sizes]))
    mean, variance, n = (column.to_numpy(float).reshape(len(optimizers), -1) for _, column in whole.items())
    return Cells(tuple(optimizers), tuple(sizes), mean, variance, np.nan_to_num(n).astype(int))


def contrast(
    cells: Cells, pairs: Sequence[tuple[str, str | None]], weights: np.ndarray | None = None, least: int = LEAST_SEEDS
) -> Contrasts:
    """First minus second optimizer of every pair (None: minus 0), over all sizes of `cells`.

    weights: one a size, for instance those of a slope; without them the mean over sizes. least: seeds of a cell below
    which there is no contrast; with fewer than two there is an estimate alone.
    """
    first, second = (cells.of([pair[i] for pair in pairs]) for i in (0, 1))
    n = np.where(cells.n >= least, cells.n, np.nan)
    known = np.where(cells.n >= least, cells.mean, np.nan)
    if weights is None:
        share, means = np.array(1 / len(cells.sizes) ** 2), known.mean(-1)
        parts = cells.variance / (n * len(cells.sizes) ** 2)  # (..., O, S)
    else:
        share, means = weights**2, (known * weights).sum(-1)
        parts = cells.variance / n * share
    freedom = np.where(n > 1, n - 1, np.nan)
    tuning = np.broadcast_to(cells.tuning * share, parts.shape)  # known, so without degrees of freedom
    columns = means, parts.sum(-1), (parts**2 / freedom).sum(-1), tuning.sum(-1)
    means, variance, squares, tuning = (np.concatenate([x, np.zeros_like(x[..., :1])], -1) for x in columns)  # None: 0
    squared_error = variance[..., first] + variance[..., second] + (tuning[..., first] + tuning[..., second])
    both = squares[..., first] + squares[..., second]
    # no spread at all: the interval is the estimate, whatever the degrees of freedom
    dof = np.divide(squared_error**2, both, out=np.where(np.isnan(both), np.nan, 1.0), where=both > 0)
    return Contrasts(means[..., first] - means[..., second], np.sqrt(squared_error), dof)


def difference(cells: Cells, first: str, second: str | None = None) -> Estimate:
    """One contrast over all sizes; n: the fewer runs of the two. Without an interval where a cell has too few seeds."""
    n = int(cells.n.sum(-1)[cells.of([first, second or first])].min())
    value = contrast(cells, [(first, second)], least=1).estimate[0]
    return replace(contrast(cells, [(first, second)]).one(0, n), value=float(value))


def slope_weights(x: Any) -> np.ndarray:
    """Weights of the least-squares slope of values on x, one each."""
    away = np.asarray(x, dtype=float) - np.mean(x)
    return away / (away**2).sum()


def heterogeneity(estimate: np.ndarray, error: np.ndarray, dof: np.ndarray) -> np.ndarray:
    """p of Welch's test (1951) that independent estimates (..., S) are all of one number; NaN for fewer than two."""
    if (k := estimate.shape[-1]) < 2:
        return np.full(estimate.shape[:-1], np.nan)
    with np.errstate(all="ignore"):
        weights = 1 / error**2
        parts = weights / weights.sum(-1, keepdims=True)
        centre = (parts * estimate).sum(-1, keepdims=True)
        lack = ((1 - parts) ** 2 / dof).sum(-1)
        statistic = (weights * (estimate - centre) ** 2).sum(-1) / (k - 1) / (1 + 2 * (k - 2) / (k**2 - 1) * lack)
        return f_distribution.sf(statistic, k - 1, (k**2 - 1) / (3 * lack))


def t_interval(values: Any, least: int = 2) -> Estimate:
    """Mean of independent values (n,) and its 95 % t interval; NaN for fewer than `least` of them."""
    values = np.asarray(values, dtype=float)
    n, half = len(values), np.nan
    mean = float(values.mean()) if n else np.nan
    if n >= least:
        half = float(values.std(ddof=1) / np.sqrt(n) * student.ppf((1 + USUAL) / 2, n - 1))
    return Estimate(mean, mean - half, mean + half, n)


def common_slope(groups: Sequence[tuple[Any, Any]], confidence: float = USUAL) -> Estimate:
    """Least-squares slope common to several groups (x, y), each with an intercept of its own, and its t interval from
    the residuals, with n - groups - 1 degrees of freedom. NaN when nothing is left for a spread."""
    sides = zip(*groups, strict=True)
    x, y = (np.concatenate([np.asarray(of, float) - np.mean(of) for of in side]) for side in sides)
    dof, spread = len(x) - len(groups) - 1, float((x * x).sum())
    if dof < 1 or spread == 0:
        return Estimate(n=len(x))
    slope = float((x * y).sum() / spread)
    half = float(np.sqrt(((y - slope * x) ** 2).sum() / dof / spread) * student.ppf((1 + confidence) / 2, dof))
    return Estimate(slope, slope - half, slope + half, len(x))


# ------------------------------------------------------------------------------------------------------- comparisons


class Comparison:
    """Optimizers by one value, over the sizes at which all of them have runs, or enough runs for an interval."""

    def __init__(self, rows: pd.DataFrame, value: str, optimizers: Sequence[str] = PAPER_OPTIMIZERS):
        """`rows`: size, optimizer, seed and `value`, one row a run; NaN for a run that diverged.

        Raises NothingToCompare where no size has a run of each optimizer.
        """
        sizes = list(dict.fromkeys(rows["size"]))
        least = cells(rows, value, optimizers, sizes).n.min(0) if sizes else np.zeros(0, int)
        wanted = next((n for n in (LEAST_SEEDS, 1) if (least >= n).any()), None)
        if wanted is None:
            there = [label(name) for name in optimizers if name in set(rows.optimizer)]
            raise NothingToCompare(
                f"no size has runs of {listed([label(name) for name in optimizers])} yet (so far: {listed(there)})"
            )
        self.sizes = [size for size, n in zip(sizes, least, strict=True) if n >= wanted]
        self.cells = cells(rows, value, optimizers, self.sizes)
        self.certain = wanted == LEAST_SEEDS
        self.order = [optimizers[place] for place in self.cells.mean.mean(-1).argsort(kind="stable")]  # lowest first

    def difference(self, first: str, second: str | None = None) -> Estimate:
        """First minus second; None: the mean of the first, over sizes of the means over seeds."""
        return difference(self.cells, first, second)

    mean = difference

    def n(self, *names: str) -> str:
        """ "n 6 each", or "n 6 and 5": runs behind the numbers of these optimizers (default: all)."""
        counts = [str(n) for n in self.cells.n.sum(-1)[self.cells.of(names or self.cells.optimizers)]]
        return f"n {counts[0]}{' each' * (len(counts) > 1)}" if len(set(counts)) == 1 else f"n {listed(counts)}"

    @property
    def over(self) -> str:
        """ "at 0.08M", or "over 0.08M and 0.16M"."""
        return f"{'over' if len(self.sizes) > 1 else 'at'} {listed(self.sizes)}"

    @property
    def caveat(self) -> str:
        """Why there is no interval, as a sentence with a space before it; empty where there is one."""
        if self.certain:
            return ""
        seeds = "One seed" if self.cells.n.max() == 1 else f"Fewer than {LEAST_SEEDS} seeds of some optimizer"
        return f" {seeds}: no interval, so differences may be noise."


def of_the_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the paper's six optimizers."""
    return rows[rows.optimizer.isin(PAPER_OPTIMIZERS)].reset_index(drop=True)


def compare(study, rows: pd.DataFrame, value: str) -> Comparison:
    """The paper's optimizers that the scale has, by one value of their runs; NothingToCompare as `Comparison`.

    Yours with them, where `study` is a `study.compare.Beside`.
    """
    theirs = [name for name in PAPER_OPTIMIZERS if name in study.protocol.optimizers]
    return Comparison(rows, value, [*theirs, study.yours] if hasattr(study, "yours") else theirs)


def as_table(found: dict[tuple, Estimate], keys: Sequence[str], value: str = "mean") -> pd.DataFrame:
    """Estimates by their keys as a table: a column a key, `value`, low, high and n."""
    rows = [(*key, *of.interval, of.n) for key, of in found.items()]
    return pd.DataFrame(rows, columns=[*keys, value, "low", "high", "n"])


def as_text(table: pd.DataFrame, value: str = "mean", digits: int = 3, ends: str = "") -> list[str]:
    """The estimates of a table of `as_table` as text, "0.123 [0.110, 0.136]". ends: what stands before low and high."""
    return [Estimate(*row).text(digits) for row in table[[value, f"{ends}low", f"{ends}high"]].to_numpy()]


def means(rows: pd.DataFrame, value: str, by: Sequence[str] = ()) -> pd.DataFrame:
    """Mean over seeds and its t interval: one row a size, optimizer and value of `by`, with mean, low, high, n.

    Two runs have no interval here, as in a contrast.
    """
    keys = [*by, "size", "optimizer"]
    found = rows.groupby(keys, sort=False)[value]
    return as_table({key: t_interval(own, least=LEAST_SEEDS) for key, own in found}, keys)


def ratios(rows: pd.DataFrame, value: str, by: Sequence[str] = ()) -> pd.DataFrame:
    """How many times the reference's `value` an optimizer has: ratio (of geometric means over seeds), low, high, n.

    One row a value of `by`, size and optimizer; the reference's own rows are 1, without an interval. Behind them, where
    two sizes or more have three seeds of both, the row ALL_SIZES: the unweighted mean over those sizes, in logarithms.
    n: the fewer runs of the two. Sizes without the reference are left out, and so are values that are not positive,
    which have no logarithm (n says how many are left).
    """
    logs = rows.assign(log=np.log(rows[value].where(rows[value] > 0))).dropna(subset="log")
    sizes, found = [*dict.fromkeys(logs["size"]), ALL_SIZES], {}
    for key, group in logs.groupby(list(by), sort=False) if by else [((), logs)]:
        optimizers = tuple(dict.fromkeys(group.optimizer))
        every = cells(group, "log", optimizers, sizes[:-1])
        reference = every.n[every.of([REFERENCE])] if REFERENCE in optimizers else 0
        for name, n in zip(optimizers, np.minimum(every.n, reference).tolist(), strict=True):
            there = {size: k for size, k in zip(every.sizes, n, strict=True) if k}
            strata = [size for size, k in there.items() if k >= LEAST_SEEDS]
            for at, parts in [*((size, [size]) for size in there), *[(ALL_SIZES, strata)] * (len(strata) > 1)]:
                of = difference(every.at(*parts), name, REFERENCE).map(np.exp) if name != REFERENCE else Estimate(1.0)
                found[*key, at, name] = replace(of, n=min(there[size] for size in parts))
    table = as_table(found, [*by, "size", "optimizer"], "ratio")
    return table.sort_values("size", key=lambda names: names.map(sizes.index), kind="stable", ignore_index=True)


def centred(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Logarithms of `columns` less their mean at a size (of optimizers, each a mean over seeds), averaged over sizes.

    One row an optimizer: optimizer, n ("2/3": runs at each size), and for every column its value, and half the width of
    its 95 % interval as NAME_half, from the spread over seeds alone. Only sizes that have every optimizer are taken, so
    that what is subtracted is the same for all; without one the table is empty.
    """
    optimizers = tuple(dict.fromkeys(rows.optimizer))
    sizes = [size for size, own in rows.groupby("size", sort=False) if set(own.optimizer) == set(optimizers)]
    table = pd.DataFrame({"optimizer": optimizers if sizes else [], "n": ""})
    for column in columns if sizes else ():
        every = cells(rows.assign(log=np.log(rows[column].where(rows[column] > 0))), "log", optimizers, sizes)
        ends = contrast(every, [(name, None) for name in optimizers]).interval()
        halves = {column + "_half": (ends[1] - ends[0]) / 2}
        table = table.assign(n=["/".join(map(str, n)) for n in every.n], **{column: points(every.mean)}, **halves)
    return table


# ------------------------------------------------------------------------------------------------------ correlations


def points(means: np.ndarray) -> np.ndarray:
    """Means (..., O, S) of optimizers at sizes -> size-centred points (..., O)."""
    return (means - means.mean(-2, keepdims=True)).mean(-1)


def pearson(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Correlation along an axis; NaN where one side is constant. scipy's `pearsonr` warns at each of those."""
    x, y = (values - values.mean(axis, keepdims=True) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(axis) / np.sqrt((x * x).sum(axis) * (y * y).sum(axis))


def leave_one_out(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The correlations without each point in turn, (..., n) -> (..., n)."""
    rest = [[j for j in range(x.shape[-1]) if j != i] for i in range(x.shape[-1])]
    return pearson(x[..., rest], y[..., rest])


def correlations(
    table: pd.DataFrame,
    within: str | None = None,
    candidates: Sequence[str] = (),
    targets: Sequence[str] = ("increase", "accuracy"),
) -> pd.DataFrame:
    """Pearson and Spearman correlation of every candidate with every target, with percentile bootstrap intervals.

    One row a (target, candidate): n points, pearson, pearson_low, pearson_high, spearman, ... `within` names a column
    whose group means are taken out first (of ranks, for Spearman), so that pooled sizes do not correlate by their size
    alone. Rows where the candidate or the target is missing are left out. Fewer than four points give NaN intervals.
    Every pair is resampled from one seed anew: its interval does not depend on what else is asked for.
    """
    rows = []
    for target, candidate in itertools.product(targets, candidates):
        kept = table.dropna(subset=[candidate, target])
        pair, row = kept[[candidate, target]].astype(float), {"target": target, "candidate": candidate, "n": len(kept)}
        groups, rng = kept[within] if within else np.zeros(len(kept)), np.random.default_rng(0)
        for name, values in {"pearson": pair, "spearman": pair.rank()}.items():
            x, y = ((of - of.groupby(groups).transform("mean")).to_numpy() for _, of in values.items())
            low = high = np.nan
            if len(kept) > 3:
                drawn = bootstrap((x, y), pearson, paired=True, n_resamples=DRAWS, method="percentile", rng=rng)
                # a resample of one point over and over has no correlation: scipy's own interval would be NaN
                low, high = np.nanquantile(drawn.bootstrap_distribution, [(1 - USUAL) / 2, (1 + USUAL) / 2])
            row |= {name: pearson(x, y) if len(kept) > 1 else np.nan, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)
