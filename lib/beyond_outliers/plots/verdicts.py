"""The scorecard of the claims."""

import textwrap

import pandas as pd
from matplotlib.figure import Figure

from beyond_outliers.plots.theme import subplots

VERDICT_COLOURS = {  # of claims' verdicts, in every figure that shows them
    "reproduced": "#009E73",
    "not reproduced": "#D55E00",
    "tie": "#0072B2",
    "undecided": "#999999",
    "not measured": "#DDDDDD",
}


def scorecard(table: pd.DataFrame, claims: pd.Series) -> Figure:
    """`claims.verdicts.scorecard` on one screen: a claim per row, a column per way to judge it. A gap: not judged."""
    figure, ax = subplots(figsize=(4.6 + 1.1 * table.shape[1], 0.3 * len(table) + 0.8))
    for row, claim in enumerate(table.index):
        for column, verdict in enumerate(table.loc[claim]):
            if isinstance(verdict, str):
                colour = VERDICT_COLOURS[verdict]
                ax.barh(row, 0.94, 0.86, column - 0.47, color=colour, alpha=0.45)
                ax.text(column, row, verdict, ha="center", va="center", fontsize=8)
    ax.set_yticks(
        range(len(table)),
        [f"{claim}  {textwrap.shorten(claims[claim], 64, placeholder=' ...')}" for claim in table.index],
        fontsize=9,
    )
    ax.set_xticks(range(table.shape[1]), [name.replace(" ", "\n", 1) for name in table.columns], fontsize=9)
    ax.xaxis.tick_top()
    ax.set_frame_on(False)
    ax.set(xlim=(-0.5, table.shape[1] - 0.5), ylim=(len(table) - 0.5, -0.5))
    return figure
