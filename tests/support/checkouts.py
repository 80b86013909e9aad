"""A checkout of its own with a study of seconds, and its commands as users give them."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from beyond_outliers import paths
from beyond_outliers.study.study import Study
from scale_files import WHOLE, toml

VARYING = ("seconds", "tokens_per_second", "finished_at")  # columns that tell of the making, not of what is made
SCALE = "own"


def tiny_study(text_file: Path, **plan: list[int]) -> str:
    """A scale file: one size, AdamW at two rates; plan: purposes beside the sweep, each with its seeds."""
    table = copy.deepcopy(WHOLE["swept"])
    table["corpus"] = {"source": str(text_file), "vocab_size": 320, "validation_share": 0.1}
    table["training"] |= {"context": 32, "tokens_per_parameter": 0.1, "evaluations": 2, "validation_tokens": 256}
    table["sizes"] = {"tiny": {"width": 32, "depth": 1, "n_heads": 2}}
    table["learning_rates"], table["hyper"] = {"adamw": [1e-3, 5e-3]}, {}
    table["plan"] = {purpose: {"sizes": ["tiny"], "seeds": seeds} for purpose, seeds in {"sweep": [0], **plan}.items()}
    if "branches" in plan:
        table["plan"]["branches"]["at"] = [0.5]
    if "qat" in plan:
        table["plan"]["qat"]["scheme"] = "quest"
    table["measure"] |= {
        "validation_tokens": 256,
        "propagation_tokens": 64,
        "trajectory": False,
        "common_by_seed": False,
        "questions": 4,
    }
    return toml(table)


def made(study: Study) -> Study:
    """The study with everything that it plans, step by step in this process, as the Snakefile does it in many."""
    study.prepare_corpus()
    for size in study.sizes_of("sweep"):
        for planned in study.protocol.sweep_runs(size):
            study.run(planned, progress=False)
        study.choose_learning_rates(size)
    for planned in study.planned():
        if planned.purpose != "sweep":
            study.run(planned, progress=False)
    for group in study.groups():
        study.measure_common(*group)
    study.collect()
    return study


def lend_wheels(cache: Path, wheels: Path = paths.CACHE / "wheels") -> None:
    """Lets another cache have the wheels that this checkout has, or will have, downloaded."""
    wheels.mkdir(parents=True, exist_ok=True)
    (cache / "wheels").symlink_to(wheels)


class Checkout:
    """A copy of the sources with the scale `own` alone, and what it makes, below one folder."""

    def __init__(self, root: Path, scale_file: str):
        self.root, self.output = root / "checkout", root / "output"
        left_out = shutil.ignore_patterns("results", "runs", "cache", "checkpoints", "scales", "__pycache__")
        for name in ("lib", "notebooks", "data"):
            shutil.copytree(paths.ROOT / name, self.root / name, ignore=left_out)
        shutil.copy(paths.ROOT / "Snakefile", self.root)
        (self.root / "data" / "scales").mkdir()
        (self.root / "data" / "scales" / f"{SCALE}.toml").write_text(scale_file)
        (self.root / "data" / "cache").mkdir()
        lend_wheels(self.root / "data" / "cache")

    def start(self, *command: str, prepare: Callable[[], object] | None = None, **environment: str) -> subprocess.Popen:
        """A step of the study as the leader of a process group."""
        given = {
            "PYTHONPATH": str(self.root / "lib"),
            "BEYOND_OUTLIERS_OUTPUT": str(self.output),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "beyond_outliers", *command, "--scale", SCALE],
            env={**os.environ, **given, **environment},
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=prepare,
        )

    @property
    def results(self) -> Path:
        return self.output / "data" / "runs" / SCALE / "results"


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of a study as text, without the columns that vary, their rows sorted."""
    found = {file.name: pd.read_csv(file, dtype=str) for file in sorted(folder.glob("*.csv"))}
    for name, table in found.items():
        kept = table.drop(columns=[column for column in VARYING if column in table])
        found[name] = kept.sort_values(list(kept)).reset_index(drop=True)
    return found


def same_tables(one: dict[str, pd.DataFrame], other: dict[str, pd.DataFrame]) -> bool:
    """Whether the same tables have the same rows."""
    return list(one) == list(other) and all(table.equals(other[name]) for name, table in one.items())
