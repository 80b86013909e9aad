"""Optimizers beside each other, as tables and figures show them: means, ratios to AdamW, size-centred means.

Intervals are those of `contrasts` (95 %): over seeds, with sizes as strata where there are several. Where an optimizer
has fewer than three seeds there is an estimate and no interval (NaN).
"""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import t as student

from beyond_outliers.claims.comparison import label as label
from beyond_outliers.claims.comparison import written
from beyond_outliers.claims.contrasts import LEAST_SEEDS, USUAL, cells, contrast, t_interval

ALL_SIZES = "mean over sizes"
REFERENCE = "adamw"


def interval(value: float, low: float, high: float, digits: int = 3) -> str:
    """ "0.123 [0.110, 0.136]", the number alone where there is no interval."""
    return written((value, low, high), digits)


def means(rows: pd.DataFrame, value: str, by: Sequence[str] = ()) -> pd.DataFrame:
    """Mean over seeds and its t interval: one row a size, optimizer and value of `by`, with mean, low, high, n.

    Two runs have no interval here, as in a contrast.
    """
    keys = [*by, "size", "optimizer"]
    found = []
    for key, own in rows.groupby(keys, sort=False)[value]:
        mean, *ends = t_interval(own.to_numpy())
        low, high = ends if len(own) >= LEAST_SEEDS else (np.nan, np.nan)
        found.append((*key, mean, low, high, len(own)))
    return pd.DataFrame(found, columns=[*keys, "mean", "low", "high", "n"])


def ratios(rows: pd.DataFrame, value: str, by: Sequence[str] = (), reference: str = REFERENCE) -> pd.DataFrame:
    """How many times the reference's `value` an optimizer has: ratio (of geometric means over seeds), low, high, n.

    One row a value of `by`, size and optimizer; the reference's own rows are 1, without an interval. Behind them, where
    two sizes or more have three seeds of both, the row ALL_SIZES: the unweighted mean over those sizes, in logarithms.
    n: the fewer runs of the two. Sizes without the reference are left out, and so are values that are not positive,
    which have no logarithm (n says how many are left).
    """
    keys = [*by, "size"]
    logs = rows.assign(log=np.log(rows[value].where(rows[value] > 0))).dropna(subset="log")
    found = []
    for key, group in logs.groupby(list(by), sort=False) if by else [((), logs)]:
        sizes = list(dict.fromkeys(group["size"]))
        optimizers = list(dict.fromkeys(group.optimizer))
        if reference not in optimizers:
            continue
        every = cells(group, "log", optimizers, sizes)
        n = np.minimum(every.n, every.n[every.of([reference])])
        for name, counts in zip(optimizers, n, strict=True):
            there = [(size, int(k)) for size, k in zip(sizes, counts, strict=True) if k]
            strata = [size for size, k in there if k >= LEAST_SEEDS]
            parts = [([size], size, k) for size, k in there]
            if len(strata) > 1:
                parts.append((strata, ALL_SIZES, min(k for size, k in there if size in strata)))
            for over, at, k in parts:
                found.append((*key, at, name, *_ratio(group, name, reference, over), k))
    table = pd.DataFrame(found, columns=[*keys, "optimizer", "ratio", "low", "high", "n"])
    if table.empty:
        return table
    order = {size: place for place, size in enumerate([*dict.fromkeys(rows["size"]), ALL_SIZES])}
    return table.sort_values("size", key=lambda column: column.map(order), kind="stable", ignore_index=True)


def _ratio(logs: pd.DataFrame, name: str, reference: str, sizes: Sequence[str]) -> tuple[float, float, float]:
    if name == reference:
        return 1.0, np.nan, np.nan
    some = cells(logs, "log", (name, reference), sizes)
    against = contrast(some, [(name, reference)])
    low, high = against.interval(USUAL)
    estimate = some.mean[0].mean() - some.mean[1].mean()  # a contrast of two runs is NaN; the difference itself is not
    return float(np.exp(estimate)), float(np.exp(low[0])), float(np.exp(high[0]))


def centred(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Logarithms of `columns` less their mean at a size (of optimizers, each a mean over seeds), averaged over sizes.

    One row an optimizer: optimizer, n ("2/3": runs at each size), and for every column its value, and half the width of
    its 95 % interval as NAME_half, from the spread over seeds alone. Only sizes that have every optimizer are taken, so
    that what is subtracted is the same for all; without one the table is empty.
    """
    optimizers = list(dict.fromkeys(rows.optimizer))
    sizes = [size for size, own in rows.groupby("size", sort=False) if set(own.optimizer) == set(optimizers)]
    if not sizes:
        return pd.DataFrame(columns=["optimizer", "n", *(c + end for c in columns for end in ("", "_half"))])
    table: dict = {"optimizer": optimizers}
    for column in columns:
        every = cells(rows.assign(log=np.log(rows[column].where(rows[column] > 0))), "log", optimizers, sizes)
        table["n"] = ["/".join(map(str, counts)) for counts in every.n]
        table[column] = (every.mean - every.mean.mean(0)).mean(-1)
        enough = np.where(every.n >= LEAST_SEEDS, every.n, np.nan)
        parts = every.variance / (enough * len(sizes) ** 2)
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            dof = parts.sum(-1) ** 2 / (parts**2 / (enough - 1)).sum(-1)
            table[column + "_half"] = np.sqrt(parts.sum(-1)) * student.ppf((1 + USUAL) / 2, dof)
    return pd.DataFrame(table)
