"""Figures: one theme, one function per kind of figure."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    by_optimizer="along_training dumbbells heatmap optimizer_points optimizer_lines scaling_fits",
    intervals="candidate_scatter centred_points effect_forest efficiency_points rank_lines rate_paths ratio_forest",
    profiles="checkpoint_curves depth_profile guide_curves layer_profile staircases stacked_abc",
    theme="COLOURS LABELS MARKERS save set_theme",
    verdicts="scorecard",
)
