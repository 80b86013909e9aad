"""Runs of one shape and one optimizer, that differ in seed and learning rate alone, trained as one batched model.

A step launches as many kernels for all of them as for one, which is what a small model's step costs on an accelerator.
Every run keeps its folder, its evaluations, its state and its result, equal to those of a run by itself up to float32
rounding; run ids are the same, and `device_name` in its result says how many runs it was trained with. A run that was
interrupted here goes on here or by itself.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from beyond_outliers.config.optimizers import REGISTRY
from beyond_outliers.config.run import RunConfig
from beyond_outliers.cross_entropy import cross_entropy, linear_cross_entropy
from beyond_outliers.decoder import Decoder
from beyond_outliers.optimizers.adamw import AdamW
from beyond_outliers.optimizers.runs import NonFiniteRuns, RunsAsOne, Steppable
from beyond_outliers.optimizers.stacking import StackedOptimizer
from beyond_outliers.train.folder import RunResult, load_result, run_folder
from beyond_outliers.train.holding import TRY_AGAIN, RunHeld, Termination, held
from beyond_outliers.train.loop import LOGGED_STEPS, SAVE_EVERY, Diverged, _Run, train
from beyond_outliers.train.memory import roughly
from beyond_outliers.train.timetable import evaluation_steps, schedule
from beyond_outliers.train.workers import place

RATES = ("embedding_lr", "vector_lr", "adamw_lr")  # hyperparameters that are learning rates


def alike(config: RunConfig) -> RunConfig:
    """What runs must have in common to be trained together: all but seed and learning rates."""
    rates = {key: 1.0 for key in config.hyper if key in RATES}
    return config.replace(seed=0, lr=1.0, hyper={**config.hyper, **rates})


def can_be_stacked(config: RunConfig) -> bool:
    """Whether runs of this kind can be trained together: full precision, the study's six optimizers."""
    if config.quantization or config.clip is not None or config.optimizer not in REGISTRY:
        return False
    kind = REGISTRY[config.optimizer].optimizer
    return isinstance(kind, type) and issubclass(kind, StackedOptimizer | AdamW)


def train_together(
    configs: Sequence[RunConfig],
    *,
    device: str = "auto",
    compile: bool | str = False,
    threads: int | None = None,
    root: Path | None = None,
    progress: bool = True,
) -> list[RunResult]:
    """Trains runs side by side in one model and returns their results in order; resumes; finished ones are loaded.

    Arguments as of `train`. Runs that another process holds, and those interrupted at another step than the first, are
    trained by themselves in the end. ValueError for runs that cannot be stacked, or differ in more than seed and rates,
    and under torchrun.
    """
    if place()[0] > 1:
        raise ValueError("under torchrun the workers share one run; runs are trained together in one process")
    for config in configs:
        if not can_be_stacked(config):
            raise ValueError(
                f"{config.name} cannot be trained together with others; valid: runs in full precision, without "
                "clipping, of adamw, muon, psgd, scion, shampoo or soap"
            )
        if alike(config) != alike(configs[0]):
            raise ValueError(f"{config.name} and {configs[0].name} differ in more than seed and learning rates")
    if threads:
        torch.set_num_threads(threads)
    with contextlib.ExitStack() as locks:
        members: list[_Member] = []
        for config in configs:
            folder = run_folder(config, root)
            with contextlib.suppress(RunHeld):
                locks.enter_context(held(folder / ".lock", wait=False))
                if load_result(folder) is None:
                    members.append(_Member(config, folder, device, compile, recompute=False, progress=False))
        members = [member for member in members if member.step == members[0].step]
        if len(members) > 1:
            _Together(members, progress).loop()
    return [train(c, device=device, threads=threads, root=root, progress=progress) for c in configs]


