"""The kinds of rules of the confirmatory study, one function each: table of runs, rule, optimizers, sizes -> findings.

A rule is a table of data/claims-confirm.toml; margins and thresholds come from there. A claim of several parts has a
finding for each and, first, one for the whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from beyond_outliers.claims.contrasts import (
    LEAST_SEEDS,
    NOT_REPRODUCED,
    REPRODUCED,
    STRICT,
    UNDECIDED,
    USUAL,
    Cells,
    Contrasts,
    cells,
    common_slope,
    contrast,
    decide,
    judge_extreme,
    judge_threshold,
    sign_of,
    t_interval,
    whole,
)

WHOLE = "whole"


@dataclass(frozen=True)
class Finding:
    """What a rule says of a claim or a part of it. `n`: the fewest runs of an optimizer at each size, "10/10/6"."""

    verdict: str
    comment: str
    part: str = WHOLE
    estimate: float = np.nan
    low: float = np.nan
    high: float = np.nan
    low_99: float = np.nan
    high_99: float = np.nan
    n: str = ""
    rival: str = ""


def numbers(found: Cells) -> str:
    return "/".join(str(n) for n in found.n.min(0))


def summary(parts: Sequence[Finding], comment: str = "") -> list[Finding]:
    """The findings of a claim whose parts must all hold."""
    if len(parts) == 1:
        return [parts[0]]
    verdict = whole([part.verdict for part in parts])
    return [Finding(verdict, comment or verdicts_of(parts), n=parts[0].n), *parts]


def verdicts_of(parts: Sequence[Finding]) -> str:
    return "; ".join(f"{part.part}: {part.verdict}" for part in parts)


def thin(found: Cells) -> str:
    """Which cells have too few runs for a contrast, in words; empty when none."""
    few = [
        f"{name} at {size} has {n}"
        for name, row in zip(found.optimizers, found.n, strict=True)
        for size, n in zip(found.sizes, row, strict=True)
        if n < LEAST_SEEDS
    ]
    return f"fewer than {LEAST_SEEDS} runs: {', '.join(few)}" if few else ""


# ------------------------------------------------------------------------------------------ extremes: C1 3 4 5 11 13


def extreme(table: pd.DataFrame, rule: dict, optimizers: Sequence[str], sizes: Sequence[str]) -> list[Finding]:
    """ "X lowest" or "X highest", in one half or more (`rule["half"]`), by contrasts with every rival."""
    values = transformed(table[table["optimizer"].isin(optimizers)], rule)
    bad = ~np.isfinite(values) & table.loc[values.index, rule["value"]].notna()
    if bad.any():
        reason = f"Undecided: {int(bad.sum())} values of {rule['value']} are not positive and have no logarithm."
        return [Finding(UNDECIDED, reason)]
    found = cells(table.assign(judged=values), "judged", optimizers, sizes)
    return summary([_half(found, half) for half in rule["half"]])


def transformed(table: pd.DataFrame, rule: dict) -> pd.Series:
    values = table[rule["value"]].astype(float)
    if rule["transform"] == "none":
        return values
    if rule["transform"] == "log":
        return np.log(values.where(values > 0))
    raise ValueError(f"unknown transform {rule['transform']!r}; valid: none, log")


def _half(found: Cells, half: dict) -> Finding:
    pairs = [(who, rival) for who in half["who"] for rival in found.optimizers if rival not in half["who"]]
    against = contrast(found, pairs)
    verdict, place = (values.item() for values in judge_extreme(against, half["side"], half["margin"]))
    (low, high), (low_99, high_99) = against.interval(USUAL), against.interval(STRICT)
    who, rival = pairs[place]
    return Finding(
        verdict=verdict,
        comment=_extreme_comment(verdict, found, against, half, place),
        part=half["name"],
        estimate=float(against.estimate[place]),
        low=float(low[place]),
        high=float(high[place]),
        low_99=float(low_99[place]),
        high_99=float(high_99[place]),
        n=numbers(found),
        rival=rival if len(half["who"]) == 1 else f"{rival} (of {who})",
    )


def _extreme_comment(verdict: str, found: Cells, against: Contrasts, half: dict, place: int) -> str:
    low, high = against.interval(USUAL)
    if verdict == UNDECIDED and thin(found):
        return f"Undecided, {thin(found)}."
    if verdict == REPRODUCED:
        small = max(abs(low[place]), abs(high[place])) < half["margin"]
        return f"Every contrast excludes 0{', the nearest by less than the margin' if small else ''}."
    if verdict == NOT_REPRODUCED:
        ends = against.interval(STRICT)
        wrong = ends[0] > 0 if sign_of(half["side"]) > 0 else ends[1] < 0
        names = ", ".join(
            dict.fromkeys(pair[1] for pair, is_wrong in zip(against.pairs, wrong, strict=True) if is_wrong)
        )
        return f"At 99 % on the other side: {names}."
    if verdict == UNDECIDED:
        return "The interval of the nearest rival reaches across 0 and beyond the margin, or excludes 0 at 95 % only."
    return f"The interval of the nearest rival lies within {half['margin']:g} of 0."


# ------------------------------------------------------------------------------------------------------- slopes: C2


def slopes(table: pd.DataFrame, rule: dict, optimizers: Sequence[str], sizes: Sequence[str]) -> list[Finding]:
    """Every optimizer's slope of log MMR on log learning rate, common to the sizes, is above 0."""
    parts = []
    for name in optimizers:
        rows = table[(table["optimizer"] == name) & table["size"].isin(sizes)].dropna(subset=["lr", "mmr"])
        groups = [(np.log(part.lr), np.log(part.mmr)) for _, part in rows.groupby(["size", "seed"])]
        (slope, low, high), (_, low_99, high_99) = common_slope(groups), common_slope(groups, STRICT)
        counts = rows.groupby("size").size().reindex(sizes, fill_value=0)
        if np.isnan(slope):
            verdict, comment = UNDECIDED, f"Undecided: {len(rows)} tuning runs leave nothing for a spread."
        else:
            verdict = str(decide(low > 0, high_99 < 0))
            comment = {REPRODUCED: "Rises.", NOT_REPRODUCED: "Falls, at 99 %."}.get(verdict, "The interval has 0.")
        n = "/".join(map(str, counts))
        parts.append(Finding(verdict, comment, name, slope, low, high, low_99, high_99, n))
    return summary(parts)


