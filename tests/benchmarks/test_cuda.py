"""Training on a CUDA device: compiled bf16 throughput, steps of the six optimizers, what QAT adds.

`python tests/benchmarks/test_cuda.py` on a machine that has one writes data/results/benchmarks_cuda.csv, the
device in their column `implementation`; elsewhere it says that it needs one. On CPU the tests run its parts on a toy.
"""

import math
import sys
import time
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beyond_outliers import paths
from beyond_outliers.config import Olmo2Config
from beyond_outliers.config.protocol import Protocol
from beyond_outliers.model import Olmo2
from beyond_outliers.optimizers import OPTIMIZERS, build_optimizer
from beyond_outliers.quantizers import SCHEMES, QuantSpec, prepare_qat
from beyond_outliers.train import LossModule

CYCLE = 20  # steps after which every optimizer has refreshed its preconditioner, each a whole number of times
CONTEXT, SEQUENCES = 1024, 16  # a micro-batch of scale paper
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bf16, data sheets


def shapes() -> dict[str, Olmo2Config]:
    """The sizes that are timed: one of ours (5.2M parameters), two of the paper's."""
    paper = Protocol.load("paper")
    small = Olmo2Config(vocab_size=2048, width=256, depth=6, n_heads=4)
    return {"5M": small, "50M": paper.model("50M"), "350M": paper.model("350M")}


def operations_per_token(config: Olmo2Config, context: int) -> float:
    """Of forward and backward pass: 6 a parameter, and attention's scores and sums over the whole context.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    return 6 * config.n_parameters + 12 * config.depth * config.width * context


def utilisation(tokens_per_second: float, operations: float, device_name: str) -> float:
    """Share of the device's peak that the model's own operations make; NaN for a device whose peak is not listed."""
    peak = next((of for name, of in PEAK.items() if set(name.split()) <= set(device_name.split())), math.nan)
    return tokens_per_second * operations / peak


def milliseconds(step: Callable[[], object], rounds: int, warm_up: int, device: torch.device) -> pd.Series:
    times = []
    for _ in range(warm_up + rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return pd.Series(times[warm_up:])


def spread(times: pd.Series) -> dict[str, float]:
    return {"q25": times.quantile(0.25), "median": times.median(), "q75": times.quantile(0.75)}


def training_step(model: Olmo2, device: torch.device, context: int, sequences: int, compiled: bool = True) -> Callable:
    """A step of AdamW as `train` does it: bf16 autocast, forward and backward of one micro-batch, update."""
    ids = torch.randint(model.config.vocab_size, (sequences, context), device=device)
    with torch.no_grad():
        model.loss(ids[:1], ids[:1])  # LSQ's steps start here, before compilation
    optimizer, loss = build_optimizer(model, "adamw", 1e-3), LossModule(model, compiled)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def made(config: Olmo2Config, device: torch.device, scheme: str | None = None) -> Olmo2:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Olmo2(config)
    return (prepare_qat(model, QuantSpec(), scheme) if scheme else model).to(device)


def throughput(sizes: dict[str, Olmo2Config], device: torch.device, name: str, rounds: int = 20, **given) -> list[dict]:
    """Tokens a second and model-FLOPs utilisation of a compiled training step, a row a size."""
    given = {"context": CONTEXT, "sequences": SEQUENCES} | given
    rows = []
    for size, config in sizes.items():
        times = milliseconds(training_step(made(config, device), device, **given), rounds, 5, device)
        speed = given["sequences"] * given["context"] / times.median() * 1e3
        mfu = utilisation(speed, operations_per_token(config, given["context"]), name)
        rows.append({"benchmark": "CUDA training step", "size": size, "optimizer": "adamw", **spread(times)})
        rows[-1] |= {"implementation": name, "tokens_per_second": speed, "utilisation": mfu}
    return rows


def optimizer_steps(size: str, config: Olmo2Config, device: torch.device, name: str, cycles: int = 2) -> list[dict]:
    """Milliseconds of a step of each of the six on all parameters, means over whole refresh cycles; a row each."""
    rows = []
    for optimizer_name in OPTIMIZERS:
        model = made(config, device)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer = build_optimizer(model, optimizer_name, 1e-3)
        times = milliseconds(optimizer.step, cycles * CYCLE, 2, device)
        rows.append({"benchmark": "CUDA optimizer step", "size": size, "optimizer": optimizer_name, **spread(times)})
        rows[-1] |= {"implementation": name, "mean": times.mean()}
    return rows


def qat_steps(size: str, config: Olmo2Config, device: torch.device, name: str, rounds: int = 20, **given) -> list[dict]:
    """The compiled step in W4A4 under each scheme over that in full precision; a row each."""
    given = {"context": CONTEXT, "sequences": SEQUENCES} | given
    rows = []
    for scheme in (None, *SCHEMES):
        times = milliseconds(training_step(made(config, device, scheme), device, **given), rounds, 5, device)
        rows.append({"benchmark": f"CUDA step, {scheme or 'full precision'}", "size": size, "optimizer": "adamw"})
        rows[-1] |= {"implementation": name, **spread(times), "ratio": times.median() / rows[0].get("median", math.nan)}
    return rows


def test_operations_are_those_that_torch_counts():
    """Against torch's own counter, on the meta device: matrix products of forward and backward, attention in full."""
    config, context = Olmo2Config(vocab_size=512, width=64, depth=2, n_heads=2), 32
    with torch.device("meta"):
        model, ids = Olmo2(config), torch.zeros(4, context, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(ids).sum().backward()
    assert counter.get_total_flops() / ids.numel() == pytest.approx(operations_per_token(config, context), rel=0.02)


def test_utilisation_names_the_right_peak():
    assert utilisation(989e12, 1.0, "NVIDIA H100 80GB HBM3") == 1 == utilisation(756e12, 1.0, "NVIDIA H100 PCIe")
    assert math.isnan(utilisation(1.0, 1.0, "Some other card"))


@pytest.mark.slow
def test_every_part_runs_on_a_toy():
    toy, cpu = {"toy": Olmo2Config(vocab_size=64, width=32, depth=1, n_heads=2)}, torch.device("cpu")
    small = {"context": 16, "sequences": 2, "rounds": 2, "compiled": False}
    table = pd.DataFrame(throughput(toy, cpu, "CPU", **small) + optimizer_steps("toy", toy["toy"], cpu, "CPU", 1))
    assert list(table.optimizer) == ["adamw", *OPTIMIZERS] and (table["median"] > 0).all()
    assert table.tokens_per_second[0] > 0 and math.isnan(table.utilisation[0])
    assert [row["ratio"] > 0 for row in qat_steps("toy", toy["toy"], cpu, "CPU", **small)[1:]] == [True] * len(SCHEMES)


def measured(device: torch.device) -> pd.DataFrame:
    name, sizes = torch.cuda.get_device_name(device), shapes()
    rows = throughput(sizes, device, name) + optimizer_steps("50M", sizes["50M"], device, name)
    return pd.DataFrame(rows + qat_steps("50M", sizes["50M"], device, name))


@pytest.mark.cuda
@pytest.mark.slow
def test_on_cuda_everything_is_measured():
    table = measured(torch.device("cuda"))
    print(table.to_string())
    assert (table["median"] > 0).all() and set(table.optimizer) == set(OPTIMIZERS)
    assert set(table["size"]) == set(shapes())


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch finds none here")
    result = measured(torch.device("cuda"))
    result.to_csv(paths.RESULTS / "benchmarks_cuda.csv", index=False)
    print(result.to_string())
