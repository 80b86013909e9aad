"""Profiles: along a network's depth, along its training, along the input of a quantizer.

A figure function takes a tidy table and returns a matplotlib figure.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from beyond_outliers.config.registry import ordered
from beyond_outliers.plots.theme import finish, name_lines, panels, style_of, subplots

PARTS = {"A": "#0072B2", "B": "#E69F00", "C": "#D55E00"}  # of R


def depth_profile(table: pd.DataFrame, title: str) -> Figure:
    """R_l along the depth (log scale), a line an optimizer; RMSNorms shaded, names of modules along the axis."""
    figure, ax = subplots(figsize=(6.6, 4.4))
    for optimizer, rows in table[table.R > 0].groupby("optimizer", sort=False):
        curve = rows.groupby("index").R.mean()
        ax.plot(curve.index, curve, lw=1.2, ms=4, **style_of(str(optimizer)))
    modules = table.drop_duplicates("index").set_index("index")
    for index in modules.index[modules.kind == "norm"]:
        ax.axvspan(index - 0.5, index + 0.5, color="grey", alpha=0.15, lw=0)
    ax.set_xticks(modules.index, modules.name.str.replace("blocks.", ""), rotation=90, fontsize=8)
    ax.set(yscale="log", ylabel="$R_l$ (relative squared error)", title=f"{title}; RMSNorms shaded")
    name_lines(ax)
    return figure


def stacked_abc(table: pd.DataFrame, title: str) -> Figure:
    """A, B and C as shares of R, of every module that adds an error, a panel an optimizer: C is the dot on its row."""
    adding = table[table.B > 0].sort_values("index", kind="stable")
    names = list(dict.fromkeys(adding.name.str.replace("blocks.", "")))
    figure, axes = panels(
        ordered(table.optimizer), height=0.17 * len(names) + 0.5, xlabel="share of $R_l$", sharex=True, sharey=True
    )
    for optimizer, rows in adding.groupby("optimizer"):
        ax, means = axes[optimizer], rows.groupby("index")[["R", *PARTS]].mean()
        shares = means[[*PARTS]].div(means.R, axis=0).set_axis(range(len(means)))
        for part, left in (("A", 0), ("B", shares.A)):
            ax.barh(shares.index, shares[part], left=left, color=PARTS[part], height=0.9)
        ax.plot(shares.C, shares.index, ".", color=PARTS["C"], ms=6)
        ax.axvline(1, color="black", lw=0.6)
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_ylim(len(names) - 0.5, -1.6)
        for part, place in zip(PARTS, (0.45, 0.9, 0), strict=True):
            ax.text(place, -1, part, color=PARTS[part], ha="center", va="center", fontsize=9, weight="bold")
    figure.suptitle(title)
    return figure


def layer_profile(layers: pd.DataFrame, good: float, bad: float, ylabel: str) -> Figure:
    """What each linear layer of a probed model costs, with names on the axis, the costliest next to their points.

    good, bad: new errors B up to which, and from which on, a layer is marked so.
    """
    figure, ax = subplots(figsize=(6.6, 4.6))
    level = (layers.B > good).astype(int) + (layers.B >= bad)
    for kind, rows in layers.groupby(level):
        label, marker, colour = (("low", "o", "#009E73"), ("usual", ".", "grey"), ("high", "^", "#D55E00"))[kind]
        label = f"new error: {label} ({len(rows)})"
        ax.scatter(rows.index, rows.carried, s=22, marker=marker, color=colour, label=label)
    for place, row in layers.nlargest(3, "carried").iterrows():
        ax.annotate(
            row["name"], (place, row.carried), xytext=(-6, 3), textcoords="offset points", fontsize=8, ha="right"
        )
    ticks = range(0, len(layers), max(1, len(layers) // 18))
    ax.set_xticks(
        ticks, layers["name"].iloc[list(ticks)].str.removeprefix("model."), rotation=60, ha="right", fontsize=8
    )
    ax.set(yscale="log", ylabel=ylabel)
    return finish(figure, legend=True)


def guide_curves(tables: dict[str, pd.DataFrame], labels: dict[str, str]) -> Figure:
    """Damage left over mean bits, a panel a table of `compare_guides`, a line a guide; several models by their mean.

    Damage is divided by that of all layers in 4 bits; means are geometric.
    """
    figure, axes = panels(tables, 3.0, 3.0)
    for name, ax in axes.items():
        rows = tables[name][tables[name].reading == "kl"].set_index(["model", "optimizer"])
        start = rows[(rows.guide == "uniform") & (rows.bits == 4)].value
        rows = rows.assign(value=np.log(rows.value / start.reindex(rows.index)))
        lines = np.exp(rows.groupby(["guide", "bits"]).value.mean()).reset_index()
        first = lines[(lines.guide == "uniform") & (lines.bits == 4)]
        for guide, label in labels.items():
            line = lines[lines.guide == guide]
            line = line if guide == "uniform" else pd.concat([first, line])
            dashed = "--" if guide in ("uniform", "random") else "-"
            ax.plot(line.bits, line.value, dashed, marker="o", ms=3, lw=1.2, label=label)
        ax.set(yscale="log", xlabel="mean bits per weight", ylabel="KL, 1 at 4 bits")
        ax.set_title(name, fontsize=9)
        name_lines(ax)
    return figure


def checkpoint_curves(table: pd.DataFrame) -> Figure:
    """R_L (with its interval), MMR and kurtosis of `probes.probe_all`'s table along training, a line a format.

    Checkpoints stand at the number in their name where all have one, else side by side in their order.
    """
    rows = table[table.reason == ""]
    names = list(dict.fromkeys(rows.model))
    numbered = bool(rows.step.notna().all()) and rows.step.nunique() == len(names)
    rows = rows.assign(x=rows.step.astype(float) if numbered else rows.model.map(names.index))
    figure, axes = panels(("$R_L$", "MMR", "kurtosis"), xlabel="training step" if numbered else "")
    for metric, ax in zip(("R_L", "mmr", "kurtosis"), axes.values(), strict=True):
        for spec, line in rows.groupby("spec", sort=False):
            ax.plot(line.x, line[metric], marker="o", ms=4, label=spec)
            if metric == "R_L":
                ax.fill_between(line.x, line.R_L_low, line.R_L_high, alpha=0.15)
        ax.set_yscale("log")
        if not numbered:
            ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        name_lines(ax)
    return figure


def staircases(table: pd.DataFrame, schemes: dict[str, str]) -> Figure:
    """Forward staircase (top) and gradient (bottom) of every quantization-aware training scheme, side by side."""
    figure, axes = subplots(
        2, len(schemes), figsize=(2.1 * len(schemes), 3.6), sharex=True, sharey="row", squeeze=False
    )
    for (scheme, title), (value, gradient) in zip(schemes.items(), axes.T, strict=True):
        rows = table[table.scheme == scheme]
        value.plot(rows.x, rows.x, color="grey", lw=0.8)
        value.plot(rows.x, rows.y, color="#0072B2", lw=1.4, drawstyle="steps-mid")
        value.set_title(title, fontsize=9)
        gradient.plot(rows.x, rows.gradient, color="#D55E00", lw=1.4, drawstyle="steps-mid")
        gradient.set_xlabel("x")
    axes[0, 0].set_ylabel("quantized x")
    axes[1, 0].set_ylabel("gradient passed on")
    return figure
