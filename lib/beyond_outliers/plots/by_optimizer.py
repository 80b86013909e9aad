"""Figures that compare optimizers: lines, points, bars, heatmaps, profiles along the depth.

A figure function takes a tidy table and returns a matplotlib figure.
"""

import textwrap

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from beyond_outliers.claims.readings import with_error
from beyond_outliers.config.loading import is_own
from beyond_outliers.config.optimizers import ordered
from beyond_outliers.plots.theme import COLOURS, LABELS, MARKERS, label_y, legend, panels, subplots, tidy_log


def optimizer_lines(
    table: pd.DataFrame, x: str, y: str, panel: str, xlabel: str, ylabel: str, logx: bool = False, logy: bool = False
) -> Figure:
    """y against x, a line an optimizer (mean over seeds, band from lowest to highest), a panel a value of `panel`.

    x is a count (tokens, steps): its ticks read 200k, 1M.
    """
    figure, axes = panels(table[panel], sharey=True)
    for (value, optimizer), rows in table.groupby([panel, "optimizer"], sort=False):
        curve = rows.groupby(x)[y].agg(["mean", "min", "max"])
        ax, colour = axes[value], COLOURS[optimizer]
        ax.plot(curve.index, curve["mean"], color=colour, label=LABELS[optimizer], lw=1.4)
        ax.fill_between(curve.index, curve["min"], curve["max"], color=colour, alpha=0.15, lw=0)
    for value, ax in axes.items():
        ax.set(title=str(value), xlabel=xlabel, xscale="log" if logx else "linear", yscale="log" if logy else "linear")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        if logx:
            tidy_log(ax.xaxis, EngFormatter(sep=""))
        if logy:
            tidy_log(ax.yaxis)
    label_y(axes.values(), ylabel)
    legend(figure)
    return figure


def optimizer_points(
    table: pd.DataFrame,
    x: str,
    y: str,
    panel: str,
    xlabel: str,
    ylabel: str,
    error: str | None = None,
    joined: bool = False,
    logx: bool = False,
    logy: bool = False,
) -> Figure:
    """A point a run, coloured by optimizer; `error` a column of standard errors of y; `joined` draws a line a seed."""
    figure, axes = panels(table[panel], sharey=True)
    by = [panel, "optimizer", *(["seed"] if joined else [])]
    for (value, optimizer, *_), rows in table.sort_values(x).groupby(by, sort=False):
        style = {"color": COLOURS[optimizer], "marker": MARKERS[optimizer], "label": LABELS[optimizer], "ms": 5}
        bars = rows[error] if error else None
        axes[value].errorbar(rows[x], rows[y], yerr=bars, ls="-" if joined else "none", lw=1, capsize=2, **style)
    for value, ax in axes.items():
        ax.set(title=str(value), xlabel=xlabel, xscale="log" if logx else "linear", yscale="log" if logy else "linear")
        if logx:
            tidy_log(ax.xaxis)
        if logy:
            tidy_log(ax.yaxis)
    label_y(axes.values(), ylabel)
    legend(figure)
    return figure


def optimizer_bars(
    table: pd.DataFrame, y: str, panel: str, ylabel: str, error: str | None = None, floor: float | None = None
) -> Figure:
    """A bar an optimizer (mean over rows, each row a dot if there are several), a panel a value of `panel`.

    `error` is a column of standard errors, `floor` draws a line, for instance chance. Values far from zero are drawn as
    points: bars on an axis without its zero would lie about ratios.
    """
    figure, axes = panels(table[panel], width=2.6, sharey=True)
    means = table.groupby([panel, "optimizer"])[y].mean()
    far = means.min() > 0 and means.max() - means.min() < means.min() / 2
    for value, ax in axes.items():
        rows = table[table[panel] == value]
        names = ordered(rows.optimizer)
        for position, name in enumerate(names):
            own = rows[rows.optimizer == name]
            spread = np.sqrt((own[error] ** 2).mean()) if error else None
            if far:
                ax.errorbar(position, means[value, name], spread, fmt=MARKERS[name], color=COLOURS[name], capsize=3)
            else:
                ax.bar(position, means[value, name], yerr=spread, color=COLOURS[name], capsize=2, width=0.7)
            if len(own) > 1:
                ax.plot([position] * len(own), own[y], ".", color="grey", ms=4, zorder=3)
        if floor is not None:
            ax.axhline(floor, color="grey", ls=":", lw=1)
        ax.set_title(str(value))
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.set_xticks(range(len(names)), [LABELS[name] for name in names], rotation=60)
        ax.grid(axis="x", visible=False)
    label_y(axes.values(), ylabel)
    return figure


