"""Figures of findings: what predicts the damage, quantizers' staircases, a probed model.

A figure function takes a tidy table and returns a matplotlib figure.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from beyond_outliers.plots.theme import label_y, legend, panels, style_of, subplots, tidy_log

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


def candidate_scatter(table: pd.DataFrame, correlations: pd.DataFrame, target: str, label: str) -> Figure:
    """The target against every candidate, a panel each (log axis), Pearson and interval in the title; large points are
    large models.
    """
    found = correlations[correlations.target == target].set_index("candidate")
    figure, axes = panels(found.index, 2.6, 2.5, sharey=True)
    sizes = list(dict.fromkeys(table["size"]))
    for candidate, ax in axes.items():
        for optimizer, points in table.groupby("optimizer", sort=False):
            area = 14 + 14 * points["size"].map(sizes.index)
            ax.scatter(points[candidate], points[target], s=area, alpha=0.85, lw=0, **style_of(str(optimizer)))
        r = found.loc[candidate]
        ax.set_title(f"r {r.pearson:.2f} [{r.pearson_low:.2f}, {r.pearson_high:.2f}], n {r.n}", fontsize=8)
        ax.set(xscale="log", xlabel=CANDIDATES[candidate])
        tidy_log(ax.xaxis)
    for place, size in enumerate(sizes if axes else ()):
        figure.axes[0].scatter([], [], s=14 + 14 * place, color="grey", lw=0, label=size)
    label_y(axes.values(), label)
    legend(figure)
    return figure


def correlation_forest(correlations: pd.DataFrame, target: str, title: str) -> Figure:
    """Pearson (filled) and Spearman (open) correlation of every candidate with its interval."""
    found = correlations[correlations.target == target].reset_index(drop=True)
    figure, ax = subplots(figsize=(5.4, 0.42 * len(found) + 1))
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


def staircases(table: pd.DataFrame, schemes: dict[str, str]) -> Figure:
    """Forward staircase (top) and gradient (bottom) of every quantization-aware training scheme, side by side."""
    figure, axes = subplots(2, len(schemes), figsize=(3 * len(schemes), 4), sharex=True, sharey="row", squeeze=False)
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


def checkpoint_curves(table: pd.DataFrame) -> Figure:
    """R_L (with its interval), MMR and kurtosis of `probes.probe_all`'s table along training, a line a format.

    Checkpoints stand at the number in their name where all have one, else side by side in their order.
    """
    rows = table[table.reason == ""]
    names = list(dict.fromkeys(rows.model))
    numbered = bool(rows.step.notna().all()) and rows.step.nunique() == len(names)
    rows = rows.assign(x=rows.step.astype(float) if numbered else rows.model.map(names.index))
    metrics = {"R_L": "$R_L$", "mmr": "MMR", "kurtosis": "kurtosis"}
    figure, axes = panels(metrics, 3.3, 3.2)
    for metric, ax in axes.items():
        for spec, line in rows.groupby("spec", sort=False):
            ax.plot(line.x, line[metric], marker="o", ms=4, label=spec)
            if metric == "R_L":
                ax.fill_between(line.x, line.R_L_low, line.R_L_high, alpha=0.15)
        ax.set(ylabel=metrics[metric], yscale="log", xlabel="training step" if numbered else "")
        if not numbered:
            ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    legend(figure)
    return figure


def layer_profile(layers: pd.DataFrame, good: float, bad: float, ylabel: str) -> Figure:
    """What each linear layer of a probed model costs, with names on the axis, the costliest beside their points.

    good, bad: new errors B up to which, and from which on, a layer is marked so.
    """
    figure, ax = subplots(figsize=(9, 3.8))
    kinds = {"new error as low as the study's better half": ("o", "#009E73", layers.B <= good)}
    kinds |= {"between": (".", "grey", (layers.B > good) & (layers.B < bad))}
    kinds |= {"above all but 5 % of the study's layers": ("^", "#D55E00", layers.B >= bad)}
    for label, (marker, colour, chosen) in kinds.items():
        rows = layers[chosen]
        ax.scatter(rows.index, rows.carried, s=22, marker=marker, color=colour, label=f"{label} ({len(rows)})")
    for place, row in layers.nlargest(3, "carried").iterrows():
        ax.annotate(row["name"], (place, row.carried), xytext=(5, 4), textcoords="offset points", fontsize=7)
    ticks = range(0, len(layers), max(1, len(layers) // 24))
    ax.set_xticks(ticks, layers["name"].iloc[list(ticks)], rotation=60, ha="right", fontsize=6)
    ax.set(yscale="log", ylabel=ylabel)
    legend(figure)
    return figure


def guide_curves(tables: dict[str, pd.DataFrame], labels: dict[str, str]) -> Figure:
    """Damage left over mean bits, a panel a table of `compare_guides`, a line a guide; several models by their mean.

    Damage is divided by that of all layers in 4 bits; means are geometric.
    """
    figure, axes = panels(tables, 4.4, 3.4)
    for name, ax in axes.items():
        rows = tables[name][tables[name].reading == "kl"].set_index(["model", "optimizer"])
        start = rows[(rows.guide == "uniform") & (rows.bits == 4)].value
        for column in ("value", "low", "high"):
            rows[column] = np.log(rows[column] / start.reindex(rows.index))
        lines = np.exp(rows.groupby(["guide", "bits"])[["value", "low", "high"]].mean()).reset_index()
        first = lines[(lines.guide == "uniform") & (lines.bits == 4)]
        for guide, label in labels.items():
            line = lines[lines.guide == guide]
            line = line if guide == "uniform" else pd.concat([first, line])
            dashed = "--" if guide in ("uniform", "random") else "-"
            ax.plot(line.bits, line.value, dashed, marker="o", ms=3, lw=1.2, label=label)
        ax.set(yscale="log", xlabel="mean bits per weight", ylabel="KL, 1 at 4 bits", title=name)
    legend(figure)
    return figure
