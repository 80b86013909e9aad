"""The paper's claims against a study's tables."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    estimates="PAPER_OPTIMIZERS Estimate correlations",
    readings="CANDIDATES TARGETS predictor_table scaling_runs",
    rules="CLAIMS evaluate",
    verdicts="judge judged read_rules read_verdicts",
)
