"""Figures: one theme, one function per kind of figure."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    by_optimizer="along_training depth_profile dumbbells efficiencies heatmap optimizer_bars optimizer_lines "
    "scaling_fits stacked_abc",
    findings="candidate_scatter checkpoint_curves correlation_forest guide_curves layer_profile staircases",
    intervals="centred_points effect_forest method_lines rate_paths ratio_forest",
    theme="COLOURS LABELS MARKERS save set_theme",
    verdicts="verdict_ledger",
)
