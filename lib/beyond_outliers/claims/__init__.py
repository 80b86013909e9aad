"""The paper's claims against a study's tables."""

from beyond_outliers.claims.ledger import CLAIMS, complete_cells, rules, scaling_runs, verdicts
from beyond_outliers.claims.predictors import CANDIDATES, TARGETS, predictor_table
from beyond_outliers.claims.statistics import CONFIDENCE, LEAST_UNITS, Estimate, correlations, mean, share, verdict

__all__ = [
    "CANDIDATES",
    "CLAIMS",
    "CONFIDENCE",
    "LEAST_UNITS",
    "TARGETS",
    "Estimate",
    "complete_cells",
    "correlations",
    "mean",
    "predictor_table",
    "rules",
    "scaling_runs",
    "share",
    "verdict",
    "verdicts",
]
