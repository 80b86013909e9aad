"""Figures: one theme, one function a figure kind."""

from beyond_outliers.plots.by_optimizer import (
    depth_profile,
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
    claims_ledger,
    correlation_forest,
    probe_profile,
    staircases,
)
from beyond_outliers.plots.theme import COLOURS, LABELS, MARKERS, save, set_theme

__all__ = [
    "COLOURS",
    "LABELS",
    "MARKERS",
    "candidate_scatter",
    "claims_ledger",
    "correlation_forest",
    "depth_profile",
    "efficiencies",
    "heatmap",
    "optimizer_bars",
    "optimizer_lines",
    "optimizer_points",
    "probe_profile",
    "save",
    "scaling_fits",
    "set_theme",
    "stacked_abc",
    "staircases",
]
