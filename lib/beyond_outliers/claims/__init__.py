"""The paper's claims against a study's tables."""

from beyond_outliers.claims.compare import PAPER_OPTIMIZERS, Estimate, correlations
from beyond_outliers.claims.readings import CANDIDATES, TARGETS, predictor_table, scaling_runs
from beyond_outliers.claims.rules import CLAIMS, evaluate
from beyond_outliers.claims.verdicts import judge, judged, read_rules, read_verdicts

__all__ = [
    "CANDIDATES",
    "CLAIMS",
    "PAPER_OPTIMIZERS",
    "TARGETS",
    "Estimate",
    "correlations",
    "evaluate",
    "judge",
    "judged",
    "predictor_table",
    "read_rules",
    "read_verdicts",
    "scaling_runs",
]
