"""One theme, one function a figure kind. A figure function takes a tidy table and returns a matplotlib figure.

`save` writes it as PDF and PNG below figures/SCALE, named after notebook and figure.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from beyond_outliers import paths

LABELS = {"adamw": "AdamW", "muon": "Muon", "psgd": "PSGD", "scion": "Scion", "shampoo": "Shampoo", "soap": "SOAP"}
# Okabe-Ito colours: told apart with any colour vision, one an optimizer in every figure
COLOURS = dict(zip(LABELS, ["#000000", "#D55E00", "#CC79A7", "#E69F00", "#0072B2", "#009E73"], strict=True))
MARKERS = dict(zip(LABELS, ["o", "s", "D", "^", "v", "P"], strict=True))
CANDIDATES = {  # of `predictors`, as axes name them
    "mmr": "MMR (without down)",
    "mmr_all": "MMR (all inputs)",
    "kurtosis": "kurtosis",
    "mean_B": "mean $B$",
    "R_L": "$R_L$",
    "mean_gain": "mean gain",
    "noise_gain": "noise gain",
    "expected_error": "expected error",
}


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


def _panels(values, width: float = 3.6, height: float = 3.0, columns: int = 4, **options):
    """Panels, one a value, at most `columns` side by side; returns (figure, {value: axes})."""
    values = list(dict.fromkeys(values))
    columns = min(columns, len(values))
    rows = -(-len(values) // columns)
    size = (width * columns + 1.1, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    for ax in axes.flat[len(values) :]:
        ax.set_visible(False)
    return figure, dict(zip(values, axes.flat, strict=False))


def _tidy_log(axis, format=None) -> None:
    """Tick labels of a logarithmic axis that do not overlap: round steps within a decade, 1, 2, 5 within two."""
    low, high = axis.get_view_interval()
    span = high / max(low, 1e-300)
    if span < 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if span > 4 else MaxNLocator(4, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(format or FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label_y(axes, label: str) -> None:
    """A label no longer than its axis, on the first panel of every row."""
    for ax in axes:
        if ax.get_subplotspec().is_first_col():
            rows = ax.get_gridspec().nrows
            ax.set_ylabel(textwrap.fill(label, int(8 * ax.figure.get_size_inches()[1] / rows)))


def _legend(figure: plt.Figure) -> None:
    """One legend of everything that some panel shows."""
    unique = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        unique |= dict(zip(labels, handles, strict=True))
    known = {label: unique.pop(label) for label in (*LABELS.values(), *"ABC") if label in unique}  # the paper's order
    unique = known | unique
    figure.legend(unique.values(), unique.keys(), loc="outside right center")


def optimizer_lines(
    table: pd.DataFrame, x: str, y: str, panel: str, xlabel: str, ylabel: str, logx: bool = False, logy: bool = False
) -> plt.Figure:
    """y against x, a line an optimizer (mean over seeds, band from lowest to highest), a panel a value of `panel`.

    x is a count (tokens, steps): its ticks read 200k, 1M.
    """
    figure, axes = _panels(table[panel], sharey=True)
    for (value, optimizer), rows in table.groupby([panel, "optimizer"], sort=False):
        curve = rows.groupby(x)[y].agg(["mean", "min", "max"])
        ax, colour = axes[value], COLOURS[optimizer]
        ax.plot(curve.index, curve["mean"], color=colour, label=LABELS[optimizer], lw=1.4)
        ax.fill_between(curve.index, curve["min"], curve["max"], color=colour, alpha=0.15, lw=0)
    for value, ax in axes.items():
        ax.set(title=str(value), xlabel=xlabel, xscale="log" if logx else "linear", yscale="log" if logy else "linear")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        if logx:
            _tidy_log(ax.xaxis, EngFormatter(sep=""))
        if logy:
            _tidy_log(ax.yaxis)
    _label_y(axes.values(), ylabel)
    _legend(figure)
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
    """A point a run, coloured by optimizer; `error` a column of standard errors of y; `joined` draws a line a seed."""
    figure, axes = _panels(table[panel], sharey=True)
    by = [panel, "optimizer", *(["seed"] if joined else [])]
    for (value, optimizer, *_), rows in table.sort_values(x).groupby(by, sort=False):
        style = {"color": COLOURS[optimizer], "marker": MARKERS[optimizer], "label": LABELS[optimizer], "ms": 5}
        bars = rows[error] if error else None
        axes[value].errorbar(rows[x], rows[y], yerr=bars, ls="-" if joined else "none", lw=1, capsize=2, **style)
    for value, ax in axes.items():
        ax.set(title=str(value), xlabel=xlabel, xscale="log" if logx else "linear", yscale="log" if logy else "linear")
        if logx:
            _tidy_log(ax.xaxis)
        if logy:
            _tidy_log(ax.yaxis)
    _label_y(axes.values(), ylabel)
    _legend(figure)
    return figure


def optimizer_bars(
    table: pd.DataFrame, y: str, panel: str, ylabel: str, error: str | None = None, floor: float | None = None
) -> plt.Figure:
    """A bar an optimizer (mean over rows, each row a dot if there are several), a panel a value of `panel`.

    `error` is a column of standard errors, `floor` draws a line, for instance chance. Values far from zero are drawn as
    points: bars on an axis without its zero would lie about ratios.
    """
    figure, axes = _panels(table[panel], width=2.6, sharey=True)
    means = table.groupby([panel, "optimizer"])[y].mean()
    far = means.min() > 0 and means.max() - means.min() < means.min() / 2
    for value, ax in axes.items():
        rows = table[table[panel] == value]
        names = [name for name in LABELS if name in set(rows.optimizer)]
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
    _label_y(axes.values(), ylabel)
    return figure


NORMS = {"linear": None, "log": LogNorm, "root": lambda **limits: PowerNorm(0.5, **limits)}


def heatmap(
    table: pd.DataFrame, row: str, column: str, value: str, label: str, digits: int = 2, norm: str = "linear"
) -> plt.Figure:
    """Mean of `value` over every (row, column), written into the cells; optimizers in the paper's order, all else in
    order of appearance. `norm` of the colours: "linear" (its limits leave out extremes), "log", or "root" for values
    that reach from zero over decades. ValueError for another one.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; valid: {', '.join(NORMS)}")
    grid = table.pivot_table(index=row, columns=column, values=value, sort=False)
    for axis in (0, 1):
        names = list(grid.axes[axis])
        order = [name for name in LABELS if name in names] or names
        grid = grid.reindex(order, axis=axis).set_axis([LABELS.get(name, name) for name in order], axis=axis)
    figure, ax = plt.subplots(figsize=(1.6 + 0.72 * grid.shape[1], 1.2 + 0.36 * grid.shape[0]))
    shown = grid.round(digits) + 0.0  # no -0.00
    limits = (
        {"robust": True}
        if norm == "linear"
        else {"norm": NORMS[norm](vmin=grid.min(axis=None), vmax=grid.max(axis=None))}
    )
    sns.heatmap(grid, annot=shown, fmt=f".{digits}f", cmap="rocket_r", ax=ax, cbar_kws={"label": ""}, **limits)
    ax.set(xlabel="", ylabel="")
    ax.set_title(textwrap.fill(label, int(11 * figure.get_size_inches()[0])), fontsize=9)
    ax.tick_params(axis="x", rotation=60)
    ax.tick_params(axis="y", rotation=0)
    return figure


