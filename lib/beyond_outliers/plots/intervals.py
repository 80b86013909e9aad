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

from beyond_outliers.config.optimizers import ordered
from beyond_outliers.plots.theme import COLOURS, LABELS, MARKERS, label_y, legend, panels, subplots, tidy_log


def _style(optimizer: str, known: bool = True) -> dict:
    fill = COLOURS[optimizer] if known else "white"
    return {"color": COLOURS[optimizer], "marker": MARKERS[optimizer], "mfc": fill, "ms": 5, "capsize": 2, "lw": 1.2}


def _ends(value, low, high) -> np.ndarray:
    """Lengths of both arms (2, n) of an error bar; none where there is no interval."""
    return np.nan_to_num(np.abs(np.stack([np.asarray(value) - low, np.asarray(high) - value]).astype(float)))


def _nothing(message: str) -> Figure:
    """A figure that says that there is nothing to be drawn yet."""
    figure, ax = subplots(figsize=(6, 1.2))
    ax.text(0.5, 0.5, message, ha="center", va="center")
    ax.set_axis_off()
    return figure


def ratio_forest(table: pd.DataFrame, label: str) -> Figure:
    """`relative.ratios`, one panel a size and one for their mean: an optimizer a row, its ratio and interval."""
    if table.empty:
        return _nothing("no size has a positive damage of AdamW and of another optimizer yet")
    names = ordered(table.optimizer)
    figure, axes = panels(table["size"], width=2.7, height=0.32 * len(names) + 1.3, sharex=True, sharey=True)
    for size, ax in axes.items():
        own = table[table["size"] == size].set_index("optimizer")
        for position, name in enumerate(names):
            if name in own.index:
                row = own.loc[name]
                style = _style(name, np.isfinite(row.low) or row.ratio == 1)
                ax.errorbar(row.ratio, position, xerr=_ends([row.ratio], row.low, row.high), ls="none", **style)
        ax.axvline(1, color="grey", lw=1)
        ax.set(title=f"{size}, n {own.n.max() if len(own) else 0}", xscale="log", xlabel=label)
        ax.set_yticks(range(len(names)), [LABELS[name] for name in names])
    first = next(iter(axes.values()))
    first.invert_yaxis()
    for ax in axes.values():
        tidy_log(ax.xaxis)
    return figure


LONGEST = 40  # characters of a label below a panel of three abreast; longer ones take two lines


def effect_forest(table: pd.DataFrame, titles: dict[str, tuple[str, str]], reference: str = "adamw") -> Figure:
    """`effects.effects`, a panel a quantity of `titles` (what it is called, its unit): an optimizer a row, how far it
    lies from the reference and its interval. A quantity without rows is named and drawn as not measured yet."""
    names = [name for name in LABELS if name in set(table.optimizer)]
    figure, axes = subplots(2, 3, figsize=(10.5, 5.2), sharey=True)
    for ax, (quantity, (title, unit)) in zip(axes.flat, titles.items(), strict=True):
        own = table[table.quantity == quantity].set_index("optimizer")
        factors = unit != "nats"
        for position, name in enumerate(names):
            if name in own.index:
                row = own.loc[name]
                style = _style(name, np.isfinite(row.low))
                ax.errorbar(row.effect, position, xerr=_ends([row.effect], row.low, row.high), ls="none", **style)
        ax.set_title(title)
        if own.empty:
            ax.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=ax.transAxes, color="grey")
            ax.set_xticks([])
            continue
        ax.axvline(1 if factors else 0, color="grey", lw=1)
        ax.set_xscale("log" if factors else "linear")
        label = f"{f'times {LABELS[reference]}' if factors else f'nats above {LABELS[reference]}'}; {_pairs(own)}"
        ax.set_xlabel(label if len(label) <= LONGEST else label.replace("; ", "\n"))
        if factors:
            tidy_log(ax.xaxis)
        else:
            ax.xaxis.set_major_locator(MaxNLocator(5))
    axes[0, 0].set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _pairs(own: pd.DataFrame) -> str:
    """ "0.08M and 0.16M, n 6", or "n 8 to 9": pairs an optimizer."""
    low, high = own.n.min(), own.n.max()
    return f"{own.over.iloc[0]}, n {low if low == high else f'{low} to {high}'}"


def method_lines(table: pd.DataFrame, methods: Sequence[str], label: str) -> Figure:
    """Ratios to AdamW over the methods that there are, an optimizer a line: panels a size (column) and format (row)."""
    if table.empty:
        return _nothing("no size has a positive damage of AdamW and of another optimizer yet")
    methods = [method for method in methods if method in set(table.method)]
    sizes, formats = (list(dict.fromkeys(table[column])) for column in ("size", "format"))
    shape = (len(formats), len(sizes))
    size = (2.9 * shape[1] + 1.4, 2.4 * shape[0] + 0.5)
    figure, axes = subplots(*shape, figsize=size, sharex=True, sharey=True, squeeze=False)
    names = ordered(table.optimizer)
    for (row, format), (column, at) in ((r, c) for r in enumerate(formats) for c in enumerate(sizes)):
        ax, own = axes[row, column], table[(table.format == format) & (table["size"] == at)]
        ax.axhline(1, color="grey", lw=1)
        for place, name in enumerate(names):
            line = own[own.optimizer == name].set_index("method").reindex(methods).reset_index()
            x = np.arange(len(methods)) + 0.09 * (place - (len(names) - 1) / 2)  # side by side, so that bars are seen
            known = bool(np.isfinite(line.low).any() or (line.ratio.dropna() == 1).all())
            ends = _ends(line.ratio, line.low, line.high)
            ax.errorbar(x, line.ratio, yerr=ends, label=LABELS[name], **_style(name, known))
        ax.set(title=f"{format}, {at}", yscale="log")
        ax.set_xticks(range(len(methods)), [method.replace(" + ", "\n+ ") for method in methods])
    for ax in axes.flat:
        tidy_log(ax.yaxis)
    label_y(axes[:, 0], label)
    legend(figure)
    return figure


