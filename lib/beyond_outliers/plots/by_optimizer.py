"""Figures that compare optimizers: curves, bars, dumbbells, heatmaps, profiles along the depth.

A figure function takes a tidy table and returns a matplotlib figure.
"""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from beyond_outliers.claims.readings import with_error
from beyond_outliers.config.loading import is_own
from beyond_outliers.config.registry import ordered
from beyond_outliers.plots.theme import COLOURS, LABELS, MARKERS, label_y, legend, panels, style_of, subplots, tidy_log


def optimizer_lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    panel: str,
    xlabel: str,
    ylabel: str,
    band: tuple[str, str] | None = None,
    seeds: bool = False,
    logx: bool = False,
    logy: bool = False,
) -> Figure:
    """y against x, a line an optimizer, a panel a value of `panel`: the mean over seeds with a band from lowest to
    highest, or between the columns of `band`; seeds: a line a seed instead. Ticks of x read 200k where it is tokens."""
    figure, axes = panels(table.get(panel, []), sharey=True)
    for (value, name), rows in table.groupby([panel, "optimizer"], sort=False) if axes else ():
        for _, line in rows.groupby("seed") if seeds else [(0, rows)]:
            low, high = band or (y, y)
            curve = line.groupby(x).agg(mean=(y, "mean"), low=(low, "min"), high=(high, "max"))
            every = 1 if seeds else max(1, len(curve) // 8)
            axes[value].plot(curve.index, curve["mean"], lw=1.4, ms=4, markevery=every, **style_of(name))
            axes[value].fill_between(curve.index, curve.low, curve.high, color=COLOURS[name], alpha=0.12, lw=0)
    form = EngFormatter(sep="") if x == "tokens" else None
    for value, ax in axes.items():
        ax.set(title=str(value), xlabel=xlabel, xscale="log" if logx else "linear", yscale="log" if logy else "linear")
        if form:
            ax.xaxis.set_major_formatter(form)
        for axis, log in ((ax.xaxis, logx), (ax.yaxis, logy)):
            if log:
                tidy_log(axis, form if axis is ax.xaxis else None)
    label_y(axes.values(), ylabel)
    if axes:
        legend(figure)
    return figure


def along_training(table: pd.DataFrame, y: str, ylabel: str, decay_from: float) -> Figure:
    """y against the share of the run that is done, with its interval, a panel a size; the decay of the rate shaded."""
    figure = optimizer_lines(table, "share", y, "size", "share of the run (decay shaded)", ylabel, band=("low", "high"))
    for ax in figure.axes if len(table) else ():
        ax.axvspan(decay_from, 1, color="grey", alpha=0.12, lw=0)
        ax.set_ylim(0, None)
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
        ax.set(title=str(value), xlim=(-0.6, len(names) - 0.4))
        ax.set_xticks(range(len(names)), [LABELS[name] for name in names], rotation=60)
        ax.grid(axis="x", visible=False)
    label_y(axes.values(), ylabel)
    return figure


def dumbbells(table: pd.DataFrame, panel: str, label: str) -> Figure:
    """From `before` to `after`, a row an optimizer, lowest `after` first, a panel a value of `panel`."""
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
    import seaborn as sns

    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; valid: {', '.join(NORMS)}")
    grid = table.pivot_table(index=row, columns=column, values=value, sort=False)
    for axis in (0, 1):
        names = list(grid.axes[axis])
        if any(name in LABELS for name in names) and all(name in LABELS or is_own(name) for name in names):
            grid = grid.reindex(ordered(names), axis=axis).rename(LABELS.__getitem__, axis=axis)
    figure, ax = subplots(figsize=(1.6 + 0.72 * grid.shape[1], 1.2 + 0.36 * grid.shape[0]))
    make_norm = NORMS[norm]
    limits: dict = {"robust": True}
    if make_norm is not None:
        limits = {"norm": make_norm(vmin=grid.min(axis=None), vmax=grid.max(axis=None))}
    shown = grid.round(digits) + 0.0  # no -0.00
    sns.heatmap(grid, annot=shown, fmt=f".{digits}f", cmap="rocket_r", ax=ax, cbar_kws={"label": ""}, **limits)
    ax.set(xlabel="", ylabel="")
    ax.set_title(textwrap.fill(label, int(11 * figure.get_size_inches()[0])), fontsize=9)
    ax.tick_params(axis="x", rotation=60)
    ax.tick_params(axis="y", rotation=0)
    return figure


def depth_profile(table: pd.DataFrame, title: str) -> Figure:
    """R_l along the depth (log scale), a line an optimizer; RMSNorms shaded, names of modules along the axis."""
    figure, ax = subplots(figsize=(9, 3.6))
    for optimizer, rows in with_error(table).groupby("optimizer", sort=False):
        curve = rows.groupby("index").R.mean()
        ax.plot(curve.index, curve, lw=1.2, ms=4, **style_of(str(optimizer)))
    modules = table.drop_duplicates("index").set_index("index")
    for index in modules.index[modules.kind == "norm"]:
        ax.axvspan(index - 0.5, index + 0.5, color="grey", alpha=0.15, lw=0)
    ax.set_xticks(modules.index, [name.replace("blocks.", "") for name in modules.name], rotation=90, fontsize=7)
    ax.set(yscale="log", ylabel="$R_l$ (relative squared error)", title=f"{title}; RMSNorms shaded")
    legend(figure)
    return figure


def stacked_abc(table: pd.DataFrame, title: str) -> Figure:
    """A, B and C of every module as shares of R, a panel an optimizer; C below zero where it takes error away."""
    figure, axes = panels(ordered(table.optimizer), 3.0, 2.1, columns=3, sharex=True, sharey=True)
    for optimizer, ax in axes.items():
        means = with_error(table[table.optimizer == optimizer]).groupby("index")[["R", "A", "B", "C"]].mean()
        shares = means.div(means.R, axis=0)
        ax.bar(shares.index, shares.A, color="#0072B2", width=0.9, label="A")
        ax.bar(shares.index, shares.B, bottom=shares.A, color="#E69F00", width=0.9, label="B")
        ax.plot(shares.index, shares.C, color="#D55E00", lw=1, marker=".", ms=3, label="C")
        ax.axhline(1, color="black", lw=0.6)
        ax.set(title=LABELS[optimizer], xlabel="module $l$")
    label_y(axes.values(), "share of $R_l$")
    figure.suptitle(title)
    legend(figure)
    return figure


def scaling_fits(runs: pd.DataFrame, laws: dict) -> Figure:
    """Loss against parameters, a panel an optimizer: full precision (filled) and QAT (open), with the fitted laws."""
    figure, axes = panels(ordered(runs.optimizer), 2.7, 2.5, columns=3, sharex=True, sharey=True)
    grid = np.geomspace(runs.N.min() / 1.3, runs.N.max() * 1.3, 60)
    for optimizer, ax in axes.items():
        colour = COLOURS[optimizer]
        for bits, fill, line, label in ((16, colour, "-", "full precision"), (4, "white", "--", "4-bit QAT")):
            points = runs[(runs.optimizer == optimizer) & (runs.bits == bits)]
            ax.plot(points.N, points.loss, "o", color=colour, mfc=fill, ms=5, label=label)
            if optimizer in laws and bits in laws[optimizer].rho:
                fitted = np.round(laws[optimizer].predict(grid, bits=bits), 4)  # processors differ in later digits
                ax.plot(grid, fitted, line, color=colour, lw=1)
        ax.set(title=LABELS[optimizer], xscale="log", yscale="log", xlabel="parameters $N$")
        tidy_log(ax.xaxis, EngFormatter(sep=""))
        tidy_log(ax.yaxis)
    label_y(axes.values(), "loss (nats per token)")
    legend(figure)
    return figure


def efficiencies(table: pd.DataFrame) -> Figure:
    """rho_4bit and its interval (open: the data do not identify it), the paper's value as a cross."""
    figure, ax = subplots(figsize=(5, 3))
    table = table.round(4).set_index("optimizer").reindex(ordered(table.optimizer)).reset_index()
    for position, row in enumerate(table.itertuples()):
        spread = np.clip([[row.rho - row.low], [row.high - row.rho]], 0, None)  # NaN: no interval, and none drawn
        style = style_of(row.optimizer) | {"label": None}
        fill = COLOURS[row.optimizer] if row.identified else "white"
        ax.errorbar(position, row.rho, yerr=spread, mfc=fill, capsize=3, **style)
        ax.plot(position, row.paper, "x", color="grey", label="" if position else "paper (50M to 1.5B)")
    ax.set_xticks(range(len(table)), [LABELS[name] for name in table.optimizer], rotation=30)
    ax.set_ylabel(r"parameter efficiency $\rho_{4\,bit}$")
    legend(figure)
    return figure
