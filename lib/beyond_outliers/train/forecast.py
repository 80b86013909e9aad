"""`--dry-run`: what a run is, the memory that it takes, and about how long, before it is started; nothing is written.

Memory is traced (`memory`). Time is that of a probe on this machine: one micro-batch and the optimizer's step on random
tokens, uncompiled. Where that would take long, the probe has fewer sequences, then fewer blocks, and its time grows by
the operations left out; what an optimizer does every n-th step is timed apart and counted as often as it happens.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from beyond_outliers.config.run import ModelConfig, RunConfig
from beyond_outliers.model.build import build_model
from beyond_outliers.optimizers.groups import RoleGroups
from beyond_outliers.optimizers.psgd import PSGD
from beyond_outliers.optimizers.registry import build_optimizer
from beyond_outliers.train.machine import check_shares
from beyond_outliers.train.memory import OFTEN, SELDOM, Memory, memory, set_groups

PROBE = 2e11  # operations of a probe at most: a few seconds of a core
LARGEST = 2048  # rows of a matrix that an optimizer's step is still tried on: their eigenvectors take seconds


@dataclass(frozen=True)
class Pace:
    """Seconds a step and of an evaluation; `update`, the optimizer's part of the step, is None where it was not tried.

    rows, depth: sequences and blocks of the probe.
    """

    passes: float
    update: float | None
    evaluation: float
    rows: int
    depth: int

    @property
    def step(self) -> float:
        return self.passes + (self.update or 0.0)


def operations(model: ModelConfig, context: int, recompute: bool = False) -> int:
    """Floating-point operations of the forward and backward pass over one sequence, full attention counted."""
    forward = 2 * context * (model.n_parameters + 2 * model.depth * model.width * context)
    return (4 if recompute else 3) * forward


def pace(config: RunConfig, device: str = "cpu", workers: int = 1, recompute: bool = False) -> Pace:
    """Times a probe of the run on this machine."""
    share = config.batch_size // workers
    rows, model = min(share, config.micro_batch), config.model
    while rows > 1 and rows * operations(model, config.context, recompute) > PROBE:
        rows //= 2
    while model.depth > 1 and rows * operations(model, config.context, recompute) > PROBE:
        model = dataclasses.replace(model, depth=model.depth // 2)
    probe = build_model(config.replace(model=model)).to(device)
    probe.recompute = recompute
    optimizer = build_optimizer(probe, config.optimizer, config.lr, weight_decay=config.weight_decay, **config.hyper)
    ids = torch.randint(config.model.vocab_size, (rows, config.context), device=device)

    def passes() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            loss = probe.loss(ids, ids)
        loss.backward()

    measured = _timed(passes, device)
    whole, probed = (operations(m, config.context, recompute) for m in (config.model, model))
    a_sequence = measured / rows * whole / probed
    update = _update(optimizer, config.steps, device)
    return Pace(
        passes=share * a_sequence,
        update=None if update is None else update * config.model.n_parameters / model.n_parameters,
        evaluation=config.validation_tokens / config.context * a_sequence / (4 if recompute else 3),
        rows=rows,
        depth=model.depth,
    )


def _update(optimizer: torch.optim.Optimizer, steps: int, device: str) -> float | None:
    """Seconds of the optimizer's step in the mean over a run, None where its matrices are too large to try."""
    if isinstance(optimizer, RoleGroups):
        of_all = [
            optimizer.state_shapes(group, parameter)
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        squares = [shape[0] for shapes in of_all for shape in shapes.values() if len(shape) == 2 and len({*shape}) == 1]
        if max(squares, default=0) > LARGEST:
            return None
    often = _share_of_refreshes(optimizer, steps)
    times = []
    for now_and_then in (OFTEN, SELDOM):
        set_groups(optimizer, now_and_then)
        times.append(_timed(optimizer.step, device))
    return often * times[0] + (1 - often) * times[1]


def _share_of_refreshes(optimizer: torch.optim.Optimizer, steps: int) -> float:
    group = optimizer.param_groups[0]
    if isinstance(optimizer, PSGD):
        return statistics.mean(1 / optimizer.period(group, n) for n in range(0, steps, 1 + steps // 1000))
    return 1 / group.get("frequency", 1)


def _timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of a call: the median of three after two others."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def forecast(config: RunConfig, device: str = "auto", workers: int = 1, recompute: bool = False) -> str:
    """What `--dry-run` prints. device: as `train` takes it; memory is told for "cuda" also where there is none."""
    check_shares(config, workers)
    here = torch.cuda.is_available()
    device = ("cuda" if here else "cpu") if device == "auto" else device
    found = memory(config, device, workers, recompute)
    timed = pace(config, device, workers, recompute) if here or device == "cpu" else None
    return "\n".join([*_said_of_run(config, workers), *_said_of_memory(found, workers), *_said_of_time(config, timed)])


def _said_of_run(config: RunConfig, workers: int) -> list[str]:
    model, tokens = config.model, config.steps * config.tokens_per_step
    among = f" over {workers} workers" if workers > 1 else ""
    return [
        f"{config.name}: nothing is run, nothing is written",
        f"parameters  {model.n_parameters:,} ({model.architecture}, width {model.width}, depth {model.depth})",
        f"tokens      {tokens:,} ({tokens / model.n_parameters:.3g} a parameter)",
        f"steps       {config.steps:,} of {config.batch_size} x {config.context} tokens{among}, in micro-batches of "
        f"{min(config.micro_batch, config.batch_size // workers)} x {config.context}",
    ]


def _said_of_memory(found: Memory, workers: int) -> list[str]:
    each = " for the worker that keeps most" if workers > 1 else ""
    lines = [f"memory      {_bytes(found.peak)}{each} beside Python and torch, in {found.moment}"]
    for name in ("weights", "gradients", "optimizer", "activations", "logits", "copies"):
        if size := getattr(found, name):
            lines.append(f"  {name:<12}{_bytes(size)}")
    moments = f"  at most     {_bytes(found.passes)} in the passes, {_bytes(found.update)} in the optimizer's step, "
    return [*lines, f"{moments}{_bytes(found.evaluation)} in an evaluation"]


def _said_of_time(config: RunConfig, timed: Pace | None) -> list[str]:
    if timed is None:
        return ["time        unknown: there is no CUDA device here to try a step on"]
    seconds = config.steps * timed.step + (config.evaluations + 1) * timed.evaluation
    without = ", without the optimizer's step, whose matrices are too large to try" if timed.update is None else ""
    cut = "" if timed.depth == config.model.depth else f" and {timed.depth} of {config.model.depth} blocks"
    return [
        f"time        about {_duration(seconds)} on this machine as busy as it is, uncompiled{without}: "
        f"{_duration(timed.step)} a step by a probe of {timed.rows} x {config.context} tokens{cut}"
    ]


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
