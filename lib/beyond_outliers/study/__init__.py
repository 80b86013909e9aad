"""A study of one scale: its runs, its steps, its tables."""

from beyond_outliers.study.measure import measure_folder, measure_run, specs, validation_batches
from beyond_outliers.study.plan import plan_table, print_plan
from beyond_outliers.study.study import Study
from beyond_outliers.study.tables import MEASURED, TABLES, MissingResults

__all__ = [
    "MEASURED",
    "TABLES",
    "MissingResults",
    "Study",
    "measure_folder",
    "measure_run",
    "plan_table",
    "print_plan",
    "specs",
    "validation_batches",
]