class _Member(_Run):
    """A run whose parameters, and whose optimizer's state, are slices of what all runs have stacked."""

    def _save(self, evaluated: bool = False) -> None:
        with self._apart():
            super()._save(evaluated)

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Copies in place of slices: a file of a slice would hold the whole stack."""
        slices = [(p, p.data) for p in self.model.parameters()]
        states = [(state, dict(state)) for state in self.optimizer.state.values()]
        try:
            for p, part in slices:
                p.data = part.clone()
            for state, before in states:
                state |= {key: value.clone() for key, value in before.items() if isinstance(value, Tensor)}
            yield
        finally:
            for p, part in slices:
                p.data = part
            for state, before in states:
                state |= before


class StackedLoss(nn.Module):
    """Sum over runs of their mean losses, from leaves (runs, *shape) by name; `each` keeps the summands, (runs,)."""

    def __init__(self, model: Decoder, leaves: dict[str, Tensor], compiled: bool):
        super().__init__()
        template = _Hidden(model)
        self.leaves, self.head = {f"model.{name}": leaf for name, leaf in leaves.items()}, leaves["embedding.weight"]

        def hidden(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
            return functional_call(template, parameters, (ids,))

        stacked = vmap(hidden)
        self.hidden = torch.compile(stacked) if compiled else stacked

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:  # (runs, B, T) each
        hidden = self.hidden(self.leaves, ids)
        if hidden.device.type == "cpu":
            parts = zip(hidden, self.head, targets, strict=True)
            self.each = torch.stack([linear_cross_entropy(h, w, t) for h, w, t in parts])
        else:
            logits = hidden.flatten(1, 2) @ self.head.mT
            self.each = cross_entropy(logits, targets.flatten(1), "none").unflatten(0, (len(ids), -1)).mean(1)
        return self.each.sum()


class _Hidden(nn.Module):
    def __init__(self, model: Decoder):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.hidden(ids)


class _Together:
    """Runs in progress, all at the same step."""

    def __init__(self, runs: list[_Member], progress: bool):
        self.progress = progress
        self.termination = Termination()
        self.saved = time.perf_counter()
        self._stack(runs)

    def _stack(self, runs: list[_Member]) -> None:
        """Takes these runs, and no others, into the stack."""
        self.runs, first = runs, runs[0]
        together = zip(*(run.model.parameters() for run in runs), strict=True)
        leaves = [torch.stack([p.detach() for p in same]).requires_grad_() for same in together]
        for run in runs:
            run.together = len(runs)
        for number, run in enumerate(runs):
            for p, leaf in zip(run.model.parameters(), leaves, strict=True):
                p.data = leaf.detach()[number]
        names = [name for name, _ in first.model.named_parameters()]
        self.loss = StackedLoss(first.model, dict(zip(names, leaves, strict=True)), first.compiled)
        by_id = {id(p): leaf for p, leaf in zip(first.model.parameters(), leaves, strict=True)}
        self.optimizer = RunsAsOne([cast(Steppable, run.optimizer) for run in runs], by_id)
        self.leaves = leaves

    def loop(self) -> None:
        config = self.runs[0].config
        stops, log_every = evaluation_steps(config), max(1, config.steps // LOGGED_STEPS)
        with self.termination:
            if self.runs[0].step == 0:
                self._each(lambda run: run._evaluate(save=False))
            self.clock = time.perf_counter()
            while self.runs and self.runs[0].step < config.steps:
                if self._step():
                    step = self.runs[0].step
                    if step in stops or step % log_every == 0:
                        self._log()
                    self._save_in_time()
        for run in self.runs:
            run._finish("finished", "")

    def _step(self) -> bool:
        """One optimizer step of all runs. False, and none is taken, where a gradient cannot be used: its run ends."""
        first = self.runs[0]
        config, step, device = first.config, first.step, first.device
        batches = [run.batches(step, 0, 1) for run in self.runs]
        ids, targets = (
            torch.stack([torch.from_numpy(part) for part in kind]).to(device) for kind in zip(*batches, strict=True)
        )
        parts = max(1, config.batch_size // config.micro_batch)
        total: Tensor | float = 0.0
        for x, y in zip(ids.chunk(parts, 1), targets.chunk(parts, 1), strict=True):
            with first._autocast():
                loss = self.loss(x, y) / parts
            loss.backward()
            total = total + self.loss.each.detach() / parts
        factor = schedule(step, config.steps, config.warmup, config.decay)
        for group in (group for run in self.runs for group in run.optimizer.param_groups):
            group["lr"] = group["initial_lr"] * factor
        try:
            self.optimizer.step(factor)
        except NonFiniteRuns as found:
            self._without({self.runs[number]: str(error) for number, error in found.errors.items()})
            return False
        for leaf in self.leaves:
            leaf.grad = None
        for run, loss in zip(self.runs, cast(Tensor, total).unbind(), strict=True):
            run.mean, run.count, run.step = run.mean + loss, run.count + 1, run.step + 1
        return True

    def _log(self) -> None:
        share = (time.perf_counter() - self.clock) / len(self.runs)  # what a run would have cost at this speed

        def log(run: _Member) -> None:
            run.clock = time.perf_counter() - share
            run._log_training(None)

        self._each(log)
        self.clock = time.perf_counter()

    def _each(self, what) -> None:
        """`what(run)` for all, with their optimizers as of runs by themselves; runs that diverge by it end."""
        self.optimizer.settle()
        ended = {}
        for run in self.runs:
            try:
                what(run)
            except Diverged as error:
                ended[run] = str(error)
        self._without(ended)

    def _without(self, ended: dict[_Member, str]) -> None:
        if not ended:
            return
        self.optimizer.settle()
        for run, reason in ended.items():
            run._finish("diverged", reason)
        if left := [run for run in self.runs if run not in ended]:
            self._stack(left)
        else:
            self.runs = []

    def _save_in_time(self) -> None:
        asked = self.termination.asked
        if not self.runs or not (asked or time.perf_counter() - self.saved > SAVE_EVERY):
            return
        if self.runs[0].step < self.runs[0].config.steps:
            self.optimizer.settle()
            for run in self.runs:
                run._save()
            self.saved = time.perf_counter()
            if asked:
                print(f"SIGTERM: {len(self.runs)} runs are saved; run them again to go on", file=sys.stderr)
                raise SystemExit(TRY_AGAIN)


def fitting_runs(config: RunConfig, memory: float) -> int:
    """How many such runs fit `memory` bytes, at least one."""
    needed = roughly(config.model, config.micro_batch, config.context, quantized=config.quantization is not None)
    return max(1, int(memory // needed))