def dumbbells(table: pd.DataFrame, panel: str, label: str) -> Figure:
    """From `before` to `after`, a row per optimizer, lowest `after` first, a panel per value of `panel`."""
    figure, axes = panels(table[panel], width=4.2, height=2.6, sharex=True)
    for value, ax in axes.items():
        rows = table[table[panel] == value].sort_values("after")
        for position, row in enumerate(rows.itertuples()):
            style = {"color": COLOURS[row.optimizer], "marker": MARKERS[row.optimizer], "ms": 6}
            ax.plot([row.before, row.after], [position, position], mfc="white", lw=1.5, **style)
            ax.plot(row.after, position, **style)
            ax.annotate(f"{row.after:.2f}", (row.after, position), (7, -3), textcoords="offset points", fontsize=8)
        ax.set_yticks(range(len(rows)), [LABELS[name] for name in rows.optimizer])
        ax.set(title=str(value), xlabel=label, ylim=(len(rows) - 0.5, -0.5))
        ax.margins(x=0.12)
    return figure


NORMS = {"linear": None, "log": LogNorm, "root": lambda **limits: PowerNorm(0.5, **limits)}


def heatmap(
    table: pd.DataFrame, row: str, column: str, value: str, label: str, digits: int = 2, norm: str = "linear"
) -> Figure:
    """Mean of `value` over every (row, column), written into the cells; optimizers in the paper's order, all else in
    order of appearance. `norm` of the colours: "linear" (its limits leave out extremes), "log", or "root" for values
    that reach from zero over decades. ValueError for another one.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; valid: {', '.join(NORMS)}")
    grid = table.pivot_table(index=row, columns=column, values=value, sort=False)
    for axis in (0, 1):
        names = list(grid.axes[axis])
        known = any(n in LABELS for n in names) and all(n in LABELS or is_own(n) for n in names)
        order = ordered(names) if known else names
        grid = grid.reindex(order, axis=axis).set_axis([LABELS[n] if known else n for n in order], axis=axis)
    figure, ax = subplots(figsize=(1.6 + 0.72 * grid.shape[1], 1.2 + 0.36 * grid.shape[0]))
    shown = grid.round(digits) + 0.0  # no -0.00
    make_norm = NORMS[norm]
    limits: dict = {"robust": True}
    if make_norm is not None:
        limits = {"norm": make_norm(vmin=grid.min(axis=None), vmax=grid.max(axis=None))}
    sns.heatmap(grid, annot=shown, fmt=f".{digits}f", cmap="rocket_r", ax=ax, cbar_kws={"label": ""}, **limits)
    ax.set(xlabel="", ylabel="")
    ax.set_title(textwrap.fill(label, int(11 * figure.get_size_inches()[0])), fontsize=9)
    ax.tick_params(axis="x", rotation=60)
    ax.tick_params(axis="y", rotation=0)
    return figure


def depth_profile(table: pd.DataFrame, title: str) -> Figure:
    """R_l along the depth (log scale), a line an optimizer; RMSNorms shaded, module kinds along the axis."""
    figure, ax = subplots(figsize=(9, 3.6))
    for optimizer, rows in table.groupby("optimizer", sort=False):
        curve = rows.groupby("index").R.mean()
        curve = curve[curve > 0]
        ax.plot(curve.index, curve, color=COLOURS[optimizer], label=LABELS[optimizer], marker=".", lw=1.2)
    modules = table.drop_duplicates("index").set_index("index")
    for index in modules.index[modules.kind == "norm"]:
        ax.axvspan(index - 0.5, index + 0.5, color="grey", alpha=0.15, lw=0)
    ax.set_xticks(modules.index, [name.replace("blocks.", "") for name in modules.name], rotation=90, fontsize=7)
    ax.set(yscale="log", ylabel="$R_l$ (relative squared error)", title=f"{title}; RMSNorms shaded")
    legend(figure)
    return figure


def stacked_abc(table: pd.DataFrame, title: str) -> Figure:
    """A, B and C of every module as shares of R, a panel an optimizer; C below zero where it takes error away."""
    optimizers = ordered(table.optimizer)
    rows = -(-len(optimizers) // 3)
    figure, axes = subplots(rows, 3, figsize=(10, 2.1 * rows + 0.4), sharex=True, sharey=True, squeeze=False)
    for ax, optimizer in zip(axes.flat, optimizers, strict=False):
        means = with_error(table[table.optimizer == optimizer]).groupby("index")[["R", "A", "B", "C"]].mean()
        bottom = np.zeros(len(means))
        for part, colour in zip("AB", ["#0072B2", "#E69F00"], strict=True):
            ax.bar(means.index, means[part] / means.R, bottom=bottom, color=colour, width=0.9, label=part)
            bottom = bottom + means[part] / means.R
        ax.plot(means.index, means.C / means.R, color="#D55E00", lw=1, marker=".", ms=3, label="C")
        ax.axhline(1, color="black", lw=0.6)
        ax.set_title(LABELS[optimizer])
    for ax in axes[:, 0]:
        ax.set_ylabel("share of $R_l$")
    for ax in axes[-1]:
        ax.set_xlabel("module $l$")
    figure.suptitle(title)
    legend(figure)
    return figure


def scaling_fits(runs: pd.DataFrame, laws: dict) -> Figure:
    """Loss against parameters, a panel an optimizer: full precision (filled) and QAT (open), with the fitted laws."""
    figure, axes = subplots(2, 3, figsize=(9, 5), sharex=True, sharey=True)
    grid = np.geomspace(runs.N.min() / 1.3, runs.N.max() * 1.3, 60)
    for ax, optimizer in zip(axes.flat, LABELS, strict=True):
        rows = runs[runs.optimizer == optimizer]
        for bits, fill, style, label in (
            (16, COLOURS[optimizer], "-", "full precision"),
            (4, "white", "--", "4-bit QAT"),
        ):
            points = rows[rows.bits == bits]
            ax.plot(points.N, points.loss, "o", color=COLOURS[optimizer], mfc=fill, ms=5, label=label)
            if optimizer in laws and bits in laws[optimizer].rho:
                fitted = np.round(laws[optimizer].predict(grid, bits=bits), 4)  # processors differ in later digits
                ax.plot(grid, fitted, style, color=COLOURS[optimizer], lw=1)
        ax.set(title=LABELS[optimizer], xscale="log", yscale="log")
        tidy_log(ax.xaxis, EngFormatter(sep=""))
        tidy_log(ax.yaxis)
    for ax in axes[-1]:
        ax.set_xlabel("parameters $N$")
    for ax in axes[:, 0]:
        ax.set_ylabel("loss (nats per token)")
    legend(figure)
    return figure


def efficiencies(table: pd.DataFrame) -> Figure:
    """rho_4bit and its interval (open: the data do not identify it), the paper's value as a cross."""
    figure, ax = subplots(figsize=(5, 3))
    table = table.round(4).set_index("optimizer").reindex(ordered(table.optimizer)).reset_index()
    for position, row in enumerate(table.itertuples()):
        spread = np.clip([[row.rho - row.low], [row.high - row.rho]], 0, None)  # NaN: no interval, and none drawn
        colour = COLOURS[row.optimizer]
        fill = colour if row.identified else "white"
        ax.errorbar(position, row.rho, yerr=spread, fmt="o", color=colour, mfc=fill, capsize=3)
        ax.plot(position, row.paper, "x", color="grey", label="paper (50M to 1.5B)")
    ax.set_xticks(range(len(table)), [LABELS[name] for name in table.optimizer], rotation=30)
    ax.set_ylabel(r"parameter efficiency $\rho_{4\,bit}$")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles[:1], labels[:1], fontsize=8, loc="outside upper right")
    return figure
