"""A study that is cut off at a random moment ends, by the same command, with the tables that it would have had."""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

import faults
from beyond_outliers import paths
from beyond_outliers.corpus import tokens
from beyond_outliers.study import Study
from beyond_outliers.train import machine
from checkouts import lend_wheels, made, same_tables, tables, tiny_study

pytestmark = pytest.mark.filterwarnings("ignore::beyond_outliers.config.rates.EdgeWarning", "ignore:left out")


@pytest.fixture(scope="module")
def study(text_file):
    """root -> everything of a study below that folder: text to tables, in seconds."""
    with pytest.MonkeyPatch.context() as patch:

        def at(root):
            for name in ("SCALES", "CACHE", "RESULTS", "RUNS"):
                patch.setattr(paths, name, root / name.lower())
            for folder in (paths.SCALES, paths.CACHE):
                folder.mkdir(parents=True, exist_ok=True)
            lend_wheels(paths.CACHE)
            (paths.SCALES / "own.toml").write_text(tiny_study(text_file, full_precision=[0, 1], qat=[0]))
            return root

        patch.setattr(machine, "git_commit", lambda: "test")
        tokens._open.cache_clear()
        yield at


def make():
    """The steps, in a process of their own: make what is missing."""
    made(Study("own"))


def results(root):
    return tables(root / "runs" / "own" / "results")


def files(root):
    """All that a study has written."""
    found = [file for name in ("cache", "runs") for file in sorted((root / name).rglob("*")) if file.is_file()]
    return [file for file in found if "wheels" not in file.parts and file.name != ".lock"]


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    """The study that was never disturbed: its tables, the sizes of its files, and the seconds that it took."""
    root, started = study(tmp_path_factory.mktemp("whole")), time.perf_counter()
    assert faults.in_child(make) == 0
    assert {"runs.csv", "curves.csv", "ptq.csv", "learning_rates.csv", "common_loss.csv"} <= set(results(root))
    return results(root), [file.stat().st_size for file in files(root)], time.perf_counter() - started


def follow(said):
    """Does what an error says of a damaged run or table."""
    runs = set(re.findall(r"delete the folder (/\S+)", said))
    tables = set(re.findall(r"(/\S+) is damaged.*: remove it, then", said))
    assert len(runs) + len(tables) == 1, said
    for folder in runs:
        shutil.rmtree(folder)
    for file in tables:
        Path(file).unlink()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGTERM", "disk full", "flipped bit"])
def test_a_study_survives(study, whole, tmp_path, fault, capfd, tries=2):
    rng, (undisturbed, sizes, seconds) = random.Random(fault), whole
    for number in range(tries):
        root, said = study(tmp_path / f"{number}"), ""
        if fault == "disk full":
            assert faults.in_child(make, faults.smallest_file_that_does_not_fit(rng.choice(sizes) - 1)) == 1
        else:
            signalled = signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL
            faults.signalled(make, signalled, rng.uniform(0.05, 0.95) * seconds)
        if fault == "flipped bit" and (there := files(root)):
            faults.flip_a_bit(rng.choice(there), rng)
        capfd.readouterr()
        while faults.in_child(make):  # what has ended cannot go on: it is named, with what to do
            said = capfd.readouterr().err
            assert fault == "flipped bit" and "DamagedFile" in said, said
            follow(said)
        assert same_tables(results(root), undisturbed), (fault, number)
        faults.TALLY[f"study: {fault}", "same tables" + ", after what it said" * bool(said)] += 1
        shutil.rmtree(root)
