"""Readings at a network's end against closed forms and NumPy, and what an offset of the logits does to each."""

import numpy as np
import pytest
import torch
from torch import nn

from beyond_outliers.propagation import (
    decompose,
    output_readings,
    relative_error,
)
from rounded_models import ids, olmo, quantize


def numpy_readings(z, zq, hidden, hidden_q, tokens):
    """The definitions of `readings`, written out for arrays (B, T, V) and (B, T, D)."""

    def both(name, x, xq, weights=1.0):
        error, signal = (weights * (xq - x) ** 2).sum(-1), (weights * x**2).sum(-1)
        return {name: error.sum() / signal.sum(), f"{name}_token": (error / signal).mean()}

    def logs(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p = np.exp(logs(z))
    d = zq - z
    weighted = [x - (p * x).sum(-1, keepdims=True) for x in (z, zq)]
    centred = [x - x.mean(-1, keepdims=True) for x in (z, zq)]
    loss, loss_q = (-np.take_along_axis(logs(x)[:, :-1], tokens[:, 1:, None], -1).mean() for x in (z, zq))
    return {
        **both("R_L", z, zq),
        **both("R_L_centred", *centred),
        **both("R_softmax", *weighted, weights=p),
        **both("R_final_norm", hidden, hidden_q),
        "kl": (p * (logs(z) - logs(zq))).sum(-1).mean(),
        "kl_second_order": ((p * d**2).sum(-1) - (p * d).sum(-1) ** 2).mean() / 2,
        "offset_share": 1 - (centred[0] ** 2).sum() / (z**2).sum(),
        "top1_agreement": (z.argmax(-1) == zq.argmax(-1)).mean(),
        "loss": loss,
        "loss_quantized": loss_q,
        "increase": loss_q - loss,
    }


def test_all_readings_in_one_pass():
    model = olmo()
    quantized, tokens = quantize(model), ids(6, 12)
    with torch.no_grad():
        outputs = [x.numpy() for one in (model, quantized) for x in (one(tokens), one.hidden(tokens))]
    expected = numpy_readings(outputs[0], outputs[2], outputs[1], outputs[3], tokens.numpy())
    table = output_readings(model, quantized, tokens.split([1, 3, 2]))
    assert table.value.to_dict() == pytest.approx(expected, rel=1e-9)
    assert (table.low < table.value).all() and (table.value < table.high).all() and (table.n == 6).all()
    assert (table.drop("increase") > 0).all(axis=None)
    named = output_readings(model, quantized, [{"ids": tokens}])
    np.testing.assert_allclose(named, table, rtol=1e-12)
    for reduction, end in (("global", ""), ("token", "_token")):
        for centred, name in ((False, "R_L"), (True, "R_L_centred")):
            rows = decompose(model, quantized, tokens, reduction=reduction, centred=centred)
            assert rows["R"].iloc[-1] == pytest.approx(table.value[name + end], rel=1e-9)
            np.testing.assert_allclose(rows["R"], rows["A"] + rows["B"] + rows["C"], rtol=0, atol=1e-14)


def test_a_row_added_to_the_head_moves_raw_readings_alone():
    """The same vector on every row: an offset common to the whole vocabulary, which softmax does not see."""
    model = olmo()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())  # the embedding keeps its own
    quantized, tokens = quantize(model, skip=("head",)), ids(4, 12)

    def read():
        terms = decompose(model, quantized, tokens, centred=True).iloc[-1][["R", "A", "B", "C"]]
        return output_readings(model, quantized, tokens).value, terms.astype(float)

    before, terms = read()
    row = 3 * torch.randn(model.head.weight.shape[1], generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        for one in (model, quantized):
            one.head.weight += row
    after, terms_after = read()
    raw = ["R_L", "R_L_token", "offset_share"]
    assert (np.abs(after[raw] / before[raw] - 1) > 0.05).all()
    np.testing.assert_allclose(after.drop(raw), before.drop(raw), rtol=1e-9)
    np.testing.assert_allclose(terms_after, terms, rtol=1e-9, atol=1e-14)


def test_models_without_a_head_or_tokens_have_what_they_can():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double(), torch.randn(3, 4, 8).double()
    table = output_readings(model, quantize(model), x)
    known = table.index[table.value.notna()]
    assert list(known) == ["R_L", "R_L_token"]
    with pytest.raises(ValueError, match="Sequential has no output head whose logits could be centred"):
        decompose(model, quantize(model), x, centred=True)
    with pytest.raises(ValueError, match="there is no batch in batches"):
        output_readings(model, model, [])


def test_an_interval_of_a_squared_error_stays_positive_and_says_when_it_is_a_guess():
    """Two sequences, one nearly without error: a symmetric interval would reach below zero."""
    model, quantized = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model.weight.data, quantized.weight.data = torch.eye(2), torch.diag(torch.tensor([1.0, 2.0]))
    x = torch.tensor([[[1.0, 0.01]], [[0.01, 1.0]]])
    found = relative_error(model, quantized, x)
    assert 0 < found.low < found.value < found.high
    assert found.value - found.low < found.high - found.value
    assert "over 2 sequences; fewer than 8: the interval is a guess" in str(found)
    assert "guess" not in str(relative_error(model, quantized, x.repeat(4, 1, 1)))
