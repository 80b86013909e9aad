"""A study on one machine, as far as the time reaches: runs trained and measured side by side, in the study's order.

`continue_study` keeps a few worker processes busy with the first runs that are not done. What is done is read from the
runs' folders and from the committed tables (adopted by run id), never remembered: it can be stopped at any moment and
goes on on any machine. Every run is measured in full right after its training, by the worker that has its weights, so
that no change of machine can lose a measurement. Tables are collected while it goes.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

import torch

from beyond_outliers import paths
from beyond_outliers.config.protocol import Planned
from beyond_outliers.config.run import RunConfig
from beyond_outliers.config.scale import PURPOSES
from beyond_outliers.study.collect import merge
from beyond_outliers.study.mend import mend_aloud
from beyond_outliers.study.own import take_up
from beyond_outliers.study.progress import Line, left, sentence, shortened, work
from beyond_outliers.study.study import Study

COLLECT_EVERY = 600  # seconds


class StudyFailed(RuntimeError):
    """Runs failed, others may have ended; the message names them with their reasons, a line each."""


def in_shard(study: Study, planned: Planned, shard: tuple[int, int]) -> bool:
    """Whether a run belongs to part i of n (from 1). A size and seed stay together; tuning belongs to part 1."""
    part, parts = shard
    if planned.purpose == "sweep":
        return part == 1
    block = study.protocol.sizes.index(planned.config.size) + planned.config.seed
    return block % parts == part - 1


def waiting(study: Study, done: set[str], shard: tuple[int, int] = (1, 1)) -> list[Planned]:
    """The runs that can be trained now and are not `done`, in the study's order.

    Size by size the search for its rates and its runs in full precision, then size by size the quantized ones. A run of
    a search is known when the one before it has ended, main runs when the search of their size has.
    """
    sizes = study.protocol.sizes
    found: dict[str, tuple[tuple, Planned]] = {}
    for place, planned in enumerate(study.planned()):
        late = planned.purpose in ("qat", "schemes")
        key = late, sizes.index(planned.config.size), PURPOSES.index(planned.purpose), place
        if planned.config.name not in done and in_shard(study, planned, shard):
            found.setdefault(planned.config.name, (key, planned))
    return [planned for _, planned in sorted(found.values(), key=lambda pair: pair[0])]


def train_and_measure(scale: str, purpose: str, config: str) -> str:
    """What a worker does with one run; `config` is its JSON. Returns the run's name."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    torch.compiler.reset()  # a worker trains many models: guards of the last would count against this one
    study = Study(scale)
    planned = Planned(purpose, RunConfig.from_json(config))
    study.train(planned, progress=False)
    study.measure_one(planned)
    if purpose == "full_precision" and study.protocol.measure.trajectory:
        study.measure_block(planned.config.size, planned.config.seed)  # by whoever ends a size and seed
    return planned.config.name


def end_with_parent() -> None:
    """Ends this worker when its parent does, however that was killed: two workers must never train the same run."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _stop(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def continue_study(
    study: Study, jobs: int, hours: float | None = None, shard: tuple[int, int] = (1, 1), line: Line | None = None
) -> int:
    """Trains and measures what is not done, `jobs` runs side by side, for at most `hours`; returns the runs finished.

    A run that fails is reported in the end (StudyFailed) and does not stop the others. An interrupt stops at once; runs
    in progress go on from their last evaluation next time.
    """
    deadline = time.monotonic() + 3600 * hours if hours else float("inf")
    failed: dict[str, str] = {}
    running: dict[Future, Planned] = {}
    take_up(study)
    mend_aloud(study)
    if (paths.RESULTS / study.scale / "runs.csv").exists():
        merge(study, paths.RESULTS / study.scale)  # what others have committed since
    done = study.done()
    if study.protocol.measure.trajectory:  # a block whose last run was interrupted after its training
        for size, seed, runs in study.blocks():
            if any(study.result(planned) for planned in runs):
                study.measure_block(size, seed)
    already, start = len(done), time.monotonic()
    collected, worked = start, 0.0
    line = line or Line()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=end_with_parent, max_tasks_per_child=25)
    signal.signal(signal.SIGTERM, _stop)  # of a batch system: workers end, tables are collected
    try:
        while True:
            study.choose_what_is_found()
            busy = {p.config.name for p in running.values()}
            queue = [p for p in waiting(study, done, shard) if p.config.name not in {*busy, *failed}]
            for planned in queue[: jobs - len(running)] if time.monotonic() < deadline else []:
                text = planned.config.to_json()
                running[pool.submit(train_and_measure, study.scale, planned.purpose, text)] = planned
            active = list(running.values())
            ahead = {p.config.name: work(p.config) for p in (*queue, *active)}
            line.show(
                sentence(
                    f"{study.scale}: {len(done)} of {len(done) + len(ahead) + len(failed)} runs done",
                    left(time.monotonic() - start, worked, sum(ahead.values())),
                    f"now {shortened(p.config.name for p in active)}" if running else "",
                )
            )
            if not running or time.monotonic() > deadline:
                break
            ended = wait(running, timeout=max(1.0, min(60.0, deadline - time.monotonic())), return_when=FIRST_COMPLETED)
            for task in ended.done:
                error = task.exception()
                config = running.pop(task).config
                if error:
                    failed[config.name] = f"{type(error).__name__}: {error}"
                    line.note(f"failed: {config.name}: {failed[config.name]}")
                else:
                    done.add(config.name)
                    worked += work(config)
            if time.monotonic() - collected > COLLECT_EVERY:
                study.collect()
                collected = time.monotonic()
    finally:
        line.close()
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        if len(done):
            study.collect()
    if failed:
        raise StudyFailed("\n".join(f"failed: {name}: {reason}" for name, reason in failed.items()))
    return len(done) - already
