"""Validation loss against a float64 NumPy re-derivation."""

import numpy as np
import pytest
import torch

from beyond_outliers.evaluate import (
    validation_loss,
)
from beyond_outliers.model import Olmo2, Olmo2Config
from references import log_softmax


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Olmo2(Olmo2Config(vocab_size=320, width=32, depth=2, n_heads=2, init_std=0.2))
    return model.train()


def test_validation_loss_is_the_float64_mean_over_windows(model):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 320, 1003).astype(np.uint16)
    token_bytes = rng.integers(1, 9, 320)
    got = validation_loss(model, tokens, context=16, batch_size=7, token_bytes=token_bytes)
    windows = tokens[: 1003 // 17 * 17].reshape(-1, 17).astype(np.int64)
    with torch.no_grad():
        table = log_softmax(model(torch.from_numpy(windows[:, :-1])).numpy())
    losses = -np.take_along_axis(table, windows[:, 1:, None], -1)[..., 0]
    assert got.n_tokens == losses.size == 59 * 16
    assert got.loss == pytest.approx(losses.mean(), rel=1e-6)
    assert got.standard_error == pytest.approx(losses.mean(1).std(ddof=1) / np.sqrt(59), rel=1e-5)
    bits = losses.sum() / np.log(2) / token_bytes[windows[:, 1:]].sum()
    assert got.bits_per_byte == pytest.approx(bits, rel=1e-6)
    assert np.isnan(validation_loss(model, tokens, context=16).bits_per_byte)


class Recorder(torch.nn.Module):
    """Uniform logits; remembers what it was shown, and in which mode."""

    def __init__(self, vocabulary):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(vocabulary))
        self.frozen = torch.nn.Dropout().eval()
        self.seen, self.modes = [], []

    def forward(self, ids):
        self.seen.append(ids.clone())
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.weight.expand(*ids.shape, -1)


def test_sampled_windows_spread_over_the_tokens_and_every_call_has_one_shape():
    tokens = np.arange(1000, dtype=np.uint16)
    model = Recorder(1000).train()
    model.frozen.eval()
    got = validation_loss(model, tokens, context=9, batch_size=4, max_tokens=99)
    assert got.n_tokens == 99  # eleven of the hundred windows
    firsts = torch.cat(model.seen)[:11, 0].tolist()
    assert firsts == [first // 10 * 10 for first in firsts] and np.ptp(np.diff(firsts)) <= 10
    assert firsts[0] == 0 and firsts[-1] >= 900
    assert {tuple(ids.shape) for ids in model.seen} == {(4, 9)}
    assert set(model.modes) == {(False, False)}
    assert model.training and not model.frozen.training and model.weight.requires_grad


def test_validation_loss_refuses_bad_input(model):
    with pytest.raises(ValueError, match=r"a window needs 17 tokens.*there are 16 tokens"):
        validation_loss(model, np.zeros(16, dtype=np.uint16), context=16)
    with pytest.raises(ValueError, match="max_tokens is 15"):
        validation_loss(model, np.zeros(160, dtype=np.uint16), context=16, max_tokens=15)
    with pytest.raises(ValueError, match="token 7 has no entry in token_bytes of length 5"):
        validation_loss(model, np.full(40, 7, dtype=np.uint16), context=16, token_bytes=np.ones(5))
