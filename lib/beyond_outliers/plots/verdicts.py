"""The scorecard of the claims."""

import textwrap

import pandas as pd
from matplotlib.figure import Figure

from beyond_outliers.plots.theme import subplots

VERDICTS = {  # what a cell says of each, and its colour
    "reproduced": ("yes", "#009E73"),
    "not reproduced": ("no", "#D55E00"),
    "tie": ("tie", "#0072B2"),
    "undecided": ("open", "#999999"),
    "not measured": ("-", "#DDDDDD"),
}


def scorecard(table: pd.DataFrame, claims: pd.Series) -> Figure:
    """`claims.verdicts.scorecard` on one screen: a claim per row, a column per way to judge it. A gap: not judged."""
    figure, ax = subplots(figsize=(2.9 + 0.62 * table.shape[1], 0.38 * len(table) + 0.8))
    for row, claim in enumerate(table.index):
        for column, verdict in enumerate(table.loc[claim]):
            if isinstance(verdict, str):
                word, colour = VERDICTS[verdict]
                ax.barh(row, 0.94, 0.86, column - 0.47, color=colour, alpha=0.45)
                ax.text(column, row, word, ha="center", va="center", fontsize=10)
    lines = [textwrap.wrap(f"{claim} {claims[claim]}", 44, max_lines=2, placeholder=" ...") for claim in table.index]
    ax.set_yticks(range(len(table)), ["\n".join(line) for line in lines], fontsize=8)
    ax.set_xticks(range(table.shape[1]), [name.replace(" ", "\n") for name in table.columns], fontsize=8)
    ax.xaxis.tick_top()
    ax.set_frame_on(False)
    ax.set(xlim=(-0.5, table.shape[1] - 0.5), ylim=(len(table) - 0.5, -0.5))
    return figure
