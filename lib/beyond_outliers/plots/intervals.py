"""Figures of estimates with their intervals: forests, lines over methods, points, and what goes with what.

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
from beyond_outliers.plots.theme import (
    COLOURS,
    GUIDE,
    LABELS,
    finish,
    name_lines,
    name_ticks,
    panels,
    style_of,
    subplots,
    tidy_log,
)

REACH = 2.5
LONGEST = 32  # characters of a label below a panel; longer ones take two lines
CANDIDATES = {  # of `readings`, as axes name them
    "mmr": "MMR (without down)",
    "mmr_all": "MMR (all inputs)",
    "kurtosis": "kurtosis",
    "mean_B": "mean $B$",
    "R_L": "$R_L$",
    "mean_gain": "mean gain",
    "noise_gain": "noise gain",
    "expected_error": "expected error",
}


def _bars(ax: Axes, x, y, optimizer: str, known=True, **ends) -> None:
    """Points of an optimizer with error bars, `ends` as (value, low, high); NaN: none is drawn. Hollow: not known."""
    style = style_of(optimizer) | ({} if known else {"mfc": "white"})
    style |= {axis: np.nan_to_num(np.abs([v - low, high - v])) for axis, (v, low, high) in ends.items()}
    ax.errorbar(x, y, ms=5, capsize=2, lw=1.2, **style)


def _forest(ax: Axes, rows: pd.DataFrame, value: str, names: Sequence[str], line: float) -> None:
    """An optimizer a row: its value and interval; a line at that of the reference: 0, or 1 on an axis of ratios."""
    for row in rows.itertuples():
        at = getattr(row, value)
        known = np.isfinite(row.low) or at == line
        _bars(ax, at, names.index(row.optimizer), row.optimizer, known, xerr=np.array([[at], [row.low], [row.high]]))
    ax.axvline(line, **GUIDE)
    ax.set(xscale="log" if line else "linear", ylim=(len(names) - 0.5, -0.5))
    name_ticks(ax.yaxis, names)
    if line:
        tidy_log(ax.xaxis)


def ratio_forest(table: pd.DataFrame, label: str) -> Figure:
    """Ratios to AdamW, one panel a size and one for their mean: an optimizer a row, its ratio and interval."""
    names = ordered(table.get("optimizer", []))
    figure, axes = panels(table.get("size", []), height=0.25 * len(names) + 0.6, xlabel=label, sharex=True, sharey=True)
    for size, ax in axes.items():
        rows = table[table["size"] == size]
        _forest(ax, rows, "ratio", names, 1)
        ax.set_title(f"{size}, n {rows.n.max()}")
    return figure


def effect_forest(table: pd.DataFrame, titles: dict[str, tuple[str, str]]) -> Figure:
    """`decisions.effects`, a panel a quantity of `titles` (what it is called, its unit): an optimizer a row, how far it
    lies from AdamW and its interval. Quantities without rows have no panel and are named below."""
    names = ordered(table.optimizer)
    figure, axes = panels([quantity for quantity in titles if quantity in set(table.quantity)], sharey=True)
    if missing := ", ".join(titles[quantity][0] for quantity in titles if quantity not in axes):
        figure.supxlabel(f"not measured yet: {missing}", fontsize=9)
    for quantity, ax in axes.items():
        (title, unit), rows = titles[quantity], table[table.quantity == quantity]
        ax.set_title(title, fontsize=9)
        factors, least, most = unit != "nats", rows.n.min(), rows.n.max()
        pairs = f"{rows.over.iloc[0]}, n {least if least == most else f'{least} to {most}'}"
        label = f"{'times' if factors else 'nats above'} AdamW; {pairs}"
        ax.set_xlabel(label if len(label) <= LONGEST else label.replace("; ", "\n"), fontsize=9)
        _forest(ax, rows, "effect", names, int(factors))
        if not factors:
            ax.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def efficiency_points(table: pd.DataFrame) -> Figure:
    """rho_4bit and its interval (open: the data do not identify it), the paper's value as a cross."""
    figure, ax = subplots(figsize=(5, 3))
    table = table.round(4).set_index("optimizer", drop=False).loc[ordered(table.optimizer)]
    for place, row in enumerate(table.itertuples()):
        spread = np.clip([[row.rho - row.low], [row.high - row.rho]], 0, None)  # NaN: no interval, and none drawn
        style = style_of(row.optimizer) | {"mfc": COLOURS[row.optimizer] if row.identified else "white"}
        ax.errorbar(place, row.rho, yerr=spread, capsize=3, **style)
        ax.plot(place, row.paper, "x", color="grey")
    ax.annotate("the paper's", (0, table.paper.iloc[0]), (7, -3), textcoords="offset points", color="grey", fontsize=9)
    name_ticks(ax.xaxis, table.optimizer)
    ax.set_ylabel(r"parameter efficiency $\rho_{4\,bit}$")
    return figure


