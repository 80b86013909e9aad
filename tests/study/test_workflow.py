"""`make reproduce`: what Snakemake's log says, in one line, and how a failure ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from beyond_outliers import paths
from beyond_outliers.cli import main
from beyond_outliers.study import progress, workflow
from beyond_outliers.study.study import Study
from beyond_outliers.train.lock import held

STARTED = """Building DAG of jobs...
[Wed Nov 25 09:44:41 2026]
localrule train:
    input: /out/corpus.json
    output: /out/tiny-muon-lr0.01-s0-7bf448f521/result.json
    jobid: 5
    reason: Missing output files: /out/result.json
    wildcards: run=tiny-muon-lr0.01-s0-7bf448f521
    priority: 2020
rule measure:
    jobid: 8
    wildcards: size=tiny, purpose=sweep
"""
ENDED = """Finished jobid: 8 (Rule: measure)
4 of 27 steps (15%) done
"""
BROKEN = """Traceback (most recent call last):
  File "loop.py", line 3, in train
ValueError: context must be positive, not -64
RuleException:
CalledProcessError in file "/out/Snakefile", line 97:
Command 'set -euo pipefail; python' returned non-zero exit status 1.
[Wed Nov 25 09:49:06 2026]
Error in rule train:
    message: None
    jobid: 5
    output: /out/tiny-muon-lr0.01-s0-7bf448f521/result.json
WorkflowError:
At least one job did not complete successfully.
"""


def log_of(*texts):
    log = workflow.Log()
    for text in texts:
        log.feed(text.splitlines(keepends=True))
    return log


def test_the_log_says_what_runs_and_how_far_it_is():
    assert log_of(STARTED).said() == "now train tiny-muon-lr0.01-s0, measure tiny sweep"
    log = log_of(STARTED, ENDED)
    assert log.said() == "step 4 of 27, now train tiny-muon-lr0.01-s0" and not log.failed
    assert log_of("Building DAG of jobs...").said() == ""


def test_a_failure_ends_with_run_reason_log_and_the_next_command(tmp_path):
    file = tmp_path / "reproduce.log"
    file.write_text(STARTED + ENDED + BROKEN)
    lines = workflow.failure("smoke", log_of(STARTED, ENDED, BROKEN), file).splitlines()
    assert lines == [
        "failed: train tiny-muon-lr0.01-s0-7bf448f521",
        "reason: ValueError: context must be positive, not -64",
        f"log:    {file}",
        "next:   make reproduce SCALE=smoke goes on from what is done",
    ]


def test_a_killed_job_and_one_that_failed_earlier_have_their_own_reasons():
    killed = BROKEN.replace("returned non-zero exit status 1", "died with <Signals.SIGKILL: 9>").replace(": 5", ": 8")
    assert log_of(STARTED, BROKEN, killed[killed.index("RuleException") :]).failed == [
        ("train tiny-muon-lr0.01-s0-7bf448f521", "ValueError: context must be positive, not -64"),
        ("measure tiny sweep", "killed by SIGKILL"),
    ]


def test_a_damaged_file_is_the_reason():
    said = "DamagedFile: /out/metrics.csv is damaged: delete the folder /out and run the same command again"
    log = log_of(STARTED, BROKEN.replace("ValueError: context must be positive, not -64", said))
    assert log.failed == [("train tiny-muon-lr0.01-s0-7bf448f521", said)]


class Kept(progress.Line):
    """A line that keeps all that it is told."""

    def __init__(self):
        super().__init__()
        self.said, self.noted = [], []

    def show(self, text):
        self.said.append(text)

    def note(self, text):
        self.noted.append(text)


@pytest.fixture
def snakemake(tmp_path, monkeypatch):
    """What is started in Snakemake's place: a script that prints a log and ends with a status."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(workflow, "POLL", 0.01)
    start = subprocess.Popen

    def instead(text, status):
        script = f"import sys, time; print({text!r}, flush=True); time.sleep(0.5); sys.exit({status})"
        monkeypatch.setattr(subprocess, "Popen", lambda command, **rest: start([sys.executable, "-c", script], **rest))

    return instead


def test_reproducing_shows_runs_and_steps_and_logs_the_rest(snakemake, tmp_path):
    folder = tmp_path / "runs" / "smoke"
    name = Study("smoke").planned()[0].config.name
    (folder / name).mkdir(parents=True)
    (folder / name / "result.json").write_text("{}")
    (folder / "another").mkdir()
    (folder / "another" / "result.json").write_text("{}")  # of an older plan: not counted
    snakemake(STARTED + ENDED, 0)
    line = Kept()
    assert workflow.reproduce(Study("smoke"), 1, line=line) == 0
    assert "smoke: 1 of 26 runs trained, step 4 of 27, now train tiny-muon-lr0.01-s0" in line.said
    assert STARTED.splitlines()[2] in (folder / "reproduce.log").read_text()
    assert line.noted == [f"scale smoke: what runs is logged in {folder / 'reproduce.log'}"]


def test_the_status_of_a_failure_is_handed_on(snakemake, capsys):
    snakemake(STARTED + BROKEN, 1)
    assert main(["reproduce", "--scale", "smoke", "--jobs", "1"]) == 1
    said = capsys.readouterr().err
    assert "reason: ValueError: context must be positive" in said and "next:   make reproduce SCALE=smoke" in said


def test_two_at_once_are_refused_by_name(snakemake, tmp_path):
    snakemake(STARTED + ENDED, 0)
    line = Kept()
    with held(tmp_path / "runs" / "smoke" / ".workflow.lock"):
        assert workflow.reproduce(Study("smoke"), 1, line=line) == 1
    assert len(line.noted) == 1 and f"is held by process {os.getpid()} on" in line.noted[0]
    assert workflow.reproduce(Study("smoke"), 1, line=line) == 0  # free again


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
def test_what_ends_it_ends_its_jobs(monkeypatch, tmp_path, number, status):
    """In Snakemake's place a shell with a job that would go on for a minute."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(workflow, "POLL", 0.01)
    start, job = subprocess.Popen, tmp_path / "job"
    script = f"sleep 60 & echo $$ $! > {job}.tmp; mv {job}.tmp {job}; wait"
    monkeypatch.setattr(subprocess, "Popen", lambda _, **rest: start(["sh", "-c", script], **rest))
    monkeypatch.setattr(workflow.Log, "feed", lambda log, lines: job.exists() and os.kill(os.getpid(), number))
    line = Kept()
    assert workflow.reproduce(Study("smoke"), 1, line=line) == status
    assert line.noted[-1] == f"interrupted by {number.name}. To go on: make reproduce SCALE=smoke"
    leader, below = job.read_text().split()
    assert f"process {leader} on " in (tmp_path / "runs" / "smoke" / ".workflow.lock").read_text()
    assert gone(int(below)), "the job's own process is still there"


@pytest.mark.usefixtures("at_a_terminal")
def test_under_nohup_a_closed_terminal_ends_nothing(snakemake, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    snakemake(STARTED + ENDED, 0)
    feed = workflow.Log.feed
    monkeypatch.setattr(workflow.Log, "feed", lambda *these: (os.kill(os.getpid(), signal.SIGHUP), feed(*these)))
    assert workflow.reproduce(Study("smoke"), 1, line=Kept()) == 0


def test_every_executor_is_a_choice_of_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["reproduce", "--scale", "smoke", "--executor", "cloud"])
    said = capsys.readouterr().err
    assert all(f"'{name}'" in said for name in workflow.EXECUTORS)
