"""Runs under faults: cut off, torn, full, killed or flipped, a run ends as if nothing had been or says what is damaged.

A few faults of every kind in `make test`, all of them in `make test-all`.
"""

import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import faults
from beyond_outliers import paths
from beyond_outliers.checksums import DamagedFile
from beyond_outliers.lock import RunHeld, held
from beyond_outliers.train import load_result, machine, run_folder, train
from beyond_outliers.train import loop as training
from beyond_outliers.train.resume import KEYS

COMPILED = """
import pathlib, sys
from beyond_outliers import paths
from beyond_outliers.config import RunConfig
from beyond_outliers.train import train
config, root, cache = sys.argv[1:]
paths.CACHE = pathlib.Path(cache)
train(RunConfig.from_json(config), root=pathlib.Path(root), compile=True, progress=False)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "git_commit", lambda: "test")


@pytest.fixture
def tiny(run_config):
    """A run of eleven steps, three of them with an evaluation."""
    return run_config.replace(tokens_per_parameter=0.13, validation_tokens=256)


def trained(config, root):
    return lambda: train(config, root=root, progress=False)


@pytest.fixture
def whole(tiny, tmp_path):
    """The undisturbed run: name -> bytes of its weights, and its losses."""
    return outcome(train(tiny, root=tmp_path / "whole", progress=False))


def outcome(result):
    weights = {file.name: file.read_bytes() for file in sorted((result.folder / "weights").iterdir())}
    return weights, result.metrics[["step", "train_loss", "val_loss"]].to_csv(), result.row["val_loss"]


def goes_on(config, root, whole):
    """Trains on without faults; the run must end as the undisturbed one."""
    folder = run_folder(config, root)
    ended = (folder / "result.json").exists()  # the fault came after the result
    try:
        result = train(config, root=root, progress=False)
    except DamagedFile as damage:  # only what has ended cannot go on
        assert ended and f"delete the folder {folder} and run the same command again" in str(damage)
        return
    assert outcome(result) == whole
    assert ended or not [*folder.glob("**/*.tmp"), *folder.glob("state*")]


def sweep(kind, every, config, whole, tmp_path):
    number, code = 1 + every // 2, 1
    while code != 0:
        root = tmp_path / f"{number}"
        code = faults.in_child(trained(config, root), faults.at_change(kind, number, root))
        assert code in (0, 1, faults.DIED, faults.PASSED_BY)
        goes_on(config, root, whole)
        shutil.rmtree(root)
        number += every
    assert number > 30  # so many changes were there to be hit


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_run_survives_a_fault_at_changes_of_its_folder(tiny, whole, tmp_path, kind, every):
    sweep(kind, every, tiny, whole, tmp_path)


@pytest.mark.parametrize("size", [100, 5_000, pytest.param(20_000, marks=pytest.mark.slow), 60_000, 120_000])
def test_a_run_survives_a_full_disk(tiny, whole, tmp_path, size, capfd):
    code = faults.in_child(trained(tiny, tmp_path), faults.smallest_file_that_does_not_fit(size))
    assert code == 1, "the disk was not full"
    assert re.search(r"Error: .*(large|space|MB free)", capfd.readouterr().err)
    goes_on(tiny, tmp_path, whole)


@pytest.mark.parametrize(
    ("optimizer", "scheme", "tries"),
    [
        ("adamw", None, 2),
        pytest.param("adamw", None, 18, marks=pytest.mark.exhaustive),
        pytest.param("soap", None, 20, marks=pytest.mark.exhaustive),
        pytest.param("adamw", "quest", 4, marks=pytest.mark.slow),
    ],
)
def test_a_run_survives_being_killed_at_random_moments(run_config, tmp_path, optimizer, scheme, tries):
    quantization = {"scheme": scheme, "weights": "int4", "activations": "int4"} if scheme else None
    config = run_config.replace(optimizer=optimizer, lr=1e-3, evaluations=12, quantization=quantization)
    started = time.perf_counter()
    whole = outcome(train(config, root=tmp_path / "whole", progress=False))
    taken, rng = time.perf_counter() - started, random.Random(tries)
    for number in range(tries):
        root = tmp_path / f"{number}"
        while load_result(run_folder(config, root)) is None and faults.signalled(
            trained(config, root), signal.SIGKILL, rng.uniform(0.1, 1) * taken
        ):
            pass
        goes_on(config, root, whole)


def newest_step(folder):
    """The step of the newest state in a run's folder, the last step of a run that has ended, else 0."""
    states = [int(file.stem.partition("-")[2]) for file in folder.glob("state-*.pt")]
    return max(states, default=10**6 if (folder / "result.json").exists() else 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("tries", [3])
def test_a_compiled_run_survives_being_killed_as_often_as_it_gets_on(run_config, tmp_path, monkeypatch, tries):
    """Every SIGKILL comes after a state that the process itself has saved; none is forked, the compiler has threads."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    config = run_config.replace(evaluations=40, tokens_per_parameter=max(0.5, tries / 10))
    rng, folder = random.Random(tries), run_folder(config, tmp_path / "parts")

    def compiled(root):
        command = [sys.executable, "-c", COMPILED, config.to_json(), str(root), str(paths.CACHE)]
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert compiled(tmp_path / "whole").wait() == 0
    killed = 0
    while newest_step(folder) < 10**6:
        before, child = newest_step(folder), compiled(tmp_path / "parts")
        while killed < tries and newest_step(folder) == before and child.poll() is None:
            time.sleep(0.001)
        if killed < tries:
            time.sleep(rng.uniform(0, 0.03))
            child.kill()
        assert child.wait() in (0, -signal.SIGKILL)
        killed += child.returncode == -signal.SIGKILL
    assert killed == tries, "it was faster than the signals"
    found, whole = (load_result(run_folder(config, tmp_path / name)) for name in ("parts", "whole"))
    assert whole.row["compiled"] and outcome(found) == outcome(whole)


@pytest.mark.parametrize("tries", [2, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_sigterm_saves_the_step_that_it_came_in(run_config, tmp_path, capfd, tries):
    config = run_config.replace(evaluations=1)  # there is no other state to go on from
    started = time.perf_counter()
    whole = outcome(train(config, root=tmp_path / "whole", progress=False))
    taken, rng = time.perf_counter() - started, random.Random(tries)
    for number in range(tries):
        root = tmp_path / f"{number}"
        code = faults.signalled(trained(config, root), signal.SIGTERM, rng.uniform(0.3, 0.7) * taken)
        if code == training.TRY_AGAIN:
            assert f"SIGTERM: {config.name} is saved at step " in capfd.readouterr().err
            assert len(list(run_folder(config, root).glob("state-*.pt"))) == 1
        else:  # before the first step, or after the last one
            assert code in (0, -signal.SIGTERM)
        goes_on(config, root, whole)


def test_a_run_is_saved_by_time_as_well(run_config, tmp_path, monkeypatch):
    """Far from any evaluation, and between two logged losses."""
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(training, "LOGGED_STEPS", 4)
    config = run_config.replace(evaluations=1)
    whole = outcome(train(config, root=tmp_path / "whole", progress=False))
    step = training._Run._step

    def killed(self):
        if self.step == 19:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training._Run, "_step", killed)
        train(config, root=tmp_path / "parts", progress=False)
    saved = [file.name for file in sorted(run_folder(config, tmp_path / "parts").glob("state*"))]
    assert saved == ["state-000018.pt", "state-000019.pt"]
    assert outcome(train(config, root=tmp_path / "parts", progress=False)) == whole


def interrupted(config, root, at=10):
    """A run that ended without a word in step `at`; its folder."""

    def work():
        step = training._Run._step
        training._Run._step = lambda run: os._exit(faults.DIED) if run.step == at else step(run)
        train(config, root=root, progress=False)

    assert faults.in_child(work) == faults.DIED
    return run_folder(config, root)


@pytest.mark.parametrize("tries", [6, pytest.param(60, marks=pytest.mark.exhaustive)])
def test_a_flipped_bit_of_an_interrupted_run_is_never_silent(tiny, whole, tmp_path, capfd, tries):
    rng, folder = random.Random(tries), interrupted(tiny, tmp_path / "interrupted")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"]
    assert len(files) == 7  # config, metrics, two states, two weights, sums
    for number in range(tries):
        root = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "interrupted", root)
        hit = rng.choice(files)
        faults.flip_a_bit(root / hit.relative_to(tmp_path / "interrupted"), rng)
        result = train(tiny, root=root, progress=False)
        said = capfd.readouterr().err
        if hit.parent.name == "weights" and hit == min(files, key=lambda f: (f.parent.name != "weights", f.name)):
            # before both states: the run cannot make it again, and says so at once and when it is read
            assert f"{hit.name} is damaged" in said
            with pytest.raises(DamagedFile, match=rf"{hit.name} is damaged.*delete the folder"):
                result.load_model(int(hit.stem))
        else:
            assert outcome(result) == whole, hit
            assert hit.name in said or hit.name in ("metrics.csv", "config.json") or "2" in hit.name, hit


def read_all(folder):
    result = load_result(folder)
    for step in result.evaluations.step:
        result.load_model(int(step))


@pytest.mark.parametrize("tries", [8, pytest.param(60, marks=pytest.mark.exhaustive)])
def test_a_flipped_bit_of_a_finished_run_is_never_silent(tiny, tmp_path, tries):
    rng, folder = random.Random(tries), train(tiny, root=tmp_path, progress=False).folder
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"]
    read_all(folder)
    for _ in range(tries):
        hit = rng.choice(files)
        before = hit.read_bytes()
        faults.flip_a_bit(hit, rng)
        with pytest.raises(DamagedFile):
            read_all(folder)
        hit.write_bytes(before)
    read_all(folder)


def without_states(config, root):
    """The folder of an interrupted run, its states and sums taken out, as of a version that wrote none."""
    folder = interrupted(config, root)
    for file in (*folder.glob("state-*.pt"), folder / "SHA256SUMS"):
        file.unlink()
    return folder


@pytest.mark.parametrize("step", [10**6, 0, -1, "10"])
def test_a_state_that_claims_an_impossible_step_is_refused(tiny, whole, tmp_path, capfd, step):
    state = dict.fromkeys(KEYS, 0) | {"step": step, "run_id": tiny.run_id}
    torch.save(state, without_states(tiny, tmp_path) / "state-000009.pt")
    goes_on(tiny, tmp_path, whole)
    assert "state-000009.pt" in (said := capfd.readouterr().err) and "begins again" in said


def test_nothing_unpickles(tiny, whole, tmp_path, capfd):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "PWNED"),)

    (without_states(tiny, tmp_path) / "state-000009.pt").write_bytes(pickle.dumps(Harmful()))
    goes_on(tiny, tmp_path, whole)
    assert "state-000009.pt cannot be read" in capfd.readouterr().err and not (tmp_path / "PWNED").exists()


def test_the_second_of_two_processes_waits_and_says_for_whom(tiny, whole, tmp_path, capfd):
    first = faults.start(trained(tiny, tmp_path))
    second = faults.start(trained(tiny, tmp_path))
    assert (faults.ended(first), faults.ended(second)) == (0, 0)
    said = capfd.readouterr().err
    assert f"is held by process {first} on " in said or f"is held by process {second} on " in said or not said
    goes_on(tiny, tmp_path, whole)


def test_a_lock_is_free_when_its_holder_was_killed(tmp_path, capfd):
    def work():
        with held(tmp_path / ".lock"):
            (tmp_path / "holding").touch()
            time.sleep(60)

    child = faults.start(work)
    while not (tmp_path / "holding").exists():
        time.sleep(0.01)
    with pytest.raises(RunHeld, match=rf"held by process {child} on \S+ since 20.*UTC: wait for it, or end it"):
        held(tmp_path / ".lock", wait=False).__enter__()
    os.kill(child, signal.SIGKILL)
    faults.ended(child)
    with held(tmp_path / ".lock", wait=False):
        assert capfd.readouterr().err == ""
