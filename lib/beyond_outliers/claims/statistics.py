"""Estimates with intervals, correlations, and the verdict that a rule draws from them."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm, rankdata

from beyond_outliers.claims.predictors import CANDIDATES, TARGETS

LEAST_UNITS = 3
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A statistic with its interval and the number of units behind it."""

    value: float
    low: float
    high: float
    n: int


def share(hits) -> Estimate:
    """Share of true values with its Wilson interval."""
    hits = np.asarray(list(hits), dtype=bool)
    n = len(hits)
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    p, z = hits.mean(), norm.ppf((1 + CONFIDENCE) / 2)
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(float(p), float((centre - half) / (1 + z * z / n)), float((centre + half) / (1 + z * z / n)), n)


def mean(values, draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean with its percentile bootstrap interval; no interval for fewer than two values."""
    values = np.asarray(list(values), dtype=float)
    n = len(values)
    if n < 2:
        return Estimate(float(values.mean()) if n else np.nan, np.nan, np.nan, n)
    means = values[np.random.default_rng(seed).integers(n, size=(draws, n))].mean(1)
    tail = 100 * (1 - CONFIDENCE) / 2
    return Estimate(float(values.mean()), *map(float, np.percentile(means, [tail, 100 - tail])), n)


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
    draws: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Pearson and Spearman correlation of every candidate with every target, with percentile bootstrap intervals.

    One row a (target, candidate): n points, pearson, pearson_low, pearson_high, spearman, ... `within` names a column
    whose group means are taken out first (of ranks, for Spearman), so that pooled sizes do not correlate by their size
    alone. Rows where the candidate or the target is missing are left out. Fewer than four points give NaN intervals.
    """
    rng, rows, tail = np.random.default_rng(seed), [], 100 * (1 - confidence) / 2
    for target in targets:
        for candidate in candidates:
            kept = table.dropna(subset=[candidate, target])
            groups = kept[within].to_numpy() if within else np.zeros(len(kept))
            x, y = kept[candidate].to_numpy(float), kept[target].to_numpy(float)
            row = {"target": target, "candidate": candidate, "n": len(kept)}
            for name, transform in (("pearson", lambda v: v), ("spearman", rankdata)):
                u, v = (_without_group_means(transform(values), groups) for values in (x, y))
                picks = rng.integers(len(kept), size=(draws, len(kept))) if len(kept) else np.zeros((0, 0), int)
                low = high = np.nan
                if len(kept) > 3:
                    low, high = np.nanpercentile(_pearson(u[picks], v[picks]), [tail, 100 - tail])
                value = _pearson(u[None], v[None])[0] if len(kept) > 1 else np.nan
                row |= {name: value, f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def _without_group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return values - pd.Series(values).groupby(groups).transform("mean").to_numpy()


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation along the last axis of (draws, n) arrays; NaN where one side is constant."""
    x, y = (values - values.mean(-1, keepdims=True) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
