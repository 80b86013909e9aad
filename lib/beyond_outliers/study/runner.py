"""A study on one machine, as far as the time reaches: runs trained and measured side by side, in the study's order.

`continue_study` keeps a few worker processes busy with the first runs that are not done. What is done is read from the
runs' folders and from the committed tables (adopted by run id), never remembered: it can be stopped at any moment and
goes on on any machine. Every run is measured in full right after its training, by the worker that has its weights, so
that no change of machine can lose a measurement. Tables are collected while it goes.
"""

import multiprocessing
import signal
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

from tqdm.auto import tqdm

from beyond_outliers.config.protocol import Planned
from beyond_outliers.config.run import RunConfig
from beyond_outliers.study.study import Study

COLLECT_EVERY = 600  # seconds
POLL = 5  # seconds


class StudyFailed(RuntimeError):
    """Runs failed, others may have ended; the message names them with their reasons."""


def in_shard(study: Study, planned: Planned, shard: tuple[int, int]) -> bool:
    """Whether a run belongs to part i of n (from 1). A size and seed stay together; tuning belongs to the first part."""
    part, parts = shard
    if planned.purpose == "sweep":
        return part == 1
    block = study.protocol.sizes.index(planned.config.size) + planned.config.seed
    return block % parts == part - 1


def ready(study: Study, shard: tuple[int, int] = (1, 1)) -> list[Planned]:
    """The runs that can be trained now and are not done, in the study's order.

    A tuning run is known when the one before it has ended, main runs when the tuning of their size has.
    """
    done = study.done()
    runs = [p for p in study.planned() if p.config.name not in done and in_shard(study, p, shard)]
    return list({p.config.name: p for p in reversed(runs)}.values())[::-1]


def train_and_measure(scale: str, purpose: str, config: str) -> str:
    """What a worker does with one run; `config` is its JSON. Returns the run's name."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    torch.compiler.reset()  # a worker trains many models: guards of the last would count against this one
    study = Study(scale)
    planned = Planned(purpose, RunConfig.from_json(config))
    study.train(planned, progress=False)
    study.measure_one(planned)
    return planned.config.name


def continue_study(
    study: Study, jobs: int, hours: float | None = None, shard: tuple[int, int] = (1, 1), progress: bool = True
) -> int:
    """Trains and measures what is not done, `jobs` runs side by side, for at most `hours`; returns the runs finished.

    A run that fails is reported in the end (StudyFailed) and does not stop the others. An interrupt stops at once; runs
    in progress go on from their last evaluation next time.
    """
    deadline = time.monotonic() + 3600 * hours if hours else float("inf")
    failed: dict[str, str] = {}
    finished, collected = 0, time.monotonic()
    running: dict[Future, str] = {}
    context = multiprocessing.get_context("spawn")
    bar = tqdm(desc=f"study {study.scale}", unit="run", disable=None if progress else True)
    pool = ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=25)
    try:
        while True:
            waiting = [p for p in ready(study, shard) if p.config.name not in {*running.values(), *failed}]
            bar.total = finished + len(running) + len(waiting)
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                planned = waiting.pop(0)
                task = pool.submit(train_and_measure, study.scale, planned.purpose, planned.config.to_json())
                running[task] = planned.config.name
            bar.set_postfix_str(", ".join(name.rpartition("-")[0] for name in running.values()))
            if not running or time.monotonic() > deadline:
                break
            for task in wait(running, timeout=POLL, return_when=FIRST_COMPLETED).done:
                name = running.pop(task)
                if error := task.exception():
                    failed[name] = f"{type(error).__name__}: {error}"
                else:
                    finished += 1
                    bar.update()
            if time.monotonic() - collected > COLLECT_EVERY:
                study.collect()
                collected = time.monotonic()
    finally:
        bar.close()
        for process in list(getattr(pool, "_processes", None) or {}):
            pool._processes[process].terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        if finished or study.done():
            study.collect()
    if failed:
        raise StudyFailed("\n".join(f"{name}: {reason}" for name, reason in failed.items()))
    return finished
