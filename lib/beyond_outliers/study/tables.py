"""The result tables of a scale: their names, and the errors for one that is not there, or not what was written."""

from pathlib import Path

from beyond_outliers import checksums, paths

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
        committed = folder.parent == paths.RESULTS
        scale = folder.name if committed else folder.parent.name
        collect = f"remove it, then `python -m beyond_outliers.study collect --scale {scale}`"
        again = f"`git restore {folder}`" if committed else collect
        taken = f"`python -m beyond_outliers.claims --scale {scale}`, which takes all tables as they are"
        checksums.check(folder, file.name, remedy=f"{again}, or, if it was changed on purpose, {taken}")


class MissingResults(RuntimeError):
    """A table or run that was asked for is not there."""
