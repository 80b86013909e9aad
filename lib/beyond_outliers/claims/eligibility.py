"""Which rows of a study a finding may count, and the paper's optimizers compared by one value of them."""

import pandas as pd

from beyond_outliers.claims.comparison import Comparison
from beyond_outliers.claims.confirm_readings import counted
from beyond_outliers.claims.confirm_rules import SCALE
from beyond_outliers.claims.readings import PAPER_OPTIMIZERS


def eligible(study, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the paper's optimizers; at scale confirm only of runs that its rules count, if the rows name them."""
    rows = rows[rows.optimizer.isin(PAPER_OPTIMIZERS)]
    if study.scale == SCALE and "run" in rows:
        rows = rows[rows.run.isin(counted(study)[0].run)]
    return rows.reset_index(drop=True)


def compare(study, rows: pd.DataFrame, value: str) -> Comparison:
    """The paper's optimizers that the scale has, by one value of eligible rows; NothingToCompare as `Comparison`."""
    return Comparison(eligible(study, rows), value, [n for n in PAPER_OPTIMIZERS if n in study.protocol.optimizers])