def rank_lines(table: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Places of the optimizers by the mean of val_loss under every method, lowest on top: a panel a format.

    Means are over the sizes at which every method of the format has been measured. Names stand at the lines' ends.
    """
    wide = table.pivot_table(index=["format", "size", "optimizer"], columns="method", values="val_loss", sort=False)
    figure, axes = panels(wide.index.get_level_values("format"), 2.9, 2.6)
    for format, ax in axes.items():
        rows = wide.loc[format].dropna(axis=1, how="all").dropna()
        means = rows.groupby("optimizer").mean()[[method for method in methods if method in rows]]
        for optimizer, places in means.rank().iterrows():
            ax.plot(range(len(places)), places, ms=7, **style_of(str(optimizer)))
        ax.set_xticks(range(means.shape[1]), [method.replace(" + ", "\n+ ") for method in means], fontsize=8)
        ax.set(ylim=(len(means) + 0.5, 0.5), yticks=range(1, len(means) + 1))
        name_lines(ax)
    return finish(figure, "place by loss after rounding")


def centred_points(table: pd.DataFrame, x: str, y: str, xlabel: str, ylabel: str) -> Figure:
    """One point an optimizer, with the intervals of both coordinates (x_half, y_half) and its name."""
    figure, axes = panels([""] if len(table) else [], 4.1, 3.8, xlabel=xlabel)
    for ax in axes.values():
        places = (table[[x, y]] / np.ptp(table[[x, y]], axis=0)).to_numpy()
        for place, row in zip(places, table.to_dict("records"), strict=True):
            halves = np.array([[row[f"{name}_half"]] for name in (x, y)])
            ends = {f"{axis}err": (0, -half, half) for axis, half in zip("xy", halves, strict=True)}
            name, at = row["optimizer"], (row[x], row[y])
            _bars(ax, *at, name, np.isfinite(halves).all(), **ends)
            away = places - place  # where another point stands to the upper right, not over it
            covers = ((away >= 0) & (away <= [0.25, 0.15]) & away.any(1, keepdims=True)).all(1).any()
            spot = {"xytext": (-5, -5), "ha": "right", "va": "top"} if covers else {"xytext": (5, 5)}
            ax.annotate(LABELS[name], at, textcoords="offset points", fontsize=8, **spot)
        ax.axhline(0, **GUIDE)
        ax.axvline(0, **GUIDE)
        ax.set_ylabel(ylabel)
    return figure


def rate_paths(table: pd.DataFrame, xlabel: str, ylabel: str) -> Figure:
    """Loss after quantization (`after`) against loss before (`before`), a path an optimizer from its smallest to its
    largest learning rate (larger points), a panel a size; dotted lines of equal damage.

    Axes end REACH times the spread of the best paths' ends beyond the lowest: the title counts what lies outside.
    """
    figure, axes = panels(table.get("size", []), height=2.8, xlabel=xlabel)
    for (size, name), path in table.sort_values("lr").groupby(["size", "optimizer"]) if axes else ():
        style = style_of(str(name)) | {"s": 8 * np.arange(1, len(path) + 1), "lw": 0}
        axes[size].plot(path.before, path.after, color=COLOURS[name], lw=1, alpha=0.7)
        axes[size].scatter(path.before, path.after, **style)
    for size, ax in axes.items():
        rows = table.loc[table["size"] == size, ["optimizer", "before", "after"]].set_index("optimizer")
        spread = (rows.groupby("optimizer").min().max() - rows.min()).clip(lower=0.1)
        high = np.minimum(rows.max(), rows.min() + REACH * spread) + 0.25 * spread
        low, outside = rows.min() - 0.25 * spread, (rows > high).any(axis=1)
        beyond = f" ({sum(outside)} of {len(rows)} beyond the frame)" if any(outside) else ""
        ax.set(xlim=(low.before, high.before), ylim=(low.after, high.after))
        ax.set_title(f"{size}{beyond}", fontsize=9)
        x, y = np.linspace(low, high, 50).T
        levels = np.unique(rows.eval("after - before")[~outside].quantile([0.1, 0.5, 0.9]).round(2))
        lines = ax.contour(x, y, y[:, None] - x, levels, colors="grey", linestyles=":", linewidths=0.8, zorder=0)
        left = np.maximum(x[4], y[4] - levels)  # where a label is, near the frame and away from the points
        ax.clabel(lines, fmt="+%.2f", fontsize=7, manual=list(zip(left, left + levels, strict=True)))
    return finish(figure, ylabel, legend=True)


def candidate_scatter(table: pd.DataFrame, correlations: pd.DataFrame, target: str, label: str) -> Figure:
    """The target against every candidate, a panel each (log axis), Pearson and interval in the title; large points are
    large models.
    """
    found = correlations[correlations.target == target].set_index("candidate")
    figure, axes = panels(found.index, sharey=True)
    sizes = list(dict.fromkeys(table["size"]))
    areas = table["size"].map({size: 14 + 14 * place for place, size in enumerate(sizes)})
    for (candidate, ax), r in zip(axes.items(), found.itertuples(), strict=True):
        for optimizer, points in table.groupby("optimizer", sort=False):
            style = style_of(str(optimizer)) | {"s": areas[points.index], "alpha": 0.85, "lw": 0}
            ax.scatter(points[candidate], points[target], **style)
        ax.set_title(f"r {r.pearson:.2f} [{r.pearson_low:.2f}, {r.pearson_high:.2f}], n {r.n}", fontsize=9)
        ax.set(xscale="log", xlabel=CANDIDATES[candidate])
        tidy_log(ax.xaxis)
    for place, size in enumerate(sizes if axes else ()):
        figure.axes[0].scatter([], [], s=14 + 14 * place, color="grey", lw=0, label=size)
    return finish(figure, label, legend=True)
