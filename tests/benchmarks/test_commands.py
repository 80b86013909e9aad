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


def seconds(command: Sequence[str], root: Path) -> tuple[float, float]:
    """Wall-clock and CPU seconds of `beyond-outliers ...` in a clone below `root`, which is made for it."""
    clone = root / "clone"
    subprocess.run(["git", "clone", "--quiet", str(paths.ROOT), str(clone)], check=True)
    (clone / "data" / "cache").mkdir(parents=True, exist_ok=True)
    lend_wheels(clone / "data" / "cache")
    given = {name: value for name, value in os.environ.items() if not name.startswith("BEYOND_OUTLIERS")}
    given |= {"PYTHONPATH": str(clone / "lib"), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    start, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, "-m", "beyond_outliers", *command], cwd=clone, env=given, capture_output=True, text=True
    )
    taken, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return taken, after.children_user + after.children_system - before.children_user - before.children_system


def measure(command: str, scale: str) -> pd.DataFrame:
    """Two rows: `make COMMAND SCALE=scale` by the clock, and on all cores together."""
    cores = len(os.sched_getaffinity(0))
    called = {"figures": "render", "reproduce": "reproduce"}[command]
    with tempfile.TemporaryDirectory() as folder:
        taken = seconds([called, "--scale", scale, "--jobs", str(cores)], Path(folder))
    row = {"benchmark": f"make {command}", "size": scale, "beside": "", "threads": cores, "unit": "s", "rounds": 1}
    times = zip(("the whole command", "its CPU time"), taken, strict=True)
    return pd.DataFrame([row | {"what": what, "value": value, "seconds": value} for what, value in times])


@pytest.mark.skipif(
    bool(subprocess.run(["git", "rev-parse", "HEAD"], cwd=paths.ROOT, capture_output=True).returncode),
    reason="clones this repository, and git finds none here that it may read",
)
def test_a_command_is_timed_and_a_failure_is_told(tmp_path):
    wall, cpu = seconds(["plan", "--scale", "smoke"], tmp_path)
    assert 0 < cpu and 0 < wall < 60
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
