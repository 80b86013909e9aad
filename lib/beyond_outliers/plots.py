"""One theme, one function a figure kind. A figure function takes a tidy table and returns a matplotlib figure.

`save` writes it as PDF and PNG below figures/SCALE, named after notebook and figure.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from beyond_outliers import paths

LABELS = {"adamw": "AdamW", "muon": "Muon", "psgd": "PSGD", "scion": "Scion", "shampoo": "Shampoo", "soap": "SOAP"}
# Okabe-Ito colours: told apart with any colour vision, one an optimizer in every figure
COLOURS = dict(zip(LABELS, ["#000000", "#D55E00", "#CC79A7", "#E69F00", "#0072B2", "#009E73"], strict=True))
MARKERS = dict(zip(LABELS, ["o", "s", "D", "^", "v", "P"], strict=True))


def set_theme() -> None:
    sns.set_theme(context="paper", style="ticks", font_scale=1.1)
    plt.rcParams |= {
        "figure.dpi": 110,
        "savefig.dpi": 160,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "pdf.fonttype": 42,
    }


def save(figure: plt.Figure, scale: str, name: str) -> plt.Figure:
    """figures/SCALE/NAME.pdf and .png; returns the figure, so that a cell can end with it. Closed: shown once."""
    folder: Path = paths.FIGURES / scale
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})  # no date: same data, same file
    figure.savefig(folder / f"{name}.png")
    plt.close(figure)
    return figure


def _panels(values, width: float = 3.6, height: float = 3.0, **options):
    """One row of panels, one a value; returns (figure, {value: axes})."""
    values = list(dict.fromkeys(values))
    figure, axes = plt.subplots(1, len(values), figsize=(width * len(values) + 1.1, height), squeeze=False, **options)
    return figure, dict(zip(values, axes[0], strict=True))


def _legend(figure: plt.Figure, axes: plt.Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside right center")


def optimizer_lines(
    table: pd.DataFrame, x: str, y: str, panel: str, xlabel: str, ylabel: str, logx: bool = False, logy: bool = False
) -> plt.Figure:
    """y against x, a line an optimizer (mean over seeds, band from lowest to highest), a panel a value of `panel`."""
    figure, axes = _panels(table[panel], sharey=True)
    for (value, optimizer), rows in table.groupby([panel, "optimizer"], sort=False):
        curve = rows.groupby(x)[y].agg(["mean", "min", "max"])
        ax, colour = axes[value], COLOURS[optimizer]
        ax.plot(curve.index, curve["mean"], color=colour, label=LABELS[optimizer], lw=1.4)
        ax.fill_between(curve.index, curve["min"], curve["max"], color=colour, alpha=0.15, lw=0)
    for value, ax in axes.items():
        ax.set(title=str(value), xlabel=xlabel, xscale="log" if logx else "linear", yscale="log" if logy else "linear")
    next(iter(axes.values())).set_ylabel(ylabel)
    _legend(figure, ax)
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
) -> plt.Figure:
    """A point a run, coloured by optimizer; `error` a column of standard errors of y; `joined` draws lines along x."""
    figure, axes = _panels(table[panel], sharey=True)
    for (value, optimizer), rows in table.sort_values(x).groupby([panel, "optimizer"], sort=False):
        style = {"color": COLOURS[optimizer], "marker": MARKERS[optimizer], "label": LABELS[optimizer], "ms": 5}
        bars = rows[error] if error else None
        axes[value].errorbar(rows[x], rows[y], yerr=bars, ls="-" if joined else "none", lw=1, capsize=2, **style)
    for value, ax in axes.items():
        ax.set(title=str(value), xlabel=xlabel, xscale="log" if logx else "linear", yscale="log" if logy else "linear")
    next(iter(axes.values())).set_ylabel(ylabel)
    _legend(figure, ax)
    return figure


def optimizer_bars(
    table: pd.DataFrame, y: str, panel: str, ylabel: str, error: str | None = None, floor: float | None = None
) -> plt.Figure:
    """A bar an optimizer (mean over rows), a panel a value of `panel`; `floor` draws a line, for instance chance.

    The axis starts near the smallest value when the values are far from zero, and says so in its label.
    """
    figure, axes = _panels(table[panel], width=2.6, sharey=True)
    means = table.groupby([panel, "optimizer"])[y].mean()
    for value, ax in axes.items():
        rows = table[table[panel] == value]
        names = [name for name in LABELS if name in set(rows.optimizer)]
        heights = [means[value, name] for name in names]
        errors = [np.sqrt((rows[rows.optimizer == n][error] ** 2).mean()) for n in names] if error else None
        labels = [LABELS[name] for name in names]
        ax.bar(labels, heights, yerr=errors, color=[COLOURS[name] for name in names], capsize=2, width=0.7)
        if floor is not None:
            ax.axhline(floor, color="grey", ls=":", lw=1)
        ax.set_title(str(value))
        ax.tick_params(axis="x", rotation=60)
        ax.grid(axis="x", visible=False)
    low, high = means.min(), means.max()
    first = next(iter(axes.values()))
    first.set_ylabel(ylabel)
    if low > 0 and high - low < low / 2:
        first.set_ylim(low - (high - low), None)
        first.set_ylabel(f"{ylabel} (axis cut)")
    return figure


def heatmap(table: pd.DataFrame, row: str, column: str, value: str, label: str, digits: int = 2) -> plt.Figure:
    """Mean of `value` over every (row, column), written into the cells; rows and columns in order of appearance."""
    grid = table.pivot_table(index=row, columns=column, values=value, sort=False)
    grid.index = [LABELS.get(name, name) for name in grid.index]
    figure, ax = plt.subplots(figsize=(1.6 + 0.72 * grid.shape[1], 1.2 + 0.36 * grid.shape[0]))
    sns.heatmap(grid, annot=True, fmt=f".{digits}f", cmap="rocket_r", ax=ax, cbar_kws={"label": label}, robust=True)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(axis="x", rotation=60)
    ax.tick_params(axis="y", rotation=0)
    return figure
