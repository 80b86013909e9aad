"""Every path of the project.

What a study makes goes below data/runs/SCALE, which git ignores: its runs, its tables (`own_results`) and the figures
and pages of them. Committed tables and pages change by `make publish` alone. $BEYOND_OUTLIERS_OUTPUT takes the place of
the repository for all that is written.
"""

import contextlib
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
PAPER = DATA / "paper"  # the paper's tables
SCALES = DATA / "scales"  # one protocol a scale: sizes, learning rates, seeds
SOURCES = DATA / "sources.toml"  # the pinned wheels that are read as data

OUTPUT = Path(os.environ.get("BEYOND_OUTLIERS_OUTPUT") or ROOT).resolve()
# wheels and token files; git-ignored, safe to delete; beside what is written where the checkout cannot be
CACHE = (DATA if os.access(DATA, os.W_OK) else OUTPUT / "data") / "cache"
RESULTS = DATA / "results"  # committed tidy tables, one folder a scale
FIGURES = OUTPUT / "figures"  # figures and pages of the committed tables
CHECKPOINTS = OUTPUT / "data" / "checkpoints"  # committed final weights of one seed, bfloat16
RUNS = OUTPUT / "data" / "runs"  # one folder a scale, in it one a training run; git-ignored


def own_results(scale: str) -> Path:
    """Where a study writes its tables."""
    return RUNS / scale / "results"


def results(scale: str) -> Path:
    """Where tables are read from: a study's own once it has begun to write some, else the committed ones."""
    own = own_results(scale)
    return own if own.is_dir() else RESULTS / scale


def figures(scale: str) -> Path:
    """Where notebooks draw. Only `make figures` writes the figures and pages of committed tables into FIGURES."""
    return RUNS / scale / "figures"


def pages(scale: str) -> Path:
    """Where pages and figures of the tables that are read lie: beside a study's own tables, else in FIGURES."""
    return FIGURES / scale if results(scale) == RESULTS / scale else figures(scale)


def way_up(folder: Path) -> str:
    """From a folder of pages to the root of the repository, for the links of a page."""
    return "../.." if folder.parent == FIGURES else "../../../.."


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all. Where it is to be checked when it is read, `checksums` writes it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def git_commit() -> str:
    """Commit of the repository, with "+" when tracked sources differ from it; "unknown" outside a checkout.

    Only of this project's own repository: not of one around an unpacked copy, nor of one that GIT_DIR or a hook names.
    """
    git = ["git", "-C", str(ROOT), "--git-dir", str(ROOT / ".git"), "--work-tree", str(ROOT)]
    environment = {name: value for name, value in os.environ.items() if not re.match("GIT_(?!CONFIG)", name)}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True, env=environment
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "lib", "data/scales"], env=environment)
        return commit.stdout.strip() + ("+" if changed.returncode else "")
    return "unknown"
