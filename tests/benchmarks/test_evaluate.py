"""Throughput of scoring and of the validation loss for a 0.33M-parameter model (width 64, depth 4, vocabulary 2048)."""

import numpy as np
import pytest
import torch

from beyond_outliers.evaluate import multiple_choice as evaluate
from beyond_outliers.evaluate import validation_loss
from beyond_outliers.model import Olmo2, Olmo2Config


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Olmo2(Olmo2Config(vocab_size=2048, width=64, depth=4, n_heads=4))


def test_scoring(benchmark, model):
    """1,000 requests with HellaSwag's lengths: 140 tokens a request, 50 of them continuation. HellaSwag has 40,168."""
    rng = np.random.default_rng(0)
    lengths = rng.normal(140, 55, 1000).clip(20, 260).astype(int)
    encoded = [(rng.integers(1, 2048, n).tolist(), max(1, n - int(0.36 * n))) for n in lengths]
    got = benchmark.pedantic(evaluate._score, (model, encoded, None), rounds=3, warmup_rounds=1)
    assert np.isfinite(got).all() and (got < 0).all()


def test_validation_loss(benchmark, model):
    """65,536 tokens in windows of 128, what the trainer asks for at every evaluation."""
    tokens = np.random.default_rng(0).integers(0, 2048, 200_000).astype(np.uint16)
    got = benchmark.pedantic(
        validation_loss,
        (model, tokens, 128),
        {"max_tokens": 65_536, "token_bytes": np.full(2048, 4)},
        rounds=3,
        warmup_rounds=1,
    )
    assert got.n_tokens == 65_536
