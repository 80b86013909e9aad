"""How long the two commands take that a reader waits for, in a clone of the last commit, on all cores.

Each is the command behind `make`, so that the environment that is there serves: `figures` draws the pages of the
committed tables of a scale, `reproduce` trains, measures and draws a whole study (a quarter of an hour).
"""

import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from beyond_outliers import paths
from checkouts import lend_wheels


def seconds(command: Sequence[str], root: Path) -> float:
    """Wall-clock seconds of `beyond-outliers ...` in a clone below `root`, which is made for it."""
    clone = root / "clone"
    subprocess.run(["git", "clone", "--quiet", str(paths.ROOT), str(clone)], check=True)
    (clone / "data" / "cache").mkdir(parents=True, exist_ok=True)
    lend_wheels(clone / "data" / "cache")
    given = {name: value for name, value in os.environ.items() if not name.startswith("BEYOND_OUTLIERS")}
    given |= {"PYTHONPATH": str(clone / "lib"), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "beyond_outliers", *command], cwd=clone, env=given, capture_output=True, text=True
    )
    taken = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return taken


def measure(command: str, scale: str) -> pd.DataFrame:
    """One row: `make COMMAND SCALE=scale`."""
    cores = len(os.sched_getaffinity(0))
    called = {"figures": "render", "reproduce": "reproduce"}[command]
    with tempfile.TemporaryDirectory() as folder:
        taken = seconds([called, "--scale", scale, "--jobs", str(cores)], Path(folder))
    row = {"benchmark": f"make {command}", "size": scale, "what": "the whole command", "beside": ""}
    return pd.DataFrame([row | {"threads": cores, "unit": "s", "value": taken, "seconds": taken, "rounds": 1}])


@pytest.mark.skipif(
    bool(subprocess.run(["git", "rev-parse", "HEAD"], cwd=paths.ROOT, capture_output=True).returncode),
    reason="clones this repository, and git finds none here that it may read",
)
def test_a_command_is_timed_and_a_failure_is_told(tmp_path):
    assert 0 < seconds(["plan", "--scale", "smoke"], tmp_path) < 60
    with pytest.raises(RuntimeError, match="unknown scale 'nowhere'"):
        seconds(["plan", "--scale", "nowhere"], tmp_path / "other")


def test_ratios_of_a_busy_machine_are_shown_and_not_written(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("bench", Path(__file__).with_name("bench.py"))
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    import benchmarking

    written, clock = [], itertools.count(step=1e6)
    monkeypatch.setattr(benchmarking, "write", written.append)
    monkeypatch.setattr(bench, "busy_elsewhere", lambda: next(clock))
    row = {"benchmark": "b", "size": "s", "what": "w"}
    monkeypatch.setattr(
        bench.importlib, "import_module", lambda _: SimpleNamespace(measure=lambda: pd.DataFrame([row]))
    )
    with pytest.raises(SystemExit, match=r"cores were busy; valid: at most 0\.2, or make bench FORCE=1"):
        bench.main(["--only", "training"])
    assert not written and "cores busy, load" in capsys.readouterr().out
    bench.main(["--only", "training", "--force"])
    assert len(written) == 1
