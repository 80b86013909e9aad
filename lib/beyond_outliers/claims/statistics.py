"""Estimates with intervals, correlations, and the verdict that a rule draws from them."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import alexandergovern, binomtest, bootstrap, rankdata

from beyond_outliers.claims.predictors import CANDIDATES, TARGETS

LEAST_UNITS = 3
CONFIDENCE = 0.95
DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A statistic with its interval and the number of units behind it; `reason` says why there is none."""

    value: float
    low: float
    high: float
    n: int
    reason: str = ""


def unknown(n: int, reason: str = "") -> Estimate:
    """No number, for a reason."""
    return Estimate(np.nan, np.nan, np.nan, n, reason)


def share(hits) -> Estimate:
    """Share of true values with its Wilson interval."""
    hits = [bool(hit) for hit in hits]
    if not hits:
        return unknown(0)
    found = binomtest(sum(hits), len(hits))
    interval = found.proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(found.statistic, float(interval.low), float(interval.high), len(hits))


def mean(values, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean with its percentile bootstrap interval; no interval for fewer than two values."""
    values = np.asarray(list(values), dtype=float)
    n = len(values)
    if n < 2:
        return Estimate(float(values.mean()) if n else np.nan, np.nan, np.nan, n)
    options = {"n_resamples": draws, "confidence_level": CONFIDENCE, "method": "percentile"}
    low, high = bootstrap((values,), np.mean, rng=np.random.default_rng(seed), **options).confidence_interval
    return Estimate(float(values.mean()), float(low), float(high), n)


def means_differ(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Test of equal means of `column` over optimizers, whose variances may differ (Alexander and Govern, 1994).

    One row a size. range: largest minus smallest mean of an optimizer; n_optimizers and n_runs behind it; statistic
    and p, NaN with fewer than two optimizers, or where one has a single run or does not vary.
    """
    found = []
    for size, of_size in rows.groupby("size", sort=False):
        samples = [values.to_numpy() for _, values in of_size.groupby("optimizer", sort=False)[column]]
        means = [sample.mean() for sample in samples]
        row = (size, len(samples), len(of_size), max(means) - min(means))
        if len(samples) > 1 and all(len(set(sample)) > 1 for sample in samples):
            test = alexandergovern(*samples)
            found.append((*row, test.statistic, test.pvalue))
        else:
            found.append((*row, np.nan, np.nan))
    return pd.DataFrame(found, columns=["size", "n_optimizers", "n_runs", "range", "statistic", "p"])


def verdict(estimate: Estimate, side: str, threshold: float, cells: int = LEAST_UNITS) -> str:
    """ "reproduced", "not reproduced" or "undecided", by the rule at the top of data/claims.toml.

    `cells`: sizes times seeds of the study, however many runs stand behind the estimate.
    """
    if min(estimate.n, cells) < LEAST_UNITS or not np.isfinite([estimate.low, estimate.high]).all():
        return "undecided"
    above, below = estimate.low > threshold, estimate.high < threshold
    holds, fails = (above, below) if side == "above" else (below, above)
    return "reproduced" if holds else "not reproduced" if fails else "undecided"


def correlations(
    table: pd.DataFrame,
    within: str | None = None,
    candidates: tuple[str, ...] = tuple(CANDIDATES),
    targets: tuple[str, ...] = tuple(TARGETS),
    draws: int = DRAWS,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Pearson and Spearman correlation of every candidate with every target, with percentile bootstrap intervals.

    One row a (target, candidate): n points, pearson, pearson_low, pearson_high, spearman, ... `within` names a column
    whose group means are taken out first (of ranks, for Spearman), so that pooled sizes do not correlate by their size
    alone. Rows where the candidate or the target is missing are left out. Fewer than four points give NaN intervals.
    Every pair is resampled from `seed` anew: its interval does not depend on what else is asked for.
    """
    rows, tail = [], 100 * (1 - confidence) / 2
    for target in targets:
        for candidate in candidates:
            kept = table.dropna(subset=[candidate, target])
            groups = kept[within].to_numpy() if within else np.zeros(len(kept))
            x, y = kept[candidate].to_numpy(float), kept[target].to_numpy(float)
            row, rng = {"target": target, "candidate": candidate, "n": len(kept)}, np.random.default_rng(seed)
            for name, transform in (("pearson", lambda v: v), ("spearman", rankdata)):
                u, v = (_without_group_means(transform(values), groups) for values in (x, y))
                low = high = np.nan
                if len(kept) > 3:
                    drawn = bootstrap((u, v), _pearson, paired=True, n_resamples=draws, method="percentile", rng=rng)
                    # a resample of one point over and over has no correlation: scipy's own interval would be NaN
                    low, high = np.nanpercentile(drawn.bootstrap_distribution, [tail, 100 - tail])
                value = _pearson(u, v) if len(kept) > 1 else np.nan
                row |= {name: value, f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def _without_group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return values - pd.Series(values).groupby(groups).transform("mean").to_numpy()


def _pearson(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Correlation along an axis; NaN where one side is constant. scipy's `pearsonr` warns at each of those."""
    x, y = (values - values.mean(axis, keepdims=True) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(axis) / np.sqrt((x * x).sum(axis) * (y * y).sum(axis))
