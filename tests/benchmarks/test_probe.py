"""CPU seconds and peak memory of probing a model of GPT-2's size (124M parameters, random weights) of `transformers`.

Memory is what stays bounded: four copies of the weights, 2.0 GB, and the activations of a batch, which `memory` bounds.
"""

import sys

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from benchmarking import measured, on_threads
from beyond_outliers import paths
from beyond_outliers.probe import probe

CONTEXT, WINDOWS = 64, 4


def measure(threads: int = 1, memory: float = 5e8, **smaller) -> pd.DataFrame:
    """`smaller`: other settings of GPT2Config than GPT-2's own."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = paths.ROOT / "README.md"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train([str(text)], trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=alphabet))
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**smaller)).eval()
    options = {"tokenizer": tokenizer, "context": CONTEXT, "sequences": WINDOWS, "memory": memory}
    with on_threads(threads):
        seconds, peak = measured(lambda: probe(model, text, **options), repeats=1)
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M"
    row = {"benchmark": "probe", "size": size, "threads": threads, "rounds": 1, "seconds": seconds}
    what = f"GPT-2, {WINDOWS} windows of {CONTEXT} tokens"
    return pd.DataFrame(
        [
            row | {"what": what, "unit": "s", "value": seconds},
            row | {"what": f"{what}: peak memory", "unit": "MB", "value": peak / 1e6},
        ]
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_seen():
    rows = measure(1, n_layer=1, n_embd=64, n_head=2, n_positions=128).set_index("unit")
    assert 1 < rows.value["MB"] < 2000 and 0 < rows.value["s"] < 120
