"""`make reproduce` and `make continue`: one line of how far it is, how a failure ends, and the end of all jobs."""

import contextlib
import fcntl
import io
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.cli import main
from beyond_outliers.lock import held
from beyond_outliers.study import workflow
from beyond_outliers.study.study import Study

RUN = "tiny-muon-lr0.01-s0-7bf448f521"


def event(kind, **attributes):
    """A log record of Snakemake."""
    return kind, SimpleNamespace(event=kind, **attributes)


def job(number, rule, log=(), **wildcards):
    """The two records with which a job begins, in Snakemake's order."""
    info = event("job_info", jobid=number, rule_name=rule, wildcards=wildcards, log=list(log))
    return [event("job_started", jobs=[number]), info]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Nothing was run yet."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    return tmp_path / "runs" / "smoke"


def progress(terminal=None, rows=False):
    return workflow.Progress("smoke", rows, terminal or io.StringIO())


def end_of(runs, name):
    (runs / name).mkdir(parents=True)
    (runs / name / "result.json").write_text("{}")


def test_the_line_says_what_is_done_what_runs_and_how_long_the_rest_takes(runs, monkeypatch):
    end_of(runs, "an-older-plan")  # not counted
    found = progress()
    for kind, record in [*job(5, "train", run=RUN, level="light"), *job(8, "common", size="tiny", seed="all")]:
        found.take(kind, record)
    assert found.text() == "smoke: 0 of 26 runs done, now train tiny-muon-lr0.01-s0 light, common tiny all"
    end_of(runs, RUN)
    monkeypatch.setattr(workflow.time, "monotonic", lambda: found.start + 600)
    found.take(*event("job_finished", job_id=5))
    text = found.text()
    assert text.startswith("smoke: 1 of 26 runs done, about ") and text.endswith(" left, now common tiny all")


def test_rows_of_the_tables_count_where_that_is_asked_for(runs):
    name = Study("smoke").planned()[0].config.name
    (runs / "results").mkdir(parents=True)
    pd.DataFrame([{"run": name, "val_loss": 3.0}]).to_csv(runs / "results" / "runs.csv", index=False)
    assert progress().text() == "smoke: 0 of 26 runs done" and progress(rows=True).text() == "smoke: 1 of 26 runs done"


def test_a_failure_says_which_job_and_the_last_line_of_its_log(runs, tmp_path):
    log, terminal = tmp_path / "run.log", io.StringIO()
    log.write_text("Traceback\n  File x\nValueError: context must be positive, not -64\n\n")
    found = progress(terminal)
    for kind, record in [
        *job(5, "train", [log], run=RUN, level="full"),
        *job(6, "collect", [tmp_path / "none"], size="tiny"),
    ]:
        found.take(kind, record)
    for number in (5, 5, 6):  # a job that is tried again says so once
        found.take(*event("job_error", jobid=number, rule_name="train"))
    lines = terminal.getvalue().splitlines()
    assert [line for line in lines if line[:7] in ("failed:", "reason:")] == [
        "failed: train tiny-muon-lr0.01-s0 full",
        "reason: ValueError: context must be positive, not -64",
        "failed: collect tiny",
        "reason: it ended without a word, as when it is killed",
    ]


def test_a_workflow_that_cannot_begin_says_why(runs):
    terminal = io.StringIO()
    progress(terminal).take(
        *event("error", msg='WorkflowError in file "Snakefile", line 2:\nno such scale', exception="x")
    )
    assert "reason: no such scale" in terminal.getvalue().splitlines()


def test_without_a_terminal_there_is_a_line_every_few_minutes(runs, monkeypatch):
    clock, terminal = [0.0], io.StringIO()
    monkeypatch.setattr(workflow.time, "monotonic", lambda: clock[0])
    found = progress(terminal)
    for clock[0] in (0.0, 100.0, 200.0):
        found.take(*event("progress"))
    assert len(terminal.getvalue().splitlines()) == 2


def read_all(terminal):
    """What has been written to a terminal, as its other end reads it."""
    said = ""
    with contextlib.suppress(OSError):  # it is closed
        while select.select([terminal], [], [], 0.2)[0]:
            said += os.read(terminal, 10_000).decode()
    return said


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_on_a_terminal_one_line_is_written_over_and_fits(runs, columns):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    found = progress(os.fdopen(theirs, "w"))
    for number in range(3):
        for kind, record in job(number, "train", run=RUN, level="full"):
            found.take(kind, record)
    said = read_all(ours)
    shown = said.split("\r\033[K")
    assert shown[0] == "" and "\n" not in said and len(shown) > 3
    assert max(map(len, shown)) < columns and (columns == 200 or shown[-1].endswith("..."))
    found.close()
    assert read_all(ours).endswith("smoke: 0 of 26 runs done\r\n")
    os.close(ours)


