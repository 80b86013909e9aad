"""What measurements of a model cost in forward passes: error propagation, metrics, GPTQ, zero-shot scoring.

CPU time of one thread, which neighbours change less than wall-clock time.
"""

import time

import pandas as pd
import pytest
import torch

from benchmarking import compared, on_threads, paired
from beyond_outliers.evaluate import multiple_choice
from beyond_outliers.metrics import activation_metrics
from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.modules import evaluating
from beyond_outliers.propagation import decompose, relative_error
from beyond_outliers.quantizers import QuantSpec, quantize_model

SHAPES = {"0.33M": {"width": 64, "depth": 4, "n_heads": 4}, "1M": {"width": 128, "depth": 4, "n_heads": 8}}
GPTQ = QuantSpec(method="gptq")


def measure(sizes=tuple(SHAPES), rounds: int = 7) -> pd.DataFrame:
    """A row for each size and measurement: its time beside a forward pass over the same tokens.

    Several batches are streamed, so that what happens once a call (tracing, spectral norms) has its usual share.
    Zero-shot scoring reads the same number of tokens, as requests of the context's length with 36 % of continuation.
    """
    batch, context, rows = 16, 128, []
    for size in sizes:
        torch.manual_seed(0)
        model = Olmo2(Olmo2Config(vocab_size=2048, **SHAPES[size])).eval()
        quantized = quantize_model(model, QuantSpec())
        batches = [torch.randint(0, 2048, (batch, context)) for _ in range(4)]
        requests = [(ids.tolist(), context - int(0.36 * context)) for ids in torch.cat(batches)]

        def passes(network, batches=batches):
            with evaluating(network):
                for ids in batches:
                    network(ids)

        calls = {
            "forward pass": lambda m=model: passes(m),
            "quantized forward pass": lambda q=quantized: passes(q),
            "activation_metrics": lambda m=model, b=batches: activation_metrics(m, b),
            "relative_error": lambda m=model, q=quantized, b=batches: relative_error(m, q, b),
            "relative_error, a quarter": lambda m=model, q=quantized, b=batches: relative_error(m, q, b, sample=batch),
            "decompose, block": lambda m=model, q=quantized, b=batches: decompose(m, q, b, "block"),
            "decompose, module": lambda m=model, q=quantized, b=batches: decompose(m, q, b),
            "decompose, open": lambda m=model, q=quantized, b=batches: decompose(m, q, b, attention="open"),
            "GPTQ": lambda m=model, b=batches: quantize_model(m, GPTQ, calibration=b),
            "zero-shot scoring": lambda m=model, r=requests: multiple_choice._score(m, r, None),
        }
        with on_threads(1):
            times = paired(calls, rounds, clock=time.process_time)
        rows += [compared(times, what, "forward pass", "measurement", size, 1) for what in list(calls)[1:]]
    return pd.DataFrame(rows)


@pytest.mark.slow
def test_a_sample_costs_less_and_decomposing_more():
    cost = measure(("0.33M",), rounds=3).set_index("what").value
    assert cost["relative_error, a quarter"] < cost["relative_error"] < cost["decompose, module"]