def depth_profile(table: pd.DataFrame, title: str) -> plt.Figure:
    """R_l along the depth (log scale), a line an optimizer; RMSNorms shaded, module kinds along the axis."""
    figure, ax = plt.subplots(figsize=(9, 3.6))
    for optimizer, rows in table.groupby("optimizer", sort=False):
        curve = rows.groupby("index").R.mean()
        curve = curve[curve > 0]
        ax.plot(curve.index, curve, color=COLOURS[optimizer], label=LABELS[optimizer], marker=".", lw=1.2)
    modules = table.drop_duplicates("index").set_index("index")
    for index in modules.index[modules.kind == "norm"]:
        ax.axvspan(index - 0.5, index + 0.5, color="grey", alpha=0.15, lw=0)
    ax.set_xticks(modules.index, [name.replace("blocks.", "") for name in modules.name], rotation=90, fontsize=7)
    ax.set(yscale="log", ylabel="$R_l$ (relative squared error)", title=f"{title}; RMSNorms shaded")
    _legend(figure)
    return figure


def stacked_abc(table: pd.DataFrame, title: str) -> plt.Figure:
    """A, B and C of every module as shares of R, a panel an optimizer; C below zero where it takes error away."""
    optimizers = [name for name in LABELS if name in set(table.optimizer)]
    rows = -(-len(optimizers) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(10, 2.1 * rows + 0.4), sharex=True, sharey=True, squeeze=False)
    for ax, optimizer in zip(axes.flat, optimizers, strict=False):
        means = table[(table.optimizer == optimizer) & (table.R > 0)].groupby("index")[["R", "A", "B", "C"]].mean()
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
    _legend(figure)
    return figure


