"""Figures of findings: what predicts the damage, quantizers' staircases, a probed model.

A figure function takes a tidy table and returns a matplotlib figure.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from beyond_outliers.claims.readings import with_error
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


def probe_profile(modules: pd.DataFrame, title: str) -> Figure:
    """R and its parts A and B along the depth of any model, one point a module, coloured by kind."""
    figure, ax = subplots(figsize=(9, 3.4))
    shown = with_error(modules)
    ax.plot(shown["index"], shown.R, color="grey", lw=0.8, zorder=1)
    for kind, rows in shown.groupby("kind", sort=False):
        ax.scatter(rows["index"], rows.R, s=14, label=kind, zorder=2)
    ax.set(yscale="log", xlabel="module $l$", ylabel="$R_l$", title=title)
    legend(figure)
    return figure
