"""The result tables of a scale: their names, the types of their columns, and the errors for one that is not as written.

Every table of the project is read by `read_table`, so that no text is taken for a number: a commit 12e4567890 is not
infinite, and a run id 0012345678 keeps its zeros.
"""

from pathlib import Path
from typing import Any

import pandas as pd

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
    "readings",
    "branches",
    "machines",
)
OPTIONAL = ("trajectory", "readings", "branches", "machines")  # of scales that ask; of runs made on a second machine
MEASURED = ("zero_shot", "ptq", "outliers", "propagation")

# The columns that are text, whatever they look like; pandas finds the types of all others: numbers and truth values.
TEXT = [
    "run",
    "run_id",
    "purpose",
    "status",
    "reason",
    "scale",
    "size",
    "optimizer",
    "hyper",
    "scheme",
    "qat_weights",
    "qat_activations",
    "corpus",
    "device",
    "device_name",
    "device_name_here",
    "device_name_there",
    "python",
    "torch",
    "numpy",
    "version",
    "commit",
    "finished_at",
    "grid",
    "auxiliary_grid",
    "chosen_by",
    "task",
    "spec",
    "name",
    "kind",
    "weights",
    "activations",
    "granularity",
    "method",
    "attention",
    "checkpoint",
    "id",
    "rival",
    "runs",
    "part",
    "condition",
    "reading",
    "variant",
]


def read_table(file: Path, **options: Any) -> pd.DataFrame:
    """A CSV file of the project, with the columns of TEXT as text; `options` of `pandas.read_csv`."""
    return pd.read_csv(file, dtype=dict.fromkeys(TEXT, str), **options)


def check_table(folder: Path, name: str) -> None:
    """DamagedFile, with the remedies, unless the table `name` of a scale's folder is what was written, or not there."""
    file = folder / f"{name}.csv"
    if file.exists():
        committed = folder.parent == paths.RESULTS
        scale = folder.name if committed else folder.parent.name
        again = f"`git restore {folder}`" if committed else f"remove it, then `beyond-outliers collect --scale {scale}`"
        remedy = f"{again}, or, if it was changed on purpose, `beyond-outliers claims --scale {scale}`, "
        checksums.check(folder, file.name, remedy=f"{remedy}which takes all tables as they are")


class MissingResults(RuntimeError):
    """A table or run that was asked for is not there."""
