"""A study of one scale: its runs, its steps, its tables."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    study="Study",
    tables="MEASURED TABLES MissingResults",
    measure="measure_run specs validation_batches",
    plan="plan_table print_plan",
)
