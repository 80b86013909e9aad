"""Training throughput beside the same-shape model written in plain torch.nn, eager: paired, in one process.

python tests/benchmarks/test_training.py      # prints the table and writes it to data/results/benchmark_training.csv
"""

import time

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beyond_outliers import paths
from beyond_outliers.config import Olmo2Config
from beyond_outliers.model import Olmo2
from beyond_outliers.train import LossModule

SHAPES = {
    "0.33M": Olmo2Config(vocab_size=2048, width=64, depth=4, n_heads=4),
    "1M": Olmo2Config(vocab_size=2048, width=128, depth=4, n_heads=8),
}
CONTEXT, BATCH, MICRO_BATCH = 128, 64, 16


class PlainBlock(nn.Module):
    """The study's block as one would first write it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), (width // heads) ** 0.5))

    def forward(self, x, cos, sin):
        def heads(y):
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def rotate(y):
            even, odd = y[..., 0::2], y[..., 1::2]
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

        q, k = (F.normalize(rotate(heads(project(x))), dim=-1) for project in (self.q, self.k))
        mixed = F.scaled_dot_product_attention(q * self.scale, k, heads(self.v(x)), is_causal=True, scale=1.0)
        x = x + self.norm1(self.out(mixed.transpose(1, 2).flatten(-2)))
        return x + self.norm2(self.down(F.relu(self.up(x)).square()))


class PlainModel(nn.Module):
    def __init__(self, config: Olmo2Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(PlainBlock(config.width, config.n_heads) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        pairs = torch.arange(0, config.head_size, 2) / config.head_size
        angles = torch.arange(CONTEXT)[:, None] * config.rope_base**-pairs
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def loss(self, ids, targets):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.norm(x) @ self.embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def training_step(loss, optimizer, ids, targets, micro_batch: int = BATCH):
    parts = list(zip(ids.split(micro_batch), targets.split(micro_batch), strict=True))

    def step():
        for x, y in parts:
            (loss(x, y) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare_training(sizes=tuple(SHAPES), rounds: int = 12, threads: int = 2) -> pd.DataFrame:
    """Tokens a second of a training step (fused AdamW): plain eager, ours eager and compiled, in turn, `rounds` times.

    Ours as `train` runs it at the scales for CPUs, in micro-batches. One row a size: medians, and the median of the
    ratios to the plain step of the same round.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    for size in sizes:
        config = SHAPES[size]
        ids, targets = torch.randint(config.vocab_size, (2, BATCH, CONTEXT))
        steps = {}
        for name in ("plain", "eager", "compiled"):
            torch.manual_seed(0)
            model = PlainModel(config) if name == "plain" else Olmo2(config)
            loss = model.loss if name == "plain" else LossModule(model, compiled=name == "compiled")
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            steps[name] = training_step(loss, optimizer, ids, targets, BATCH if name == "plain" else MICRO_BATCH)
            for _ in range(3):
                steps[name]()
        times = pd.DataFrame([{name: _timed(step) for name, step in steps.items()} for _ in range(rounds)])
        speeds = BATCH * CONTEXT / times.median()
        ratios = times.rdiv(times["plain"], axis=0)
        row = {"size": size, "n_parameters": config.n_parameters, "threads": threads}
        row |= {f"{name}_tokens_per_second": round(speed) for name, speed in speeds.items()}
        for name in ("eager", "compiled"):
            row[f"{name}_ratio"] = ratios[name].median()
            row[f"{name}_ratio_low"], row[f"{name}_ratio_high"] = ratios[name].quantile([0.25, 0.75])
        rows.append(row)
    torch.set_num_threads(before)
    return pd.DataFrame(rows)


def _timed(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def test_the_plain_model_is_the_same_model():
    """Same weights, same loss: otherwise the comparison says nothing."""
    config = SHAPES["0.33M"]
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


@pytest.mark.parametrize("size", SHAPES)
def test_training_throughput(benchmark, size):
    table = benchmark.pedantic(compare_training, args=((size,),), rounds=1)
    print(table.T.to_string())
    assert table.compiled_ratio.iloc[0] > 1


if __name__ == "__main__":
    table = compare_training()
    print(table.T.to_string())
    table.to_csv(paths.RESULTS / "benchmark_training.csv", index=False)
