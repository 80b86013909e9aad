"""Figures of differences between optimizers, with their intervals: forests, lines over methods, points.

Ratios to AdamW stand on a logarithmic axis, on which an interval of a difference of logarithms is symmetric. An
optimizer without an interval (fewer than three seeds) is a hollow point.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from beyond_outliers.config.registry import ordered
from beyond_outliers.plots.theme import COLOURS, LABELS, MARKERS, label_y, legend, panels, style_of, tidy_log

LONGEST = 40  # characters of a label below a panel of three abreast; longer ones take two lines


def _bars(ax: Axes, x, y, known: bool, optimizer: str, **ends) -> None:
    """Points of an optimizer with error bars, `ends` as (value, low, high); NaN: none is drawn."""
    arms = {axis: np.nan_to_num(np.abs(np.stack([v - low, high - v]))) for axis, (v, low, high) in ends.items()}
    style = style_of(optimizer) | ({} if known else {"mfc": "white"})
    ax.errorbar(x, y, ms=5, capsize=2, lw=1.2, **arms, **style)


def _forest(ax: Axes, rows: pd.DataFrame, value: str, names: Sequence[str], line: float) -> None:
    """An optimizer a row: its value and interval; a line at that of the reference."""
    for row in rows.to_dict("records"):
        known = bool(np.isfinite(row["low"])) or row[value] == line
        ends = [np.array([row[name]], dtype=float) for name in (value, "low", "high")]
        _bars(ax, ends[0], names.index(row["optimizer"]), known, row["optimizer"], xerr=ends)
    ax.axvline(line, color="grey", lw=1)


def ratio_forest(table: pd.DataFrame, label: str) -> Figure:
    """Ratios to AdamW, one panel a size and one for their mean: an optimizer a row, its ratio and interval."""
    names = ordered(table.get("optimizer", []))
    figure, axes = panels(table.get("size", []), 2.7, 0.32 * len(names) + 1.3, sharex=True, sharey=True)
    for size, ax in axes.items():
        rows = table[table["size"] == size]
        _forest(ax, rows, "ratio", names, 1)
        ax.set(title=f"{size}, n {rows.n.max()}", xscale="log", xlabel=label, ylim=(len(names) - 0.5, -0.5))
        ax.set_yticks(range(len(names)), [LABELS[name] for name in names])
        tidy_log(ax.xaxis)
    return figure


def effect_forest(table: pd.DataFrame, titles: dict[str, tuple[str, str]], reference: str = "adamw") -> Figure:
    """`effects.effects`, a panel a quantity of `titles` (what it is called, its unit): an optimizer a row, how far it
    lies from the reference and its interval. A quantity without rows is named and drawn as not measured yet."""
    names = [name for name in LABELS if name in set(table.optimizer)]
    figure, axes = panels(titles, 3.1, 2.6, columns=3, sharey=True)
    for quantity, ax in axes.items():
        (title, unit), rows = titles[quantity], table[table.quantity == quantity]
        ax.set_title(title)
        if rows.empty:
            ax.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=ax.transAxes, color="grey")
            ax.set_xticks([])
            continue
        factors, least, most = unit != "nats", rows.n.min(), rows.n.max()
        _forest(ax, rows, "effect", names, int(factors))
        ax.set_xscale("log" if factors else "linear")
        pairs = f"{rows.over.iloc[0]}, n {least if least == most else f'{least} to {most}'}"
        label = f"{f'times {LABELS[reference]}' if factors else f'nats above {LABELS[reference]}'}; {pairs}"
        ax.set_xlabel(label if len(label) <= LONGEST else label.replace("; ", "\n"))
        if factors:
            tidy_log(ax.xaxis)
        else:
            ax.xaxis.set_major_locator(MaxNLocator(5))
    first = next(iter(axes.values()))
    first.set_yticks(range(len(names)), [LABELS[name] for name in names])
    first.set_ylim(len(names) - 0.5, -0.5)
    return figure


def method_lines(table: pd.DataFrame, methods: Sequence[str], label: str) -> Figure:
    """Ratios to AdamW over the methods that there are, an optimizer a line: a panel a format and size."""
    if table.empty:
        return panels([])[0]
    methods = [method for method in methods if method in set(table.method)]
    table = table.assign(panel=table.format + ", " + table["size"])
    figure, axes = panels(table.panel, 2.9, 2.4, columns=table["size"].nunique(), sharey=True)
    names = ordered(table.optimizer)
    for panel, ax in axes.items():
        ax.axhline(1, color="grey", lw=1)
        for place, name in enumerate(names):
            rows = table[(table.panel == panel) & (table.optimizer == name)].set_index("method").reindex(methods)
            x = np.arange(len(methods)) + 0.09 * (place - (len(names) - 1) / 2)  # side by side, so that bars are seen
            known = bool(np.isfinite(rows.low).any() or (rows.ratio.dropna() == 1).all())
            _bars(ax, x, rows.ratio, known, name, yerr=(rows.ratio, rows.low, rows.high))
        ax.set(title=panel, yscale="log")
        ax.set_xticks(range(len(methods)), [method.replace(" + ", "\n+ ") for method in methods])
        tidy_log(ax.yaxis)
    label_y(axes.values(), label)
    legend(figure)
    return figure


def centred_points(table: pd.DataFrame, x: str, y: str, xlabel: str, ylabel: str) -> Figure:
    """One point an optimizer, with the intervals of both coordinates (x_half, y_half) and its name."""
    figure, axes = panels([""] if len(table) else [], 4.1, 3.8)
    for ax in axes.values():
        places = (table[[x, y]] / np.ptp(table[[x, y]], axis=0)).to_numpy()
        for place, row in zip(places, table.to_dict("records"), strict=True):
            halves = [np.array([row[f"{name}_half"]]) for name in (x, y)]
            ends = {f"{axis}err": (0, -half, half) for axis, half in zip("xy", halves, strict=True)}
            _bars(ax, row[x], row[y], bool(np.isfinite(halves).all()), row["optimizer"], **ends)
            away = places - place  # where another point stands to the upper right, not over it
            covers = ((away >= 0) & (away <= [0.25, 0.15]) & away.any(1, keepdims=True)).all(1).any()
            spot = {"xytext": (-5, -5), "ha": "right", "va": "top"} if covers else {"xytext": (5, 5)}
            ax.annotate(LABELS[row["optimizer"]], (row[x], row[y]), textcoords="offset points", fontsize=8, **spot)
        ax.axhline(0, color="grey", lw=0.8)
        ax.axvline(0, color="grey", lw=0.8)
        ax.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def rate_paths(table: pd.DataFrame, xlabel: str, ylabel: str, reach: float = 0.25) -> Figure:
    """Loss after quantization (`after`) against loss before (`before`), a path an optimizer from its smallest to its
    largest learning rate (larger points), a panel a size; dotted lines of equal damage.

    Axes end `reach` times the spread of the best paths' ends beyond them: what lies outside is counted in the title.
    """
    figure, axes = panels(table.get("size", []), 4.2, 4.0, columns=3)
    for size, ax in axes.items():
        rows = table[table["size"] == size].sort_values("lr")
        for name in ordered(rows.optimizer):
            path, colour = rows[rows.optimizer == name], COLOURS[name]
            ax.plot(path.before, path.after, color=colour, lw=1, alpha=0.7)
            areas = 12 * np.arange(1, len(path) + 1)
            ax.scatter(path.before, path.after, s=areas, color=colour, marker=MARKERS[name], label=LABELS[name], lw=0)
        low = rows[["before", "after"]].min()
        spread = (rows.groupby("optimizer")[["before", "after"]].min().max() - low).clip(lower=0.1)
        high = np.minimum(rows[["before", "after"]].max(), low + 2.5 * spread) + reach * spread
        inside = (rows[["before", "after"]] <= high).all(axis=1)
        beyond = f" ({sum(~inside)} of {len(rows)} beyond the frame)" if sum(~inside) else ""
        limits = [(low[name] - reach * spread[name], high[name]) for name in ("before", "after")]
        ax.set(xlim=limits[0], ylim=limits[1], xlabel=xlabel, title=f"{size}{beyond}")
        damage = (rows.after - rows.before)[inside]
        for place, level in enumerate(np.unique(np.round(np.quantile(damage, [0.1, 0.5, 0.9]), 2))):
            ax.axline((limits[0][0], limits[0][0] + level), slope=1, color="grey", ls=":", lw=0.8, zorder=0)
            y = max(limits[1][0] + (0.03 + 0.07 * place) * np.ptp(limits[1]), limits[0][0] + level)
            ax.text(y - level, y, f" +{level:.2f}", fontsize=7, color="grey", ha="left", va="center")
    label_y(axes.values(), ylabel)
    if axes:
        legend(figure)
    return figure
