"""`make reproduce` and `make continue`: Snakemake runs the graph of the Snakefile, and the terminal shows one line.

What Snakemake and its jobs print goes to files below data/runs/SCALE. A failure ends with what failed, why, and the
command that goes on. Whatever ends this process ends its jobs, which save what they have; only SIGKILL leaves them at
work, and the lock then names them.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from beyond_outliers import paths
from beyond_outliers.config.protocol import Planned
from beyond_outliers.study.study import Study

TRY_AGAIN = 75  # EX_TEMPFAIL: what was asked to end has saved; the same command goes on
EVERY = 180  # seconds between two lines where there is no terminal to write one line over and over
# What a step takes however small the model, without and with quantization-aware training: fitted to lower quartiles of
# the committed runs (milliseconds per step, pocket: 0.03M 12, 0.08M 14, QAT 21 and 26; confirm: 0.08M 21, 0.26M 34).
STEP, QAT_STEP = 1e8, 2e8  # parameters times tokens


class StudyFailed(RuntimeError):
    """The workflow did not end well; what it printed says why."""


def processors() -> int:
    """As many as this process may use: by its affinity, and by what Slurm gave it."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(allowed, int(slurm)) if slurm.isdigit() and int(slurm) else allowed


def build(study: Study) -> Study:
    """The study with every run that it plans trained and measured, and the tables of them. StudyFailed where not."""
    if not study.complete() and (status := reproduce(study, target="tables")):
        raise StudyFailed(f"make reproduce SCALE={study.scale} ended with exit code {status}")
    return type(study)(study.scale)


def reproduce(
    study: Study,
    jobs: int | None = None,
    executor: str = "local",
    options: Sequence[str] = (),
    target: str = "all",
    hours: float | None = None,
    **settings: object,
) -> int:
    """Runs the workflow of a scale as the only process at work on it; returns the exit code.

    jobs: processors, or jobs of a cluster, side by side; None: as many as this process may use. executor: "local" or
    "slurm". options: more of Snakemake's. target: "all", or "tables" without verdicts and pages. hours: the time after
    which it ends, with exit code 0. settings: `config` of the Snakefile.
    """
    from beyond_outliers.lock import RunHeld, held, sign

    study.check()
    log = study.runs_folder / "reproduce.log"
    command = [target, "--snakefile", str(paths.ROOT / "Snakefile"), "--directory", str(paths.OUTPUT), "--nolock"]
    command += ["--rerun-incomplete", "--rerun-triggers", "mtime", "--workflow-profile", "none", "--logger", "line"]
    command += [*executed(executor), "--cores" if executor == "local" else "--jobs", str(jobs or processors())]
    command += [*options, "--config", f"scale={study.scale}", *(f"{key}={value}" for key, value in settings.items())]
    begin = "from beyond_outliers.study.workflow import snakemake; "
    begin += f"snakemake({study.scale!r}, {str(log)!r}, {'rows' in settings})"
    ambient = {name: value for name, value in os.environ.items() if name != "SNAKEMAKE_PROFILE"}
    go_on = f"To go on: make {'continue' if 'rows' in settings else 'reproduce'} SCALE={study.scale}"
    try:
        with held(study.runs_folder / ".workflow.lock", wait=False) as lock, asked_to_end() as asked:
            print(f"scale {study.scale}: what runs is logged in {log}", file=sys.stderr)
            process = subprocess.Popen(
                [sys.executable, "-c", begin, *command],
                cwd=paths.ROOT,
                env=ambient,
                pass_fds=[lock.fileno()],  # who outlives this process goes on holding the lock
                start_new_session=True,  # a group of its own, so that all of it can be told
            )
            sign(lock, process.pid)
            until = time.monotonic() + 3600 * hours if hours else float("inf")
            try:
                while (status := process.poll()) is None and not asked and time.monotonic() < until:
                    time.sleep(0.2)
            finally:
                end(process, executor)
                process.wait()
    except RunHeld as other:
        print(other, file=sys.stderr)
        return 1
    if asked:
        print(f"interrupted by {asked[0].name}. {go_on}", file=sys.stderr)
        return TRY_AGAIN if asked[0] == signal.SIGTERM else 128 + asked[0]
    if status is None:
        print(f"the {hours:g} hours are over. {go_on}", file=sys.stderr)
    elif status:
        print(f"log:    {log}\nnext:   {go_on.removeprefix('To go on: ')} goes on from what is done", file=sys.stderr)
    return status or 0


def executed(executor: str) -> list[str]:
    """Options of Snakemake for an executor. Where Slurm keeps no accounts `sacct` knows nothing, and the queue does."""
    if executor == "local":
        return ["--executor", "local"]
    options = ["--executor", "slurm", "--retries", "3", "--latency-wait", "60"]
    with contextlib.suppress(FileNotFoundError):  # Snakemake says that there is no Slurm, or takes squeue itself
        if subprocess.run(["sacct", "--noheader", "--allocations"], capture_output=True).returncode:
            options += ["--slurm-status-command", "squeue"]
    return options


@contextlib.contextmanager
def asked_to_end() -> Iterator[list[signal.Signals]]:
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


# ------------------------------------------------------------------------------------------ in Snakemake's process