@pytest.mark.parametrize(
    ("seconds", "done", "remaining", "said"),
    [
        (600, 0, 5, ""),  # no pace yet
        (600, 5, 0, ""),
        (600, 1, 2, "about 20 min left"),
        (600, 1, 0.01, "about 1 min left"),
        (3600, 1, 2, "about 2.0 hours left"),
    ],
)
def test_the_time_left_is_that_of_the_pace_so_far(seconds, done, remaining, said):
    assert workflow.left(seconds, done, remaining) == said


@pytest.fixture
def snakemake(runs, monkeypatch):
    """What is started in Snakemake's place: a script that ends with a status; `commands`: what would have been."""
    start, commands = subprocess.Popen, []

    def instead(status, script="pass"):
        def popen(command, **rest):
            commands.append((command, rest))
            return start([sys.executable, "-c", f"import sys, time; {script}; sys.exit({status})"], **rest)

        monkeypatch.setattr(subprocess, "Popen", popen)
        return commands

    return instead


def test_the_status_of_a_failure_is_handed_on_with_the_log_and_the_next_command(snakemake, runs, capsys):
    snakemake(1)
    assert main(["reproduce", "--scale", "smoke", "--jobs", "1"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == [
        f"log:    {runs / 'reproduce.log'}",
        "next:   make reproduce SCALE=smoke goes on from what is done",
    ]


def test_what_is_not_asked_for_is_not_taken_from_the_environment(snakemake, monkeypatch):
    """A profile for other work would submit to a cluster."""
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "/of/other/work")
    commands = snakemake(0)
    assert workflow.reproduce(Study("smoke"), 1) == 0
    ((command, rest),) = commands
    assert "SNAKEMAKE_PROFILE" not in rest["env"] and rest["env"]["PATH"] == os.environ["PATH"]
    assert command[command.index("--workflow-profile") + 1] == "none"


def test_jobs_are_as_many_as_processors_may_be_used(snakemake, monkeypatch):
    commands = snakemake(0)
    monkeypatch.setattr(workflow, "processors", lambda: 3)
    for jobs, executor, wanted in ((None, "local", ["--cores", "3"]), (5, "local", ["--cores", "5"])):
        assert workflow.reproduce(Study("smoke"), jobs, executor) == 0
        command = commands[-1][0]
        place = command.index(wanted[0])
        assert command[place : place + 2] == wanted and command[command.index("--executor") + 1] == executor


def test_two_at_once_are_refused_by_name(snakemake, runs, capsys):
    snakemake(0)
    with held(runs / ".workflow.lock"):
        assert workflow.reproduce(Study("smoke"), 1) == 1
    assert f"is held by process {os.getpid()} on" in capsys.readouterr().err
    assert workflow.reproduce(Study("smoke"), 1) == 0  # free again


def test_a_study_ends_when_its_hours_are_over(snakemake, capsys):
    snakemake(0, "time.sleep(60)")
    start = time.monotonic()
    assert workflow.reproduce(Study("smoke"), 1, hours=1 / 3600, rows=1) == 0
    assert time.monotonic() - start < 30 and "To go on: make continue SCALE=smoke" in capsys.readouterr().err


def gone(process: int, seconds: float = 20) -> bool:
    """Whether it ends soon: it was told to, nobody waited for it, and a busy machine takes its time."""
    stat = Path(f"/proc/{process}/stat")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def at_a_terminal():
    """Signals as at a terminal: under nohup, or in the background, the tests have begun with some ignored."""
    ends = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in ends.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_what_ends_it_ends_its_jobs(monkeypatch, runs, tmp_path, capsys, number, status):
    """In Snakemake's place a shell with a job that would go on for a minute."""
    start, job = subprocess.Popen, tmp_path / "job"
    script = f"sleep 60 & echo $$ $! > {job}.tmp; mv {job}.tmp {job}; wait"
    monkeypatch.setattr(subprocess, "Popen", lambda _, **rest: start(["sh", "-c", script], **rest))
    sleep = time.sleep

    def until_there(seconds):
        sleep(0.01)
        if job.exists():
            os.kill(os.getpid(), number)

    monkeypatch.setattr(workflow.time, "sleep", until_there)
    assert workflow.reproduce(Study("smoke"), 1) == status
    monkeypatch.undo()
    assert f"interrupted by {number.name}. To go on: make reproduce SCALE=smoke" in capsys.readouterr().err
    leader, below = job.read_text().split()
    assert f"process {leader} on " in (runs / ".workflow.lock").read_text()
    assert gone(int(below)), "the job's own process is still there"


@pytest.mark.usefixtures("at_a_terminal")
def test_under_nohup_a_closed_terminal_ends_nothing(snakemake):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    snakemake(0, "import os, signal; os.kill(os.getppid(), signal.SIGHUP); time.sleep(0.5)")
    assert workflow.reproduce(Study("smoke"), 1) == 0
