"""How time and memory grow with parameters, tokens and modules: training, rounding, GPTQ, metrics, decomposing.

    python tests/benchmarks/cost_growth.py       writes data/results/cost_growth.csv and figures/cost_growth.png, .pdf
    python tests/benchmarks/cost_growth.py draw  the figures alone, from the table

One of the three is varied at a time: parameters by the width, modules by the depth (and with it parameters), tokens by
the sequences of the batch. Memory is the peak of resident memory above that before the call. Linux alone: /proc.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.append(str(Path(__file__).parents[1] / "support"))
from benchmarking import measured
from beyond_outliers import paths
from beyond_outliers.metrics import activation_metrics
from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.propagation import decompose, relative_error
from beyond_outliers.quantizers import QuantSpec, quantize_model

FILE = paths.RESULTS / "cost_growth.csv"
GROWN = {  # axis -> (width, depth, sequences of 128 tokens)
    "parameters": [(width, 4, 8) for width in (32, 64, 128)],
    "tokens": [(64, 4, sequences) for sequences in (8, 16, 32)],
    "modules": [(64, depth, 8) for depth in (2, 4, 8)],
}
MICRO_BATCH, CONTEXT = 8, 128


def activities(width: int, depth: int, sequences: int) -> tuple[Olmo2, dict[str, Callable]]:
    torch.manual_seed(0)
    model = Olmo2(Olmo2Config(vocab_size=1024, width=width, depth=depth, n_heads=width // 16))
    ids = torch.randint(0, 1024, (sequences, CONTEXT))
    batches = ids.split(MICRO_BATCH)
    quantized = quantize_model(model, QuantSpec())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def train():
        for part in batches:
            (model.loss(part, part) / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, {
        "training step": train,
        "rounding to nearest": lambda: quantize_model(model, QuantSpec()),
        "GPTQ": lambda: quantize_model(model, QuantSpec(method="gptq"), calibration=batches),
        "outlier metrics": lambda: activation_metrics(model, batches),
        "relative_error": lambda: relative_error(model, quantized, batches),
        "decompose": lambda: decompose(model, quantized, batches),
    }


def measure(grown: dict[str, list[tuple[int, int, int]]] = GROWN, repeats: int = 2) -> pd.DataFrame:
    """A row for each axis, shape and activity."""
    torch.set_num_threads(1)
    rows = []
    for axis, shapes in grown.items():
        for width, depth, sequences in shapes:
            model, calls = activities(width, depth, sequences)
            size = {
                "parameters": model.config.n_parameters,
                "tokens": sequences * CONTEXT,
                "modules": sum(1 for module in model.modules() if not list(module.children())),
            }
            for what, call in calls.items():
                seconds, peak = measured(call, repeats)
                rows.append({"axis": axis, **size, "what": what, "seconds": seconds, "megabytes": peak / 1e6})
    return pd.DataFrame(rows)


def exponent(rows: pd.DataFrame, axis: str, value: str) -> float:
    """Of the power law between the largest two sizes."""
    ends = rows.sort_values(axis).iloc[-2:]
    return float(np.diff(np.log(ends[value]))[0] / np.diff(np.log(ends[axis]))[0])


def draw(table: pd.DataFrame) -> None:
    import matplotlib.pyplot as plt

    from beyond_outliers.plots.theme import set_theme, tidy_log

    set_theme()
    axes_of, names = list(GROWN), list(dict.fromkeys(table.what))
    figure, panels = plt.subplots(2, 3, figsize=(12.5, 6.4), sharey="row")
    for row, (value, label) in enumerate({"seconds": "seconds", "megabytes": "peak memory, MB"}.items()):
        for column, axis in enumerate(axes_of):
            ax = panels[row][column]
            for place, what in enumerate(names):
                part = table[(table.axis == axis) & (table.what == what)].sort_values(axis)
                power = exponent(part, axis, value)
                ax.loglog(part[axis], part[value].clip(lower=0.1 if row else 0), "o-", color=f"C{place}", label=what)
                last = part[axis].iloc[-1], part[value].iloc[-1]
                ax.annotate(f"{power:.1f}", last, xytext=(5, -3), textcoords="offset points", color=f"C{place}")
            ax.set_xlabel(axis)
            tidy_log(ax.xaxis)
            if column == 0:
                ax.set_ylabel(label)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title="at the ends: power\nbetween the last two")
    figure.savefig(paths.ROOT / "figures" / "cost_growth.pdf", metadata={"CreationDate": None})
    figure.savefig(paths.ROOT / "figures" / "cost_growth.png", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    if sys.argv[1:] != ["draw"]:
        paths.write_whole(FILE, measure().to_csv(index=False, float_format="%.4g"))
    draw(pd.read_csv(FILE))
