"""The paper's claims against a study's tables."""

from beyond_outliers.claims.ledger import CLAIMS, Claim, complete_cells, read_verdicts, rules, verdicts
from beyond_outliers.claims.predictors import CANDIDATES, TARGETS, predictor_table
from beyond_outliers.claims.readings import PAPER_OPTIMIZERS, scaling_runs
from beyond_outliers.claims.statistics import CONFIDENCE, LEAST_UNITS, Estimate, correlations, mean, share, verdict

__all__ = [
    "CANDIDATES",
    "CLAIMS",
    "CONFIDENCE",
    "LEAST_UNITS",
    "PAPER_OPTIMIZERS",
    "TARGETS",
    "Claim",
    "Estimate",
    "complete_cells",
    "correlations",
    "mean",
    "predictor_table",
    "read_verdicts",
    "rules",
    "scaling_runs",
    "share",
    "verdict",
    "verdicts",
]
