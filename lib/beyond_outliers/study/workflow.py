"""`make reproduce`: Snakemake does the work, its log goes to a file, and the terminal shows one line.

A failure ends with what failed, why, and the command that goes on. Whatever ends this process ends its jobs, too, which
save what they have; only SIGKILL leaves them at work, and the lock then names them.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from beyond_outliers import paths
from beyond_outliers.study.mend import mend
from beyond_outliers.study.plan import all_runs
from beyond_outliers.study.progress import Line, left, sentence, shortened, work
from beyond_outliers.study.study import Study
from beyond_outliers.train.lock import TRY_AGAIN, RunHeld, held, sign

POLL = 1.0  # seconds
# what Snakemake is told before the number of jobs
EXECUTORS = {
    "local": ["--cores"],
    "slurm": ["--executor", "slurm", "--retries", "3", "--latency-wait", "60", "--jobs"],
}
JOB = re.compile(r"^(?:local)?(?:rule|checkpoint) (\w+):$")
WILDCARDS = re.compile(r"^ +wildcards: (.+)$")
JOBID = re.compile(r"^ +jobid: (\d+)$")
FINISHED = re.compile(r"^Finished jobid: (\d+) ")
STEPS = re.compile(r"^(\d+) of (\d+) steps \(")
FAILED = re.compile(r"^Error in rule (\w+):$")
REASON = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Results|Failed|File|Held|Exit|Interrupt)(?:: .*)?$")

KILLED = re.compile(r"died with <Signals\.(\w+)")


class Log:
    """What Snakemake's log says: the jobs that run, how many steps are done of how many, what failed and why."""

    def __init__(self):
        self.running: dict[str, str] = {}  # job id -> "train run=..."
        self.done, self.total = 0, 0
        self.failed: list[tuple[str, str]] = []  # (job, reason)
        self._names: dict[str, str] = {}
        self._rule = self._wildcards = self._broken = ""
        self._reason = ""  # the last line of a traceback so far

    def feed(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._one(line.rstrip())

    def _one(self, line: str) -> None:
        if found := JOB.match(line):
            self._rule, self._wildcards, self._broken = found[1], "", ""
        elif found := FAILED.match(line):
            self._rule, self._broken = "", found[1]
        elif found := JOBID.match(line):
            if self._rule:
                self._start(found[1])
            elif self._broken:
                self.failed.append((self._names.get(found[1], self._broken), self._reason))
                self.running.pop(found[1], None)
                self._broken = self._reason = ""
        elif found := WILDCARDS.match(line):  # they stand behind the job's id
            self._wildcards = found[1]
            if self._rule and self.running:
                self._start(next(reversed(self.running)))
        elif found := FINISHED.match(line):
            self.running.pop(found[1], None)
        elif found := STEPS.match(line):
            self.done, self.total = int(found[1]), int(found[2])
        elif found := KILLED.search(line):
            self._reason = f"killed by {found[1]}"
        elif REASON.match(line):
            self._reason = line

    def said(self) -> str:
        steps = f"step {self.done} of {self.total}" if self.total else ""
        return sentence(steps, f"now {shortened(self.running.values())}" if self.running else "")

    def _start(self, job: str) -> None:
        values = [part.partition("=")[2] for part in self._wildcards.split(", ") if part]
        self.running[job] = self._names[job] = " ".join([self._rule, *values])


def reproduce(
    study: Study, jobs: int, executor: str = "local", options: Sequence[str] = (), line: Line | None = None
) -> int:
    """Runs the workflow of a scale, as the only one at work on it; returns Snakemake's exit status.

    Writes data/runs/SCALE/reproduce.log. jobs: cores, or jobs of a cluster, side by side. executor: a key of EXECUTORS;
    options: more for Snakemake. Its own lock outlives a process that was killed; this one ends with its holder.
    """
    study.check()
    line = line or Line()
    try:
        with held(study.runs_folder / ".workflow.lock", wait=False) as lock:
            for said in mend(study):
                line.note(said)
            where = [*EXECUTORS[executor], str(jobs), *(how_to_ask() if executor == "slurm" else [])]
            return _run(study, executor, where, list(options), line, lock)
    except RunHeld as other:
        line.note(str(other))
        return 1


def _run(study: Study, executor: str, where: list[str], options: list[str], line: Line, lock: TextIO) -> int:
    log = Log()
    file = study.runs_folder / "reproduce.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(paths.ROOT / "Snakefile"), "--nolock", *where]
    command += ["--directory", str(paths.OUTPUT), "--config", f"scale={study.scale}", "--rerun-incomplete", *options]
    line.note(f"scale {study.scale}: what runs is logged in {file}")
    pace = Pace(study.scale)
    with file.open("w") as written, file.open() as read, _asked_to_end() as asked:
        process = subprocess.Popen(
            command,
            stdout=written,
            stderr=subprocess.STDOUT,
            cwd=paths.ROOT,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # a group of its own, so that all of it can be told
        )
        sign(lock, process.pid)
        try:
            while (status := process.poll()) is None and not asked:
                log.feed(read)
                line.show(sentence(pace.said(), log.said()))
                time.sleep(POLL)
            if status is None:
                end(process, executor)
                process.wait()
                line.note(f"interrupted by {asked[0].name}. To go on: make reproduce SCALE={study.scale}")
                return TRY_AGAIN if asked[0] == signal.SIGTERM else 128 + asked[0]
        finally:
            end(process, executor)
        log.feed(read)
    line.close()
    if status:
        line.note(failure(study.scale, log, file))
    return status


def how_to_ask() -> list[str]:
    """How Snakemake asks Slurm after its jobs, where that keeps no accounts: then `sacct` knows nothing."""
    try:
        asked = subprocess.run(["sacct", "--noheader", "--allocations"], capture_output=True)
        return ["--slurm-status-command", "squeue"] if asked.returncode else []
    except FileNotFoundError:
        return []  # Snakemake says that there is no Slurm, or takes squeue itself


@contextlib.contextmanager
def _asked_to_end() -> Iterator[list[signal.Signals]]:
    """The signals so far that ask to end: Ctrl-C, SIGTERM, a closed terminal. The second one ends at once."""
    asked: list[signal.Signals] = []

    def ask(number: int, _: object) -> None:
        asked.append(signal.Signals(number))
        if len(asked) > 1:
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    ours = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup stays nohup
    before = {number: signal.signal(number, ask) for number in ours}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(process: subprocess.Popen, executor: str) -> None:
    """Ends Snakemake, if it is still there, and its jobs: runs in training are saved. On a cluster it cancels them."""
    with contextlib.suppress(ProcessLookupError):
        if executor == "local" or process.poll() is not None:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.send_signal(signal.SIGINT)


class Pace:
    """How many runs are trained of all, and how long the rest takes at the pace of those that ended meanwhile."""

    def __init__(self, scale: str):
        self.scale, self.start = scale, time.monotonic()
        self.trained: set[str] = set()
        self.costs: dict[str, float] = {}
        self._look()
        self.before = self.trained

    def _look(self) -> None:
        trained = {file.parent.name for file in (paths.RUNS / self.scale).glob("*/result.json")}
        if trained != self.trained or not self.costs:
            self.costs = {planned.config.name: work(planned.config) for planned in all_runs(Study(self.scale))}
        self.trained = trained

    def said(self) -> str:
        self._look()
        ended, there = self.trained & set(self.costs), set(self.costs)
        made, rest = (sum(self.costs[name] for name in names) for names in (ended - self.before, there - ended))
        time_left = left(time.monotonic() - self.start, made, rest)
        return sentence(
            f"{self.scale}: {len(ended)} of {len(there)} runs trained", time_left and f"{time_left} of training"
        )


def failure(scale: str, log: Log, file: Path) -> str:
    """What failed, why, and what to do: the text with which a workflow that failed ends."""
    lines = file.read_text().splitlines()
    failed = log.failed or [("the workflow", next((li for li in reversed(lines) if REASON.match(li)), ""))]
    said = []
    for job, reason in dict.fromkeys(failed):
        said += [f"failed: {job}", f"reason: {reason or 'see the end of the log'}"]
    go_on = f"make reproduce SCALE={scale} goes on from what is done"
    return "\n".join([*said, f"log:    {file}", f"next:   {go_on}"])