def candidate_scatter(table: pd.DataFrame, correlations: pd.DataFrame, target: str, label: str) -> plt.Figure:
    """The target against every candidate, a panel each (log axis), Pearson and interval in the title; large points are
    large models.
    """
    found = correlations[correlations.target == target].set_index("candidate")
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns + 1, 2.5 * rows), sharey=True, squeeze=False)
    sizes = list(dict.fromkeys(table["size"]))
    for ax, (candidate, r) in zip(axes.flat, found.iterrows(), strict=False):
        for optimizer, points in table.groupby("optimizer", sort=False):
            area = 14 + 14 * points["size"].map(sizes.index)
            style = {"color": COLOURS[optimizer], "marker": MARKERS[optimizer], "label": LABELS[optimizer]}
            ax.scatter(points[candidate], points[target], s=area, alpha=0.85, lw=0, **style)
        ax.set(xscale="log", xlabel=CANDIDATES[candidate])
        _tidy_log(ax.xaxis)
        ax.set_title(f"r {r.pearson:.2f} [{r.pearson_low:.2f}, {r.pearson_high:.2f}], n {r.n}", fontsize=8)
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    for place, size in enumerate(sizes):
        axes[0, 0].scatter([], [], s=14 + 14 * place, color="grey", lw=0, label=size)
    for ax in axes[:, 0]:
        ax.set_ylabel(textwrap.fill(label, 30))
    _legend(figure)
    return figure


def correlation_forest(correlations: pd.DataFrame, target: str, title: str) -> plt.Figure:
    """Pearson (filled) and Spearman (open) correlation of every candidate with its interval."""
    found = correlations[correlations.target == target].reset_index(drop=True)
    figure, ax = plt.subplots(figsize=(5.4, 0.42 * len(found) + 1))
    for name, offset, fill in (("pearson", -0.13, "black"), ("spearman", 0.13, "white")):
        y, value = np.arange(len(found)) + offset, found[name]
        spread = [value - found[f"{name}_low"], found[f"{name}_high"] - value]
        ax.errorbar(value, y, xerr=np.abs(spread), fmt="o", color="black", mfc=fill, ms=5, lw=1, capsize=2, label=name)
    ax.axvline(0, color="grey", lw=1)
    ax.set_yticks(range(len(found)), found.candidate.map(CANDIDATES))
    ax.set(xlim=(-1.05, 1.05), xlabel="correlation", title=title)
    ax.invert_yaxis()
    ax.legend(loc="best", fontsize=8)
    return figure


