"""Padding is no text: every measure of a padded batch is that of its sequences alone."""

import numpy as np
import pytest
import torch
from torch import nn

from beyond_outliers.metrics import activation_metrics
from beyond_outliers.propagation import decompose, output_readings, relative_error
from beyond_outliers.quantizers import QuantSpec, quantize_model

LENGTHS = [3, 9, 5, 0, 12]  # one sequence is padding alone


class Mixed(nn.Module):
    """Sums over the tokens before (or behind, for padding on the left) in heads, then flat rows."""

    def __init__(self, left):
        super().__init__()
        self.left, self.embed, self.up = left, nn.Embedding(50, 8), nn.Linear(8, 8)
        self.heads, self.flat, self.lm_head = nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 50, bias=False)

    def forward(self, input_ids, attention_mask=None):
        h = self.heads(self.up(self.embed(input_ids)).unflatten(-1, (2, 4)).transpose(1, 2))  # (B, heads, T, 4)
        h = h.flip(2).cumsum(2).flip(2) if self.left else h.cumsum(2)
        h = h.transpose(1, 2).flatten(2)
        return {"logits": self.lm_head(self.flat(h.flatten(0, 1)).view(h.shape))}


@pytest.mark.parametrize("left", [False, True])
def test_every_measure_reads_the_text_alone(left):
    torch.manual_seed(0)
    model, ids = Mixed(left).double(), torch.randint(50, (5, 12))
    quantized = quantize_model(model, QuantSpec(head=True))
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    mask = mask.flip(1) if left else mask
    padded = {"input_ids": ids * mask, "attention_mask": mask.long()}
    padded = [tuple(padded.values())] if left else padded  # by name, and in the order of the model's arguments
    alone = [{"input_ids": row[kept][None]} for row, kept in zip(ids, mask, strict=True) if kept.any()]

    for reduction in ("token", "global"):
        found, expected = (decompose(model, quantized, x, reduction=reduction) for x in (padded, alone))
        assert list(found["name"]) == list(expected["name"]) and "heads" in set(found["name"])
        numbers = expected.columns[3:]
        np.testing.assert_allclose(found[numbers], expected[numbers], rtol=1e-9, atol=1e-12)
        found, expected = (relative_error(model, quantized, x, reduction=reduction) for x in (padded, alone))
        assert (found.n_sequences, found.n_tokens) == (4, sum(LENGTHS)) == (expected.n_sequences, expected.n_tokens)
        assert [found.value, found.low, found.high] == pytest.approx([expected.value, expected.low, expected.high])
        whole = relative_error(model, quantized, ids * mask, reduction=reduction)
        assert abs(whole.value / expected.value - 1) > 0.01  # the test can fail
    found, expected = (output_readings(model, quantized, x) for x in (padded, alone))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    found, expected = (activation_metrics(model, x).drop(columns=["name", "kind"]) for x in (padded, alone))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found["n_tokens"].tolist() == [sum(LENGTHS)] * 3


def test_rows_that_a_router_sends_to_experts_are_text_alone():
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = tf.MixtralConfig(**shape, num_attention_heads=2, num_key_value_heads=2, num_local_experts=3)
    model, ids = tf.MixtralForCausalLM(config).eval(), torch.randint(1, 50, (4, 12))
    mask = torch.arange(12) < torch.tensor([3, 9, 5, 12])[:, None]
    quantized = quantize_model(model, QuantSpec())
    padded = {"input_ids": ids * mask, "attention_mask": mask.long()}
    alone = [{"input_ids": row[None, kept]} for row, kept in zip(ids, mask, strict=True)]
    one, other = (decompose(model, quantized, batches, reduction="global") for batches in (padded, alone))
    np.testing.assert_allclose(one.R, other.R, rtol=1e-4)
    errors = [relative_error(model, quantized, batches) for batches in (padded, alone)]
    assert errors[0].value == pytest.approx(errors[1].value, rel=1e-5) and errors[0].n_sequences == 4


def test_a_batch_that_is_padding_alone_is_refused():
    model = Mixed(False)
    padded = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3)}
    for measure in (decompose, relative_error, output_readings):
        with pytest.raises(ValueError, match="padding alone"):
            measure(model, model, padded)
    with pytest.raises(ValueError, match="padding alone"):
        activation_metrics(model, padded)


class Placed(nn.Module):
    """Reads ids (B, T) beside what all sequences share."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(50, 8), nn.Linear(8, 8)

    def forward(self, positions=None, table=None, bias=None, ids=None):
        h = self.embed(ids)
        h = h if positions is None else h + self.embed(positions)
        h = h if table is None else h + table
        return self.linear(h if bias is None else h + bias)


@pytest.mark.parametrize("shared", ["positions", "table", "bias"])
def test_a_sample_counts_sequences_and_leaves_alone_what_they_share(shared):
    torch.manual_seed(0)
    model, ids = Placed().double(), torch.randint(50, (8, 16))
    quantized = quantize_model(model, QuantSpec())
    value = {"positions": torch.zeros(1, 16, dtype=torch.long), "table": torch.zeros(16, 8), "bias": torch.tensor(0.5)}
    expected = relative_error(model, quantized, [{shared: value[shared], "ids": x[None]} for x in ids], sample=4)
    for batch in ({shared: value[shared], "ids": ids}, {"ids": ids, shared: value[shared]}):
        assert relative_error(model, quantized, batch, sample=4).value == pytest.approx(expected.value, rel=1e-12)
        assert relative_error(model, quantized, [batch], sample=100).n_sequences == 8


def test_measures_do_not_inherit_autocast_or_the_default_dtype():
    torch.manual_seed(0)
    model, ids = Mixed(False), torch.randint(50, (4, 12))
    quantized = quantize_model(model, QuantSpec())

    def measured():
        tables = [
            decompose(model, quantized, ids),
            activation_metrics(model, ids),
            output_readings(model, quantized, ids),
        ]
        return [table.select_dtypes("number") for table in tables] + [relative_error(model, quantized, ids)]

    expected = measured()
    with torch.autocast("cpu", torch.bfloat16):
        found = measured()
    torch.set_default_dtype(torch.float64)
    try:
        again = measured()
    finally:
        torch.set_default_dtype(torch.float32)
    for other in (found, again):
        for table, reference in zip(other[:3], expected[:3], strict=True):
            np.testing.assert_array_equal(table, reference)
        assert other[3] == expected[3]
