"""Training throughput beside the same-shape model written in plain torch.nn: paired, in one process.

Ours runs as `train` runs it at the scales for CPUs, in micro-batches; the plain model takes the whole batch, eager and
under a naive `torch.compile` of its loss.

Where a compiled step goes at 0.33M on two threads (torch.profiler, per cent of self time): matrix products 48,
Inductor's kernels (norms, rotary positions, squared ReLU, residual adds) 23, attention's forward and backward pass 13,
the sliced loss beside its products (maximum, exponential, sum, division over 2048 logits a token) 10, optimizer and
everything else 6. The first and the third are calls of the same library that the plain model makes.
"""

import itertools

import pandas as pd
import pytest
import torch

from benchmarking import compared, on_threads, paired
from beyond_outliers.config import Olmo2Config
from beyond_outliers.model import Olmo2
from beyond_outliers.train import LossModule
from plain_model import CONTEXT, PlainModel

# shape, sequences a step, sequences a micro-batch; the first is the smallest size of scale confirm
CASES = {
    "0.08M": (Olmo2Config(vocab_size=1024, width=32, depth=4, n_heads=2), 8, 8),
    "0.33M": (Olmo2Config(vocab_size=2048, width=64, depth=4, n_heads=4), 64, 16),
    "1M": (Olmo2Config(vocab_size=2048, width=128, depth=4, n_heads=8), 64, 16),
}
PLAIN, NAIVE = "plain eager", "plain torch.compile"
NAMES = (PLAIN, NAIVE, "eager", "compiled")


def training_step(loss, optimizer, ids, targets, micro_batch: int):
    parts = list(zip(ids.split(micro_batch), targets.split(micro_batch), strict=True))

    def step():
        for x, y in parts:
            (loss(x, y) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def candidates(size: str, names: tuple[str, ...]) -> dict:
    """Name -> one training step (fused AdamW) on random tokens."""
    config, batch, micro_batch = CASES[size]
    ids, targets = torch.randint(config.vocab_size, (2, batch, CONTEXT))
    steps = {}
    for name in names:
        torch.manual_seed(0)
        model = PlainModel(config) if name in (PLAIN, NAIVE) else Olmo2(config)
        loss = LossModule(model, name == "compiled") if isinstance(model, Olmo2) else model.loss
        loss = torch.compile(loss) if name == NAIVE else loss
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        parts = micro_batch if isinstance(model, Olmo2) else batch
        steps[name] = training_step(loss, optimizer, ids, targets, parts)
    return steps


def measure(sizes=tuple(CASES), rounds: int = 15, threads: int = 2, names=NAMES) -> pd.DataFrame:
    """Speed-ups: ours, eager and compiled, over the plain model, eager and compiled."""
    rows = []
    with on_threads(threads):
        for size in sizes:
            torch.compiler.reset()
            few = CASES[size][1] < 64  # short steps: more of them
            times = paired(candidates(size, names), rounds * (10 if few else 1), warm_up=3)
            ours = [name for name in names if name not in (PLAIN, NAIVE)]
            for what, beside in itertools.product(ours, [name for name in names if name not in ours]):
                rows.append(compared(times, what, beside, "training step", size, threads, speedup=True))
    return pd.DataFrame(rows)


def test_the_plain_model_is_the_same_model():
    """Same weights, same loss: otherwise the comparison says nothing."""
    config = CASES["0.33M"][0]
    ours, plain = Olmo2(config), PlainModel(config)
    weights = {"embedding.weight": ours.embedding.weight, "norm.weight": ours.final_norm.gain}
    for number, block in enumerate(ours.blocks):
        for name in "qkv":
            weights[f"blocks.{number}.{name}.weight"] = getattr(block.attention, name).weight
        weights[f"blocks.{number}.out.weight"] = block.attention.out.weight
        weights[f"blocks.{number}.up.weight"] = block.mlp.up.weight
        weights[f"blocks.{number}.down.weight"] = block.mlp.down.weight
        weights[f"blocks.{number}.norm1.weight"] = block.attention_norm.gain
        weights[f"blocks.{number}.norm2.weight"] = block.mlp_norm.gain
        weights[f"blocks.{number}.scale"] = block.attention.qk_norm.scale[:, None, None]
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert set(missing) == {"cos", "sin"} and not unexpected
    ids, targets = torch.randint(config.vocab_size, (2, 2, CONTEXT))
    assert torch.allclose(ours.loss(ids, targets), plain.loss(ids, targets), atol=1e-5)


def test_speedups_are_of_the_steps_measured():
    """Eager alone, which needs no compiler."""
    (row,) = measure(("0.08M",), rounds=1, threads=1, names=(PLAIN, "eager")).to_dict("records")
    assert row["low"] <= row["value"] <= row["high"] and row["rounds"] == 10
    assert row["beside"] == PLAIN and row["value"] == pytest.approx(row["beside_seconds"] / row["seconds"], rel=0.5)