def centred_points(table: pd.DataFrame, x: str, y: str, xlabel: str, ylabel: str) -> Figure:
    """`relative.centred`: one point an optimizer, with the intervals of both coordinates, and its name beside it."""
    if table.empty:
        return _nothing("no size has every optimizer yet")
    figure, ax = subplots(figsize=(5.2, 3.8))
    places = (table[[x, y]] / (table[[x, y]].max() - table[[x, y]].min())).reset_index(drop=True)
    for (_, place), row in zip(places.iterrows(), table.to_dict("records"), strict=True):
        spread = {f"{axis}err": np.nan_to_num(row[f"{name}_half"]) for axis, name in (("x", x), ("y", y))}
        known = np.isfinite(row[f"{x}_half"]) and np.isfinite(row[f"{y}_half"])
        ax.errorbar(row[x], row[y], ls="none", **spread, **_style(row["optimizer"], known))
        other = (places - place).drop(index=place.name)  # where another point stands to the upper right, not over it
        covers = (other[x].between(0, 0.25) & other[y].between(0, 0.15)).any()
        beside = {"xytext": (-5, -5), "ha": "right", "va": "top"} if covers else {"xytext": (5, 5)}
        ax.annotate(LABELS[row["optimizer"]], (row[x], row[y]), textcoords="offset points", fontsize=8, **beside)
    for line in (ax.axhline, ax.axvline):
        line(0, color="grey", lw=0.8)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def rate_paths(table: pd.DataFrame, xlabel: str, ylabel: str, reach: float = 0.25) -> Figure:
    """Loss after quantization (`after`) against loss before (`before`), a path an optimizer from its smallest to its
    largest learning rate (larger points), a panel a size; dotted lines of equal damage.

    Axes end `reach` times the spread of the best paths' ends beyond them: what lies outside is counted in the title.
    """
    if table.empty:
        return _nothing("no learning rate has been tried yet")
    figure, axes = panels(table["size"], width=4.2, height=4.0, columns=3)
    for size, ax in axes.items():
        own = table[table["size"] == size].sort_values("lr")
        for name in ordered(own.optimizer):
            path = own[own.optimizer == name]
            ax.plot(path.before, path.after, color=COLOURS[name], lw=1, alpha=0.7)
            areas = 12 * np.arange(1, len(path) + 1)
            style = {"color": COLOURS[name], "marker": MARKERS[name], "label": LABELS[name], "lw": 0}
            ax.scatter(path.before, path.after, s=areas, **style)
        limits = [_frame(own.groupby("optimizer")[column].min(), own[column], reach) for column in ("before", "after")]
        outside = sum(~(own.before.le(limits[0][1]) & own.after.le(limits[1][1])))
        beyond = f" ({outside} of {len(own)} beyond the frame)" if outside else ""
        ax.set(xlim=limits[0], ylim=limits[1], xlabel=xlabel, title=f"{size}{beyond}")
        _equal_damage(ax, own)
    label_y(axes.values(), ylabel)
    legend(figure)
    return figure


def _frame(best: pd.Series, values: pd.Series, reach: float) -> tuple[float, float]:
    """From a little below the lowest value to the highest, at most 2.5 times the spread of the optimizers' best."""
    low = values.min()
    spread = max(best.max() - low, 0.1)
    high = min(values.max(), low + 2.5 * spread)
    return low - reach * spread, high + reach * spread


def _equal_damage(ax: Axes, own: pd.DataFrame) -> None:
    """Three lines along which `after` - `before` is the same, with the damage written at their lower end."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    damage = own.after - own.before
    seen = damage[own.before.between(left, right) & own.after.between(bottom, top)]
    for place, level in enumerate(np.unique(np.round(np.quantile(seen, [0.1, 0.5, 0.9]), 2))):
        ax.plot([left, right], [left + level, right + level], color="grey", ls=":", lw=0.8, zorder=0)
        y = max(bottom + (0.03 + 0.07 * place) * (top - bottom), left + level)  # one above the other
        ax.text(y - level, y, f" +{level:.2f}", fontsize=7, color="grey", ha="left", va="center")


def along_training(table: pd.DataFrame, y: str, ylabel: str, decay_from: float) -> Figure:
    """y against the share of the run that is done, an optimizer a line (mean over seeds, 95 % interval where there are
    three), a panel a size; the decay of the learning rate shaded."""
    if table.empty:
        return _nothing("no run has been followed along its training yet")
    figure, axes = panels(table["size"], width=3.8, height=3.2, sharey=True)
    for (size, name), own in table.groupby(["size", "optimizer"], sort=False):
        curve = own.set_index("share")
        axes[size].plot(curve.index, curve[y], color=COLOURS[name], label=LABELS[name], lw=1.4)
        axes[size].fill_between(curve.index, curve.low, curve.high, color=COLOURS[name], alpha=0.12, lw=0)
    for size, ax in axes.items():
        ax.axvspan(decay_from, 1, color="grey", alpha=0.12, lw=0)
        ax.set(title=f"{size}; decay shaded", xlabel="share of the run", ylim=(0, None))
    label_y(axes.values(), ylabel)
    legend(figure)
    return figure
