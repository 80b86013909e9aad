"""What quantization costs: a training step of the three QAT schemes and inference after PTQ, beside full precision.

Steps are those of `train`: compiled, in micro-batches of 16, the rounded weights held over them.
"""

from collections.abc import Callable

import pandas as pd
import pytest
import torch

from benchmarking import compared, on_threads, paired
from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.quantizers import SCHEMES, QuantSpec, prepare_qat, quantize_model, weights_held
from beyond_outliers.train import LossModule

SHAPES = {
    "0.33M": Olmo2Config(vocab_size=2048, width=64, depth=4, n_heads=4),
    "1M": Olmo2Config(vocab_size=2048, width=128, depth=4, n_heads=8),
}
BATCH, CONTEXT = 64, 128
FORMATS = {
    "W4A4": QuantSpec(),
    "W4": QuantSpec(activations="none"),
    "W4A4+rot": QuantSpec(rotate=True),
    "mxfp4": QuantSpec("mxfp4", "mxfp4"),
}


def training_step(model: Olmo2, micro_batches: int, hold: bool, compiled: bool) -> Callable:
    """A whole optimizer step of the model on random tokens."""
    ids = torch.randint(0, model.config.vocab_size, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(0))
    model.loss(ids[:1], ids[:1])  # LSQ's steps start here, before compilation
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loss = LossModule(model, compiled)

    def step():
        with weights_held(model) if hold else torch.enable_grad():
            for part in ids.split(BATCH // micro_batches):
                loss(part, part).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def qat_overhead(sizes=tuple(SHAPES), schemes=SCHEMES, rounds=15, micro_batches=4, compiled=True) -> list[dict]:
    """Training step of W4A4 under each scheme beside full precision."""
    rows = []
    for size in sizes:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Olmo2(SHAPES[size])
        calls = {"full precision": training_step(model, micro_batches, False, compiled)}
        for scheme in schemes:
            trained = prepare_qat(model, QuantSpec(), scheme)
            calls[scheme] = training_step(trained, micro_batches, micro_batches > 1, compiled)
        times = paired(calls, rounds, warm_up=3)
        rows += [
            compared(times, scheme, "full precision", "QAT step", size, torch.get_num_threads()) for scheme in schemes
        ]
    return rows


def ptq_overhead(sizes=("0.33M",), formats=tuple(FORMATS), rounds: int = 15) -> list[dict]:
    """Forward pass (hidden states) of compiled quantized models beside full precision."""
    rows = []
    for size in sizes:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Olmo2(SHAPES[size]).eval()
        ids = torch.randint(0, model.config.vocab_size, (BATCH, CONTEXT))
        models = {"full precision": model} | {name: quantize_model(model, FORMATS[name]) for name in formats}
        compiled = {name: torch.compile(m.hidden) for name, m in models.items()}
        with torch.no_grad():
            times = paired({name: lambda f=f, x=ids: f(x) for name, f in compiled.items()}, rounds, warm_up=3)
        rows += [
            compared(times, name, "full precision", "quantized forward pass", size, torch.get_num_threads())
            for name in formats
        ]
    return rows


def measure() -> pd.DataFrame:
    with on_threads(2):
        return pd.DataFrame([*qat_overhead(("0.33M",)), *qat_overhead(("1M",), ("quest",)), *ptq_overhead()])


@pytest.mark.slow
def test_a_scheme_stands_beside_full_precision():
    (row,) = qat_overhead(("0.33M",), ("quest",), rounds=1, compiled=False)
    assert 0.5 < row["value"] < 10 and row["beside_seconds"] > 0
