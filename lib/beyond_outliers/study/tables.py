"""The result tables of a scale: their names, and the error for one that is not there."""

TABLES = (
    "runs",
    "curves",
    "learning_rates",
    "common_loss",
    "zero_shot",
    "ptq",
    "outliers",
    "propagation",
    "trajectory",
    "machines",
)
OPTIONAL = ("trajectory", "machines")  # of scales that ask for it; of runs that were made on a second machine
MEASURED = ("zero_shot", "ptq", "outliers", "propagation")


class MissingResults(RuntimeError):
    """A table or run that was asked for is not there."""
