"""Does a metric predict the damage of quantization across optimizers? C6 and C7 of the confirmatory study.

Six optimizers are six points, however many runs stand behind each. A point is an optimizer's mean over sizes of log
metric and log damage, each less the mean of all optimizers at that size. With six points Pearson's r must reach .811
to differ from 0 at 5 % (two-sided), and an r of .2 or less excludes, at one-sided 5 % by Fisher's z, a correlation of
.82 or more: those are the two answers, and all between is "six optimizers cannot say".
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from beyond_outliers.claims.confirm_kinds import Finding, numbers, summary, thin
from beyond_outliers.claims.contrasts import NOT_REPRODUCED, REPRODUCED, UNDECIDED, cells, decide

LEAST_OPTIMIZERS = 6
PREDICTS, SILENT = "predicts", "is silent"


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation along the last axis, (..., n) -> (...); NaN where one side is constant."""
    x, y = (values - values.mean(-1, keepdims=True) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def leave_one_out(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The correlations without each point in turn, (..., n) -> (..., n)."""
    rest = [[j for j in range(x.shape[-1]) if j != i] for i in range(x.shape[-1])]
    return pearson(x[..., rest], y[..., rest])


def judge_prediction(r, others, low, high, rule: dict) -> np.ndarray:
    """Verdicts (...) on a metric from r (...), its leave-one-out values `others` (..., n) and its interval over seeds.

    The metric predicts: r at least `predicts`, every other and the lower end above `still`. It is silent: r at most
    `silent`, every other and the upper end below `predicts`. `rule["claim"]` says which of the two is claimed.
    """
    predicts = (r >= rule["predicts"]) & (others > rule["still"]).all(-1) & (low > rule["still"])
    silent = (r <= rule["silent"]) & (others < rule["predicts"]).all(-1) & (high < rule["predicts"])
    if rule["claim"] == PREDICTS:
        return decide(predicts, silent)
    if rule["claim"] == SILENT:
        return decide(silent, predicts)
    raise ValueError(f"unknown claim {rule['claim']!r}; valid: {PREDICTS}, {SILENT}")


def points(means: np.ndarray) -> np.ndarray:
    """Means (..., O, S) of optimizers at sizes -> size-centred points (..., O)."""
    return (means - means.mean(-2, keepdims=True)).mean(-1)


def prediction(table: pd.DataFrame, rule: dict, optimizers: Sequence[str], sizes: Sequence[str]) -> list[Finding]:
    """Correlation of the optimizers' log metric with their log damage, for every metric of the rule."""
    table = table[table["optimizer"].isin(optimizers) & table["size"].isin(sizes)]
    return summary([_metric(table, metric, rule, optimizers, sizes) for metric in rule["metrics"]])


def _metric(table: pd.DataFrame, metric: str, rule: dict, optimizers: Sequence[str], sizes: Sequence[str]) -> Finding:
    both = table.dropna(subset=[metric, rule["value"]])
    bad = int(((both[metric] <= 0) | (both[rule["value"]] <= 0)).sum())
    if bad:
        return Finding(UNDECIDED, f"Undecided: {bad} runs have no logarithm of {metric} or damage.", metric)
    logs = both.assign(x=np.log(both[metric]), y=np.log(both[rule["value"]]))
    logs["sum"] = logs["x"] + logs["y"]
    x, y, total = (cells(logs, name, optimizers, sizes) for name in ("x", "y", "sum"))
    if thin(x):
        return Finding(UNDECIDED, f"Undecided, {thin(x)}.", metric, n=numbers(x))
    if len(optimizers) < LEAST_OPTIMIZERS:
        r = float(pearson(points(x.mean), points(y.mean)))
        return Finding(UNDECIDED, f"Undecided: {len(optimizers)} optimizers cannot say.", metric, r, n=numbers(x))
    u, v = points(x.mean), points(y.mean)
    r, others = float(pearson(u, v)), leave_one_out(u, v)
    covariance = (total.variance - x.variance - y.variance) / 2
    low, high = _over_seeds(x, y, covariance, rule["draws"])
    verdict = str(judge_prediction(r, others, low, high, rule))
    drawn = _over_optimizers(u, v, rule["draws"])
    comment = (
        f"{_said(verdict, rule)} Without one optimizer: {others.min():.2f} to {others.max():.2f}; "
        f"optimizers resampled, for information: {drawn[0]:.2f} to {drawn[1]:.2f}."
    )
    place = int(np.abs(others - r).argmax())  # the optimizer that the correlation hangs on most
    return Finding(verdict, comment, metric, r, low, high, n=numbers(x), rival=optimizers[place])


def _said(verdict: str, rule: dict) -> str:
    if verdict == UNDECIDED:
        return "Six optimizers cannot say."
    predicts = (verdict == REPRODUCED) == (rule["claim"] == PREDICTS) and verdict in (REPRODUCED, NOT_REPRODUCED)
    return "It predicts." if predicts else "It does not predict."


def _over_seeds(x, y, covariance: np.ndarray, draws: int, seed: int = 0) -> tuple[float, float]:
    """95 % interval of r when the means of all cells are drawn anew with the spread that their seeds show."""
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, draws, *x.mean.shape))
    spread = np.sqrt(x.variance)
    slope = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0)
    rest = np.sqrt(np.clip(y.variance - slope**2, 0, None))
    u = x.mean + spread * first / np.sqrt(x.n)
    v = y.mean + (slope * first + rest * second) / np.sqrt(x.n)
    low, high = np.nanquantile(pearson(points(u), points(v)), [0.025, 0.975])
    return float(low), float(high)


def _over_optimizers(u: np.ndarray, v: np.ndarray, draws: int, seed: int = 0) -> tuple[float, float]:
    picks = np.random.default_rng(seed).integers(len(u), size=(draws, len(u)))
    low, high = np.nanquantile(pearson(u[picks], v[picks]), [0.025, 0.975])
    return float(low), float(high)
