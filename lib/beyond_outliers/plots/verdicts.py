"""The ledger of the claims: one row a claim and part, its estimate, interval and verdict."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from beyond_outliers.claims.estimates import label
from beyond_outliers.plots.theme import subplots

VERDICT_COLOURS = {  # of claims' verdicts, in every figure that shows them
    "reproduced": "#009E73",
    "not reproduced": "#D55E00",
    "tie": "#0072B2",
    "undecided": "#999999",
    "not measured": "#DDDDDD",
}


def verdict_ledger(table: pd.DataFrame, claims: pd.Series) -> Figure:
    """`claims.verdicts.ledger`: each row on a scale of its own, the claimed side to the right of the line.

    The farthest end of an interval lies at the edge; the numbers stand beside it. The verdict is the row's colour, and
    written out. ValueError for a verdict that has no colour.
    """
    if unknown := sorted(set(table.verdict) - set(VERDICT_COLOURS)):
        raise ValueError(f"unknown verdicts {unknown}; valid: {', '.join(VERDICT_COLOURS)}")
    figure, ax = subplots(figsize=(12, 0.27 * len(table) + 1))
    for place, row in enumerate(table.itertuples()):
        colour = VERDICT_COLOURS[row.verdict]
        ax.axhspan(place - 0.46, place + 0.46, color=colour, alpha=0.14, lw=0)
        ends = np.array([row.low, row.value, row.high], dtype=float)
        if np.isfinite(ends[1]):
            away = row.side * (ends - row.threshold)
            reach = np.nanmax(np.abs(away)) or 1.0
            ax.plot(away[[0, 2]] / reach, [place, place], color=colour, lw=2)
            ax.plot(away[1] / reach, place, "o", color=colour, ms=5)
        beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        style = beside | {"va": "center", "fontsize": 7}
        ax.annotate(row.verdict, (1, place), (6, 0), weight="bold" if row.part == "whole" else "normal", **style)
        ax.annotate(_numbers(row), (1, place), (78, 0), **style)
    ax.axvline(0, color="black", lw=0.8)
    labels = [
        f"{row.id}  {_cut(claims[row.id])}" if row.part == "whole" else label(row.part) for row in table.itertuples()
    ]
    ax.set_yticks(range(len(table)), labels, fontsize=7)
    ax.set_xticks([-1, 0, 1], ["", "threshold", "claimed side"], fontsize=8)
    ax.set(xlim=(-1.05, 1.05), ylim=(len(table) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    return figure


def _cut(claim: str, longest: int = 78) -> str:
    return claim if len(claim) <= longest else claim[:longest].rsplit(" ", 1)[0] + " ..."


def _numbers(row) -> str:
    if not np.isfinite(row.value):
        return ""
    ends = f" [{row.low:.3g}, {row.high:.3g}]" if np.isfinite(row.low) else ""
    threshold = f", threshold {row.threshold:g}" if row.threshold else ""
    return f"{row.value:.3g}{ends} {row.unit}{threshold}{f', n {row.n}' if row.n else ''}"