# ------------------------------------------------------------------------------------------ shares and ratios: C8 9 10


def share(table: pd.DataFrame, rule: dict, optimizers: Sequence[str], sizes: Sequence[str]) -> list[Finding]:
    """Share of modules of which something is true. Its unit is an optimizer: runs of one are too alike to count."""
    table = table[table["optimizer"].isin(optimizers) & table["size"].isin(sizes)]
    if rule["modules"] == "with new error":
        kept = table[(table["B"] > 0) & (table["R_in"] > 0)]
        hits, beside = (kept["A"] > kept["B"]) & (kept["A"] > kept["C"].abs()), ""
    elif rule["modules"] == "sublayer norms":
        norms = table[(table["kind"] == "norm") & (table["R_in"] > 0)]
        falls, final = norms["R"] < norms["R_in"], norms["name"] == "final_norm"
        kept, hits = norms[~final], falls[~final]
        beside = f" The final norm, apart: {falls[final].mean():.2f} of the runs."
    else:
        raise ValueError(f"unknown modules {rule['modules']!r}; valid: with new error, sublayer norms")
    runs = hits.groupby([kept["size"], kept["optimizer"], kept["seed"]]).mean().rename("share").reset_index()
    found = cells(runs, "share", optimizers, sizes)
    if thin(found):
        return [Finding(UNDECIDED, f"Undecided, {thin(found)}.", n=numbers(found))]
    means = found.mean.mean(-1)  # of an optimizer, over sizes
    (estimate, low, high), (_, low_99, high_99) = t_interval(means), t_interval(means, STRICT)
    verdict = str(judge_threshold(low, high, rule["threshold"], "above"))
    least = optimizers[int(means.argmin())]
    comment = f"{len(means)} optimizers, the lowest {least} with {means.min():.2f}.{beside}"
    return [Finding(verdict, comment, WHOLE, estimate, low, high, low_99, high_99, numbers(found), least)]


def near_one(table: pd.DataFrame, rule: dict, optimizers: Sequence[str], sizes: Sequence[str]) -> list[Finding]:
    """Every optimizer's mean |spectral ratio - 1| of the linear layers lies below the threshold."""
    table = table[table["optimizer"].isin(optimizers) & table["size"].isin(sizes)].dropna(subset=["spectral_ratio"])
    table = table.assign(distance=(table["spectral_ratio"] - 1).abs())
    runs = table.groupby(["size", "optimizer", "seed"]).distance.mean().reset_index()
    parts = []
    for name in optimizers:
        own = cells(runs, "distance", (name,), sizes)
        against = contrast(with_zero(own), [(name, "zero")])
        (low, high), (low_99, high_99) = (tuple(map(np.ndarray.item, against.interval(c))) for c in (USUAL, STRICT))
        verdict = str(decide(high < rule["threshold"], low_99 > rule["threshold"]))
        layers = table[table["optimizer"] == name]
        comment = f"Undecided, {thin(own)}."
        if not thin(own):
            largest = layers.loc[layers["distance"].idxmax()]
            comment = f"Largest: {largest['distance']:.3f}, {largest['name']}."
        estimate = float(against.estimate[0])
        parts.append(Finding(verdict, comment, name, estimate, low, high, low_99, high_99, numbers(own)))
    return summary(parts, f"Largest of all layers: {table.distance.max():.3f}." if len(table) else "")


def with_zero(own: Cells) -> Cells:
    """One optimizer beside a constant 0, so that the contrast is its mean over sizes."""
    mean, variance = (np.concatenate([part, np.zeros_like(part)], -2) for part in (own.mean, own.variance))
    return Cells((*own.optimizers, "zero"), own.sizes, mean, variance, np.concatenate([own.n, own.n]))
