"""The result tables of a scale: their names, and the errors for one that is not there, or not what was written."""

from pathlib import Path

from beyond_outliers import checksums

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


def check_table(folder: Path, name: str) -> None:
    """DamagedFile, with the remedies, unless the table `name` of a scale's folder is what was written, or not there."""
    file = folder / f"{name}.csv"
    if file.exists():
        remedy = f"`git restore {folder}`, or, if it was changed on purpose, `python -m beyond_outliers.claims --scale "
        checksums.check(folder, file.name, remedy=f"{remedy}{folder.name}`, which takes all tables as they are")


class MissingResults(RuntimeError):
    """A table or run that was asked for is not there."""
