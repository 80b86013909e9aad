"""Runs trained as one batched model beside the same runs one after the other, on CPU.

On CPU it saves 5 to 10 per cent of the eager step, less than compiling does, and its losses are another rounding: a
study stacks runs on CUDA alone. torch has no batching rule for the CPU's fused attention (it loops over the runs). What
it saves on a GPU, where a step of such a model is all launches, has not been measured.
"""

import time

import pandas as pd
import torch

from benchmarking import compared, on_threads, paired
from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.optimizers import build_optimizer
from beyond_outliers.optimizers.runs import RunsAsOne
from beyond_outliers.train.together import StackedLoss

SHAPE = Olmo2Config(vocab_size=1024, width=32, depth=4, n_heads=2)  # 0.08M, the smallest of scale confirm
BATCH, CONTEXT, RATE = 8, 128, 1e-3


def steps(name: str, runs: int) -> dict:
    """A step of `runs` runs of an optimizer: one after the other, and as one."""
    ids, targets = torch.randint(SHAPE.vocab_size, (2, runs, BATCH, CONTEXT))
    models = [Olmo2(SHAPE) for _ in range(runs)]
    optimizers = [build_optimizer(model, name, RATE) for model in models]
    slices = [Olmo2(SHAPE) for _ in range(runs)]
    names = [key for key, _ in slices[0].named_parameters()]
    leaves = [
        torch.stack([*same]).detach().requires_grad_() for same in zip(*(m.parameters() for m in slices), strict=True)
    ]
    each = [build_optimizer(model, name, RATE) for model in slices]
    one = RunsAsOne(each, {id(p): leaf for p, leaf in zip(slices[0].parameters(), leaves, strict=True)})
    loss = StackedLoss(slices[0], dict(zip(names, leaves, strict=True)), compiled=False)

    def single():
        for model, optimizer, x, y in zip(models, optimizers, ids, targets, strict=True):
            model.loss(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()

    def together():
        loss(ids, targets).backward()
        one.step(1.0)
        for leaf in leaves:
            leaf.grad = None

    return {"one after the other": single, "as one": together}


def measure(runs: int = 8, rounds: int = 8, names: tuple[str, ...] = ("adamw", "muon", "psgd")) -> pd.DataFrame:
    rows = []
    with on_threads(1):
        for name in names:
            times = paired(steps(name, runs), rounds, clock=time.process_time)
            row = compared(times, "as one", "one after the other", "stacked runs", "0.08M", 1)
            rows.append(row | {"what": f"{runs} runs of {name} as one"})
    return pd.DataFrame(rows)


def test_both_ways_are_timed():
    (row,) = measure(2, rounds=1, names=("adamw",)).to_dict("records")
    assert row["seconds"] > 0 and row["value"] > 0
