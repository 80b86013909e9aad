"""What is run next: the study's order, parts of a plan, and what counts as done."""

import os
import signal
from concurrent.futures import Future

import pytest

from beyond_outliers.cli import main
from beyond_outliers.config.rates import Rates
from beyond_outliers.config.run import RunConfig
from beyond_outliers.study import runner
from beyond_outliers.study.study import Study


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Scale confirm with rates chosen at the first two sizes and nothing trained."""
    from beyond_outliers import paths

    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    study = Study("confirm")
    rates = {(size, name): Rates(0.01, 0.02) for size in ("0.08M", "0.16M") for name in study.protocol.optimizers}
    monkeypatch.setattr("beyond_outliers.config.protocol.read_rates", lambda *_: rates)
    return study


def test_sizes_come_in_turn_and_quantized_runs_last(study):
    queue = runner.waiting(study, done=set())
    kinds = list(dict.fromkeys((p.purpose, p.config.size) for p in queue))
    full, quantized = ("full_precision", "qat"), ("0.08M", "0.16M")
    assert kinds == [("sweep", "0.08M"), *((purpose, size) for purpose in full for size in quantized)]
    first = [p.config for p in queue if p.purpose == "full_precision"][:7]
    assert [c.optimizer for c in first[:6]] == list(study.protocol.optimizers)
    assert [c.seed for c in first] == [200] * 6 + [201]


def test_done_runs_are_left_out(study):
    queue = runner.waiting(study, done=set())
    rest = runner.waiting(study, done={queue[0].config.name, queue[9].config.name})
    assert [p.config.name for p in rest] == [p.config.name for i, p in enumerate(queue) if i not in (0, 9)]


def test_parts_of_a_plan_are_disjoint_complete_and_keep_blocks_together(study):
    whole = {p.config.name for p in runner.waiting(study, set())}
    parts = [runner.waiting(study, set(), (i, 3)) for i in (1, 2, 3)]
    names = [{p.config.name for p in part} for part in parts]
    assert set.union(*names) == whole and sum(map(len, names)) == len(whole)
    assert min(map(len, names)) > len(whole) / 4
    for part in parts:
        blocks = [(p.config.size, p.config.seed) for p in part if p.purpose == "full_precision"]
        assert all(blocks.count(block) == 6 for block in blocks)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "x", "1"])
def test_a_part_that_is_none_is_refused(shard, capsys):
    with pytest.raises(SystemExit):
        main(["continue", "--scale", "confirm", "--shard", shard])
    assert "no part of a plan" in capsys.readouterr().err


class AtOnce:
    """A pool that does everything when it is asked to: `fails` names the run that fails."""

    fails = ""

    def __init__(self, *_, **__):
        pass

    def submit(self, task, scale, purpose, config):
        name, future = RunConfig.from_json(config).name, Future()
        if name == self.fails:
            future.set_exception(ValueError("no such format"))
        else:
            future.set_result(name)
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def at_once(study, monkeypatch):
    """The study with runs that take no time, and the lines that it shows."""
    monkeypatch.setattr(runner, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(Study, "collect", lambda self: None)
    monkeypatch.setattr(Study, "choose_what_is_found", lambda self: None)
    said = []
    monkeypatch.setattr(runner.Line, "show", lambda self, text: said.append(text))
    return said


def test_a_study_that_goes_on_says_how_far_it_is(study, at_once):
    n = len(runner.waiting(study, set()))
    assert runner.continue_study(study, jobs=2) == n
    first, last = at_once[0], at_once[-1]
    assert first.startswith(f"confirm: 0 of {n} runs done, now 0.08M-adamw-") and first.count("0.08M-") == 2
    assert last == f"confirm: {n} of {n} runs done"
    assert any(" left, now " in text for text in at_once)


def test_a_failed_run_is_named_with_its_reason_and_the_next_command(study, at_once, monkeypatch, capsys):
    name = runner.waiting(study, set())[3].config.name
    monkeypatch.setattr(AtOnce, "fails", name)
    for skipped in ("check", "prepare_corpus"):
        monkeypatch.setattr(Study, skipped, lambda self: None)
    with pytest.raises(SystemExit) as stopped:
        main(["continue", "--scale", "confirm", "--jobs", "2"])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and f"failed: {name}: ValueError: no such format" in said
    assert "next: make continue SCALE=confirm" in said


def test_sigterm_ends_with_the_code_for_try_again(study, at_once, monkeypatch, capsys):
    monkeypatch.setattr(runner, "wait", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    for skipped in ("check", "prepare_corpus"):
        monkeypatch.setattr(Study, skipped, lambda self: None)
    with pytest.raises(SystemExit) as stopped:
        main(["continue", "--scale", "confirm", "--jobs", "2"])
    assert stopped.value.code == 75 and "To go on: make continue SCALE=confirm" in capsys.readouterr().err
