"""Figures that compare optimizers: curves, points, dumbbells, heatmaps, scaling laws.

A figure function takes a tidy table and returns a matplotlib figure.
"""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from beyond_outliers.claims.estimates import label as name_of
from beyond_outliers.config.registry import ordered
from beyond_outliers.plots.theme import (
    COLOURS,
    GUIDE,
    LABELS,
    MARKERS,
    finish,
    name_lines,
    name_ticks,
    panels,
    style_of,
    subplots,
    tidy_log,
)


def optimizer_lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    panel: str,
    xlabel: str,
    ylabel: str,
    band: tuple[str, str] | None = None,
    logx: bool = False,
    logy: bool = False,
) -> Figure:
    """y against x, a line an optimizer, a panel a value of `panel`: the mean over seeds with a band from lowest to
    highest, or between the columns of `band`, and its name at its end.
    Ticks of x read 200k where it is tokens."""
    figure, axes = panels(table.get(panel, []), xlabel=xlabel, sharey=True)
    low, high = band or (y, y)
    for (value, name), line in table.groupby([panel, "optimizer"], sort=False) if axes else ():
        curve = line.groupby(x).agg(mean=(y, "mean"), low=(low, "min"), high=(high, "max"))
        axes[value].plot(curve["mean"], lw=1.4, ms=4, markevery=max(1, len(curve) // 8), **style_of(name))
        axes[value].fill_between(curve.index, curve.low, curve.high, color=COLOURS[name], alpha=0.12, lw=0)
    form = EngFormatter(sep="") if x == "tokens" else None
    for ax in axes.values():
        if form:
            ax.xaxis.set_major_formatter(form)
        if logx:
            ax.set_xscale("log")
            tidy_log(ax.xaxis, form)
        if logy:
            ax.set_yscale("log")
            tidy_log(ax.yaxis)
        name_lines(ax)
    return finish(figure, ylabel)


def along_training(table: pd.DataFrame, y: str, ylabel: str, decay_from: float) -> Figure:
    """y against the share of the run that is done, with its interval, a panel a size; the decay of the rate shaded."""
    figure = optimizer_lines(table, "share", y, "size", "share of the run (decay shaded)", ylabel, band=("low", "high"))
    for ax in figure.axes if len(table) else ():
        ax.axvspan(decay_from, 1, color="grey", alpha=0.12, lw=0)
        ax.set_ylim(0, None)
    return figure


def optimizer_points(
    table: pd.DataFrame, value: str, panel: str, label: str, error: str | None = None, floor: float | None = None
) -> Figure:
    """An optimizer a row, a panel a value of `panel`: the mean over rows with its number, each row a small dot.

    `error` is a column of standard errors, `floor` draws a line, for instance chance.
    """
    rows_of = table.groupby(panel).optimizer.nunique().max()
    figure, axes = panels(table[panel], height=0.25 * rows_of + 0.6, xlabel=label)
    for name, rows in table.groupby(panel, sort=False):
        ax, optimizers = axes[name], ordered(rows.optimizer)
        for place, optimizer in enumerate(optimizers):
            shown = rows[rows.optimizer == optimizer]
            mean = shown[value].mean()
            spread = np.sqrt((shown[error] ** 2).mean()) if error else None
            ax.plot(shown[value], [place] * len(shown), ".", color=COLOURS[optimizer], ms=4, alpha=0.4)
            ax.errorbar(mean, place, xerr=spread, capsize=3, **style_of(optimizer))
            ax.text(1.02, place, f"{mean:#.3g}", va="center", fontsize=9, transform=ax.get_yaxis_transform())
        if floor is not None:
            ax.axvline(floor, ls=":", **GUIDE)
        ax.set_ylim(len(optimizers) - 0.5, -0.5)
        name_ticks(ax.yaxis, optimizers)
    return figure


def dumbbells(table: pd.DataFrame, panel: str, label: str, sharex: bool = True) -> Figure:
    """From `before` to `after`, a row an optimizer, lowest `after` first, a panel a value of `panel`."""
    figure, axes = panels(table[panel], 2.9, 2.5, xlabel=label, sharex=sharex)
    for value, rows in table.sort_values("after").groupby(panel):
        ax = axes[value]
        for position, row in enumerate(rows.itertuples()):
            style = {"color": COLOURS[row.optimizer], "marker": MARKERS[row.optimizer], "ms": 6}
            ax.plot([row.before, row.after], [position, position], mfc="white", lw=1.5, **style)
            ax.plot(row.after, position, **style)
            ax.annotate(f"{row.after:.2f}", (row.after, position), (7, -4), textcoords="offset points", fontsize=9)
        name_ticks(ax.yaxis, rows.optimizer)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.margins(x=0.2)
    return figure


def heatmap(
    table: pd.DataFrame,
    row: str,
    column: str,
    value: str,
    label: str,
    digits: int = 2,
    norm: str | Normalize | None = None,
) -> Figure:
    """Mean of `value` over every (row, column), written into the cells; optimizers in the paper's order, all else in
    order of appearance. `norm` of the colours as in matplotlib; without one they are linear, and leave out extremes.
    """
    import seaborn as sns

    grid = table.pivot_table(index=row, columns=column, values=value, sort=False)
    for axis, names in enumerate(grid.axes):
        if set(names) & set(LABELS):
            grid = grid.reindex(ordered(names), axis=axis).rename(name_of, axis=axis)
    figure, ax = subplots(figsize=(1.6 + 0.72 * grid.shape[1], 0.7 + 0.3 * grid.shape[0]))
    written = grid.round(digits) + 0.0  # no -0.00
    sns.heatmap(grid, cmap="rocket_r", ax=ax, robust=True, norm=norm, annot=written, fmt=f".{digits}f", cbar=False)
    ax.set(xlabel="", ylabel="")
    ax.set_title(textwrap.fill(label, int(11 * figure.get_size_inches()[0])), fontsize=9)
    ax.tick_params(rotation=0)
    return figure


def scaling_fits(runs: pd.DataFrame, laws: dict) -> Figure:
    """Loss against parameters, a panel an optimizer: full precision (filled) and QAT (open), with the fitted laws."""
    figure, axes = panels(ordered(runs.optimizer), xlabel="parameters $N$", sharex=True, sharey=True)
    grid = np.geomspace(runs.N.min() / 1.3, runs.N.max() * 1.3, 60)
    for optimizer, ax in axes.items():
        colour = COLOURS[optimizer]
        for bits, fill, line in ((16, colour, "-"), (4, "white", "--")):
            points = runs[(runs.optimizer == optimizer) & (runs.bits == bits)]
            ax.plot(points.N, points.loss, MARKERS[optimizer], color=colour, mfc=fill, ms=5)
            if optimizer in laws and bits in laws[optimizer].rho:
                fitted = np.round(laws[optimizer].predict(grid, bits=bits), 4)  # processors differ in later digits
                ax.plot(grid, fitted, line, color=colour, lw=1)
        ax.set(xscale="log", yscale="log")
        tidy_log(ax.xaxis, EngFormatter(sep=""))
        tidy_log(ax.yaxis)
    return finish(figure, "loss (nats per token)")
