"""What quantization costs: a training step of the three QAT schemes and inference after PTQ, beside full precision.

`python tests/benchmarks/test_quantizers.py` prints both tables; `pytest --benchmark-only` on this file checks QuEST's
target, at most 1.5 times the full-precision step on two threads. Candidates take turns within one process, and a ratio
is the median over rounds of the ratio to the full-precision run of the same round, so that load from outside cancels.
"""

import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch

from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.quantizers import SCHEMES, QuantSpec, prepare_qat, quantize_model, weights_held
from beyond_outliers.train import LossModule

SHAPES = {
    "4x64": Olmo2Config(vocab_size=2048, width=64, depth=4, n_heads=4),  # 0.33M parameters
    "4x128": Olmo2Config(vocab_size=2048, width=128, depth=4, n_heads=8),  # 1.05M
}
BATCH, CONTEXT = 64, 128
FORMATS = {
    "W4A4": QuantSpec(),
    "W4": QuantSpec(activations="none"),
    "W4A4+rot": QuantSpec(rotate=True),
    "mxfp4": QuantSpec("mxfp4", "mxfp4"),
    "nvfp4": QuantSpec("nvfp4", "nvfp4"),
}


def compare(calls: dict[str, Callable], rounds: int, warm_up: int = 3) -> pd.DataFrame:
    """Medians of wall time and CPU time (ms, all threads) of each call, and their ratios to the first's."""
    clocks = {"ms": time.perf_counter, "cpu_ms": time.process_time}
    times = {(name, clock): [] for name in calls for clock in clocks}
    for i in range(warm_up + rounds):
        for name, call in calls.items():
            before = [read() for read in clocks.values()]
            call()
            after = [read() for read in clocks.values()]
            if i >= warm_up:
                for clock, a, b in zip(clocks, before, after, strict=True):
                    times[name, clock].append(1000 * (b - a))
    first = next(iter(calls))
    rows = []
    for name in calls:
        row = {"name": name}
        for clock in clocks:
            own, base = times[name, clock], times[first, clock]
            row[clock] = statistics.median(own)
            row[clock.replace("ms", "ratio")] = statistics.median(a / b for a, b in zip(own, base, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def training_step(model: Olmo2, micro_batches: int, hold: bool) -> Callable:
    """A whole optimizer step of the compiled model on random tokens."""
    ids = torch.randint(0, model.config.vocab_size, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(0))
    model.loss(ids[:1], ids[:1])  # LSQ's steps start here, before compilation
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loss = LossModule(model, compiled=True)

    def step():
        with weights_held(model) if hold else torch.enable_grad():
            for part in ids.split(BATCH // micro_batches):
                loss(part, part).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def qat_overhead(
    shapes=tuple(SHAPES), schemes=SCHEMES, threads: int = 2, rounds: int = 20, micro_batches: int = 1
) -> pd.DataFrame:
    """Training step of W4A4 under each scheme against full precision, a row for each shape and scheme.

    With several micro-batches QuEST appears twice, its weights rounded in each and held over the step.
    """
    torch.set_num_threads(threads)
    tables = []
    for shape in shapes:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Olmo2(SHAPES[shape])
        calls = {"full precision": training_step(model, micro_batches, False)}
        for scheme in schemes:
            calls[scheme] = training_step(prepare_qat(model, QuantSpec(), scheme), micro_batches, False)
        if micro_batches > 1:
            calls["quest, held"] = training_step(prepare_qat(model, QuantSpec()), micro_batches, True)
        table = compare(calls, rounds)
        table.insert(0, "parameters", model.config.n_parameters)
        table.insert(0, "shape", shape)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def ptq_overhead(shapes=tuple(SHAPES), formats=tuple(FORMATS), threads: int = 2, rounds: int = 20) -> pd.DataFrame:
    """Forward pass (hidden states) of compiled quantized models against full precision, a row a shape and format."""
    torch.set_num_threads(threads)
    tables = []
    for shape in shapes:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Olmo2(SHAPES[shape]).eval()
        ids = torch.randint(0, model.config.vocab_size, (BATCH, CONTEXT))
        models = {"full precision": model} | {name: quantize_model(model, FORMATS[name]) for name in formats}
        compiled = {name: torch.compile(m.hidden) for name, m in models.items()}
        with torch.no_grad():
            table = compare({name: lambda f=f, x=ids: f(x) for name, f in compiled.items()}, rounds)
        table.insert(0, "parameters", model.config.n_parameters)
        table.insert(0, "shape", shape)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def test_qat_overhead(benchmark):
    table = benchmark.pedantic(qat_overhead, rounds=1)
    print(table.round(3).to_string())
    assert (table[table.name == "quest"].ratio <= 1.5).all()


def test_ptq_inference(benchmark):
    table = benchmark.pedantic(ptq_overhead, rounds=1)
    print(table.round(3).to_string())
    assert (table[table.name == "W4"].ratio <= 1.2).all()  # weights are rounded once: nothing is added to a pass


if __name__ == "__main__":
    for overhead in (qat_overhead, ptq_overhead):
        print(overhead().round(3).to_string())
