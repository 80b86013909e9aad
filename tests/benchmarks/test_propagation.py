"""What error propagation costs, in forward passes of the same model on the same batch."""

import statistics
import time

import pandas as pd
import torch

from beyond_outliers.metrics import activation_metrics
from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.modules import evaluating
from beyond_outliers.propagation import decompose, relative_error
from beyond_outliers.quantizers import QuantSpec, quantize_model

SHAPES = {"0.33M": {"width": 64, "depth": 4, "n_heads": 4}, "1M": {"width": 128, "depth": 4, "n_heads": 8}}


def compare_propagation(
    sizes=tuple(SHAPES), threads: int = 1, rounds: int = 7, batch: int = 16, context: int = 128
) -> pd.DataFrame:
    """One row a (size, measurement): median seconds, and the median and quartiles of its ratio to a forward pass.

    The measurements of a round run one after the other in one process and are compared within their round. Several
    batches are streamed, so that what happens once a call (tracing, spectral norms) has its usual share.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    for size in sizes:
        torch.manual_seed(0)
        model = Olmo2(Olmo2Config(vocab_size=2048, **SHAPES[size])).eval()
        quantized = quantize_model(model, QuantSpec())
        batches = [torch.randint(0, 2048, (batch, context)) for _ in range(4)]

        def passes(network, batches=batches):
            with evaluating(network):
                for ids in batches:
                    network(ids)

        measurements = {
            "forward pass": lambda m=model: passes(m),
            "quantized forward pass": lambda q=quantized: passes(q),
            "activation_metrics": lambda m=model, b=batches: activation_metrics(m, b),
            "relative_error": lambda m=model, q=quantized, b=batches: relative_error(m, q, b),
            "relative_error, a quarter": lambda m=model, q=quantized, b=batches: relative_error(m, q, b, sample=batch),
            "decompose, block": lambda m=model, q=quantized, b=batches: decompose(m, q, b, "block"),
            "decompose, module": lambda m=model, q=quantized, b=batches: decompose(m, q, b),
            "decompose, open": lambda m=model, q=quantized, b=batches: decompose(m, q, b, attention="open"),
        }
        seconds = {what: [] for what in measurements}
        for number in range(rounds + 1):
            for what, run in measurements.items():
                start = time.perf_counter()
                run()
                if number:  # the first round warms up
                    seconds[what].append(time.perf_counter() - start)
        for what, values in seconds.items():
            ratios = [value / base for value, base in zip(values, seconds["forward pass"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row = {"size": size, "tokens": 4 * batch * context, "what": what, "seconds": statistics.median(values)}
            rows.append(row | {"forward_passes": middle, "low": low, "high": high})
    torch.set_num_threads(before)
    return pd.DataFrame(rows)


def test_cost_of_error_propagation(benchmark):
    table = benchmark.pedantic(compare_propagation, kwargs={"sizes": ("0.33M",), "rounds": 3}, rounds=1)
    print(table.round(4).to_string(index=False))
    passes = table.set_index("what")["forward_passes"]
    assert passes["relative_error"] < passes["decompose, module"]
    assert passes["relative_error, a quarter"] < passes["relative_error"]
