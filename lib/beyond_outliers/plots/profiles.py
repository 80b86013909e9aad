"""Profiles: along a network's depth, along its training, along the input of a quantizer.

A figure function takes a tidy table and returns a matplotlib figure.
"""

import pandas as pd
from matplotlib.figure import Figure

from beyond_outliers.config.registry import ordered
from beyond_outliers.plots.theme import finish, panels, style_of, subplots


def depth_profile(table: pd.DataFrame, title: str) -> Figure:
    """R_l along the depth (log scale), a line an optimizer; RMSNorms shaded, names of modules along the axis."""
    figure, ax = subplots(figsize=(9, 3.6))
    for optimizer, rows in table[table.R > 0].groupby("optimizer", sort=False):
        curve = rows.groupby("index").R.mean()
        ax.plot(curve.index, curve, lw=1.2, ms=4, **style_of(str(optimizer)))
    modules = table.drop_duplicates("index").set_index("index")
    for index in modules.index[modules.kind == "norm"]:
        ax.axvspan(index - 0.5, index + 0.5, color="grey", alpha=0.15, lw=0)
    ax.set_xticks(modules.index, modules.name.str.replace("blocks.", ""), rotation=90, fontsize=7)
    ax.set(yscale="log", ylabel="$R_l$ (relative squared error)", title=f"{title}; RMSNorms shaded")
    return finish(figure)


def stacked_abc(table: pd.DataFrame, title: str) -> Figure:
    """A, B and C of every module as shares of R, a panel an optimizer; C below zero where it takes error away."""
    grid = {"columns": 3, "sharex": True, "sharey": True}
    figure, axes = panels(ordered(table.optimizer), 3.0, 2.1, xlabel="module $l$", **grid)
    for optimizer, rows in table[table.R > 0].groupby("optimizer"):
        ax, means = axes[optimizer], rows.groupby("index")[["R", "A", "B", "C"]].mean()
        shares = means.div(means.R, axis=0)
        ax.bar(shares.index, shares.A, color="#0072B2", width=0.9, label="A")
        ax.bar(shares.index, shares.B, bottom=shares.A, color="#E69F00", width=0.9, label="B")
        ax.plot(shares.index, shares.C, color="#D55E00", lw=1, marker=".", ms=3, label="C")
        ax.axhline(1, color="black", lw=0.6)
    figure.suptitle(title)
    return finish(figure, "share of $R_l$")


def probe_profile(modules: pd.DataFrame, title: str) -> Figure:
    """R along the depth of any model, one point a module, coloured by kind."""
    figure, ax = subplots(figsize=(9, 3.4))
    shown = modules[modules.R > 0]
    ax.plot(shown["index"], shown.R, color="grey", lw=0.8, zorder=1)
    for kind, rows in shown.groupby("kind", sort=False):
        ax.scatter(rows["index"], rows.R, s=14, label=kind, zorder=2)
    ax.set(yscale="log", xlabel="module $l$", ylabel="$R_l$", title=title)
    return finish(figure)


def checkpoint_curves(table: pd.DataFrame) -> Figure:
    """R_L (with its interval), MMR and kurtosis of `probes.probe_all`'s table along training, a line a format.

    Checkpoints stand at the number in their name where all have one, else side by side in their order.
    """
    rows = table[table.reason == ""]
    names = list(dict.fromkeys(rows.model))
    numbered = bool(rows.step.notna().all()) and rows.step.nunique() == len(names)
    rows = rows.assign(x=rows.step.astype(float) if numbered else rows.model.map(names.index))
    figure, axes = panels(("R_L", "mmr", "kurtosis"), 3.3, 3.2, xlabel="training step" if numbered else "")
    for (metric, ax), name in zip(axes.items(), ("$R_L$", "MMR", "kurtosis"), strict=True):
        for spec, line in rows.groupby("spec", sort=False):
            ax.plot(line.x, line[metric], marker="o", ms=4, label=spec)
            if metric == "R_L":
                ax.fill_between(line.x, line.R_L_low, line.R_L_high, alpha=0.15)
        ax.set(ylabel=name, yscale="log", title="")
        if not numbered:
            ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    return finish(figure)


def staircases(table: pd.DataFrame, schemes: dict[str, str]) -> Figure:
    """Forward staircase (top) and gradient (bottom) of every quantization-aware training scheme, side by side."""
    figure, axes = subplots(2, len(schemes), figsize=(3 * len(schemes), 4), sharex=True, sharey="row", squeeze=False)
    for (scheme, title), (value, gradient) in zip(schemes.items(), axes.T, strict=True):
        rows = table[table.scheme == scheme]
        value.plot(rows.x, rows.x, color="grey", lw=0.8)
        value.plot(rows.x, rows.y, color="#0072B2", lw=1.4, drawstyle="steps-mid")
        value.set_title(title)
        gradient.plot(rows.x, rows.gradient, color="#D55E00", lw=1.4, drawstyle="steps-mid")
        gradient.set_xlabel("x")
    axes[0, 0].set_ylabel("quantized x")
    axes[1, 0].set_ylabel("gradient passed on")
    return figure