def staircases(table: pd.DataFrame, schemes: dict[str, str]) -> plt.Figure:
    """Forward staircase (top) and gradient (bottom) of every quantization-aware training scheme, side by side."""
    figure, axes = plt.subplots(
        2, len(schemes), figsize=(3 * len(schemes), 4), sharex=True, sharey="row", squeeze=False
    )
    for column, (scheme, title) in enumerate(schemes.items()):
        rows = table[table.scheme == scheme]
        axes[0, column].plot(rows.x, rows.x, color="grey", lw=0.8)
        axes[0, column].plot(rows.x, rows.y, color="#0072B2", lw=1.4, drawstyle="steps-mid")
        axes[0, column].set_title(title)
        axes[1, column].plot(rows.x, rows.gradient, color="#D55E00", lw=1.4, drawstyle="steps-mid")
        axes[1, column].set_xlabel("x")
    axes[0, 0].set_ylabel("quantized x")
    axes[1, 0].set_ylabel("gradient passed on")
    return figure


def scaling_fits(runs: pd.DataFrame, laws: dict) -> plt.Figure:
    """Loss against parameters, a panel an optimizer: full precision (filled) and QAT (open), with the fitted laws."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex=True, sharey=True)
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
                ax.plot(grid, laws[optimizer].predict(grid, bits=bits), style, color=COLOURS[optimizer], lw=1)
        ax.set(title=LABELS[optimizer], xscale="log", yscale="log")
        _tidy_log(ax.xaxis, EngFormatter(sep=""))
        _tidy_log(ax.yaxis)
    for ax in axes[-1]:
        ax.set_xlabel("parameters $N$")
    for ax in axes[:, 0]:
        ax.set_ylabel("loss (nats a token)")
    _legend(figure)
    return figure


def efficiencies(table: pd.DataFrame) -> plt.Figure:
    """rho_4bit and its interval (open: the data do not identify it), the paper's value as a cross."""
    figure, ax = plt.subplots(figsize=(5, 3))
    table = table.set_index("optimizer").reindex([n for n in LABELS if n in set(table.optimizer)]).reset_index()
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


def claims_ledger(table: pd.DataFrame) -> plt.Figure:
    """Every claim's number and interval on its own axis, coloured by verdict, the threshold as a tick."""
    colours = {"reproduced": "#009E73", "not reproduced": "#D55E00", "undecided": "#999999"}
    figure, ax = plt.subplots(figsize=(10, 0.46 * len(table) + 0.9))
    for position, row in enumerate(table.itertuples()):
        side, threshold = row.holds.split()
        colour = colours[row.verdict]
        ax.axhspan(position - 0.4, position + 0.4, color=colour, alpha=0.12, lw=0)
        if np.isfinite(row.value):
            low, high = (row.low, row.high) if np.isfinite(row.low) else (row.value, row.value)
            ax.plot([np.clip(low, -1, 1), np.clip(high, -1, 1)], [position, position], color=colour, lw=2)
            ax.plot(np.clip(row.value, -1, 1), position, "o", color=colour)
        marker = ">" if side == "above" else "<"
        ax.plot(float(threshold), position, marker, color="black", ms=5, mfc="none")
        ax.text(1.08, position, f"{row.verdict}, n {row.n}", va="center", fontsize=8)
    ax.set_yticks(
        range(len(table)), [textwrap.fill(f"{row.id}  {row.claim}", 62) for row in table.itertuples()], fontsize=7
    )
    ax.set(xlim=(-1.05, 1.05), xlabel="statistic, 95 % interval, cut at -1 and 1; triangle: threshold and claimed side")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return figure


def probe_profile(modules: pd.DataFrame, title: str) -> plt.Figure:
    """R and its parts A and B along the depth of any model, one point a module, coloured by kind."""
    figure, ax = plt.subplots(figsize=(9, 3.4))
    shown = modules[modules.R > 0]
    ax.plot(shown["index"], shown.R, color="grey", lw=0.8, zorder=1)
    for (kind, rows), colour in zip(
        shown.groupby("kind", sort=False), sns.color_palette("colorblind", 12), strict=False
    ):
        ax.scatter(rows["index"], rows.R, s=14, color=colour, label=kind, zorder=2)
    ax.set(yscale="log", xlabel="module $l$", ylabel="$R_l$", title=title)
    _legend(figure)
    return figure
