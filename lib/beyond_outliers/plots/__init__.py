"""Figures: one theme, one function a figure kind."""

from beyond_outliers.plots.by_optimizer import (
    depth_profile,
    dumbbells,
    efficiencies,
    heatmap,
    optimizer_bars,
    optimizer_lines,
    optimizer_points,
    scaling_fits,
    stacked_abc,
)
from beyond_outliers.plots.findings import (
    candidate_scatter,
    checkpoint_curves,
    claims_ledger,
    correlation_forest,
    probe_profile,
    staircases,
)
from beyond_outliers.plots.intervals import (
    along_training,
    centred_points,
    effect_forest,
    method_lines,
    rate_paths,
    ratio_forest,
)
from beyond_outliers.plots.theme import COLOURS, LABELS, MARKERS, save, set_theme
from beyond_outliers.plots.verdicts import confirm_ledger

__all__ = [
    "COLOURS",
    "LABELS",
    "MARKERS",
    "along_training",
    "candidate_scatter",
    "centred_points",
    "checkpoint_curves",
    "claims_ledger",
    "confirm_ledger",
    "correlation_forest",
    "depth_profile",
    "dumbbells",
    "effect_forest",
    "efficiencies",
    "heatmap",
    "method_lines",
    "optimizer_bars",
    "optimizer_lines",
    "optimizer_points",
    "probe_profile",
    "rate_paths",
    "ratio_forest",
    "save",
    "scaling_fits",
    "set_theme",
    "stacked_abc",
    "staircases",
]