def snakemake(scale: str, log: str, rows: bool) -> None:
    """Snakemake as `sys.argv` says, all that it prints in the file `log`; its events make the line of the terminal."""
    from platformdirs import PlatformDirs
    from snakemake import cli, common
    from snakemake_interface_logger_plugins.base import LogHandlerBase
    from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry

    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8")
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    progress = Progress(scale, rows, terminal)

    class LogHandler(LogHandlerBase):
        writes_to_stream = writes_to_file = needs_rulegraph = False
        has_filter = has_formatter = True

        def emit(self, record: Any) -> None:
            progress.take(str(getattr(record, "event", "")), record)

        def close(self) -> None:
            progress.close()

    folders = type("Folders", (PlatformDirs,), {"user_cache_dir": str(paths.CACHE)})  # HOME may not be writable
    common.APPDIRS = folders("snakemake", "snakemake")
    registry = LoggerPluginRegistry()
    registry.plugins["line"] = registry.load_plugin("line", SimpleNamespace(LogHandler=LogHandler))  # type: ignore[arg-type]
    cli.main(sys.argv[1:])


class Progress:
    """What Snakemake's events say: which jobs run, how far the study is, how long the rest takes, what failed."""

    def __init__(self, scale: str, rows: bool, terminal: Any):
        """rows: runs that the tables have are done."""
        self.scale, self.rows, self.terminal = scale, rows, terminal
        self.names: dict[int, str] = {}  # job id -> "run NAME light"
        self.logs, self.running = dict[int, list[str]](), list[int]()
        self.noted = list[str]()
        self.start = time.monotonic()
        self.at = float("-inf")
        self.look()
        self.before = self.done

    def look(self) -> None:
        """Which runs there are, as far as they can be known, and which of them are trained."""
        study = Study(self.scale)
        self.costs = {planned.config.name: work(planned) for planned in study.all_runs()}
        known = set(study.table("runs").run) if self.rows and study.has("runs") else set()
        self.done = {n for n in self.costs if n in known or (study.runs_folder / n / "result.json").exists()}

    def take(self, event: str, record: Any) -> None:
        """An event of Snakemake, with the attributes of its log record."""
        if event == "job_info":
            words = [value.rpartition("-")[0] or value for value in map(str, record.wildcards.values())]  # no hashes
            self.names[record.jobid] = " ".join([record.rule_name, *words])
            self.logs[record.jobid] = list(record.log)
        elif event == "job_started":
            self.running += record.jobs
        elif event == "job_finished":
            self.running.remove(record.job_id)
            self.look()
        elif event == "job_error":
            self.running = [job for job in self.running if job != record.jobid]
            self.note(f"failed: {self.names.get(record.jobid, record.rule_name)}\nreason: {self.reason(record.jobid)}")
        elif event == "error":
            self.note(f"reason: {str(record.msg).strip().splitlines()[-1]}") if not self.logs else None
        if event:
            self.show()

    def reason(self, job: int) -> str:
        """The last line of a job's log."""
        files = [Path(file) for file in self.logs.get(job, []) if Path(file).exists()]
        said = "".join(file.read_text(errors="replace") for file in files).strip()
        return said.splitlines()[-1].strip() if said else "it ended without a word, as when it is killed"

    def text(self) -> str:
        """The line: runs done of all, the time left at the pace so far, what runs now."""
        ended, ahead = self.done - self.before, self.costs.keys() - self.done
        made, rest = (sum(self.costs[name] for name in names) for names in (ended, ahead))
        now = ", ".join(self.names[job] for job in self.running if job in self.names)
        pace = left(time.monotonic() - self.start, made, rest)
        parts = [f"{self.scale}: {len(self.done)} of {len(self.costs)} runs done", pace, now and f"now {now}"]
        return ", ".join(filter(None, parts))

    def show(self) -> None:
        """One line of a terminal, as wide as that is, written anew; in a file, or a pipe, a line every few minutes."""
        text = self.text()
        if self.terminal.isatty():
            width = (os.get_terminal_size(self.terminal.fileno()).columns or 80) - 1
            short = text if len(text) <= width else f"{text[: max(0, width - 3)]}..."
            print(f"\r\033[K{short}", end="", file=self.terminal, flush=True)
        elif time.monotonic() - self.at >= EVERY:
            print(text, file=self.terminal, flush=True)
            self.at = time.monotonic()

    def note(self, text: str) -> None:
        """Lines that stay, said once."""
        if text in self.noted:
            return
        self.noted.append(text)
        print(f"\r\033[K{text}" if self.terminal.isatty() else text, file=self.terminal, flush=True)

    def close(self) -> None:
        """How far it came stays."""
        if not self.terminal.closed:
            self.look()
            self.running = []
            self.note(self.text())
            self.terminal.close()


def work(planned: Planned) -> float:
    """What training a run takes, in parameters times tokens, with the steps of small models at what they cost."""
    config = planned.config
    return (config.steps - planned.start) * (
        config.model.n_parameters * config.tokens_per_step + (QAT_STEP if config.quantization else STEP)
    )


def left(seconds: float, done: float, remaining: float) -> str:
    """ "about 12 min left", as long as the rest takes at the pace so far; empty while there is no pace yet."""
    if not done or not remaining:
        return ""
    rest = seconds * remaining / done
    return f"about {max(1, round(rest / 60))} min left" if rest < 5400 else f"about {rest / 3600:.1f} hours left"
