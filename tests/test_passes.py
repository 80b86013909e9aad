"""Tensors that are made once: usable in training whatever the mode in which they were made."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.passes import made_once, text_rows, text_tokens
from beyond_outliers.quantizers import QuantSpec, hadamard_transform, prepare_qat, quantize_model


def test_made_once():
    cache: dict = {}
    with FakeTensorMode():
        assert type(made_once(cache, "a", lambda: torch.ones(2))) is not torch.Tensor and not cache
    with torch.inference_mode():
        first = made_once(cache, "a", lambda: torch.ones(2))
    assert first is made_once(cache, "a", lambda: torch.zeros(2)) and type(first) is torch.Tensor
    assert not first.is_inference()


def test_after_fake_tensors_and_inference_a_model_trains_as_one_that_never_saw_them():
    """Widths and lengths that nothing else in the tests uses: the tables of others may be there already."""
    torch.manual_seed(0)
    config = Olmo2Config(vocab_size=64, width=24, depth=1, n_heads=2)
    model, ids = prepare_qat(Olmo2(config), QuantSpec()), torch.randint(0, 64, (2, 11))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(ids))
        hadamard_transform(torch.randn(3, 24))
    with torch.inference_mode():
        model(ids)
    model.loss(ids, ids).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x := torch.randn(3, 24))), x)


def test_an_exported_program_is_the_rotated_model():
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 8)), QuantSpec(rotate=True))
    x = torch.randn(5, 40)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_lsq_learns_its_step_whatever_the_first_batch_came_under(mode):
    layer, x = prepare_qat(nn.Sequential(nn.Linear(16, 16)), QuantSpec(), "lsq")[0], torch.randn(3, 16)
    parameter = layer.activation_quantizer.log_step
    with mode():
        layer(x)
    assert layer.activation_quantizer.log_step is parameter and not parameter.is_inference()
    assert parameter.item() == pytest.approx(float((2 * x.abs().mean() / 7**0.5).log()), rel=1e-6)
    layer(x).square().sum().backward()
    assert parameter.grad.abs() > 0


def test_lsq_does_not_start_from_a_batch_that_is_none():
    layer = prepare_qat(nn.Sequential(nn.Linear(16, 16)), QuantSpec(), "lsq")
    with pytest.raises(RuntimeError, match="valid: one forward pass before"):
        torch.export.export(layer, (torch.randn(3, 16),))
    assert not layer[0].activation_quantizer.started and layer[0].activation_quantizer.log_step.isnan()
    layer(torch.randn(3, 16))
    assert layer[0].activation_quantizer.started


MASK = torch.tensor([[1, 1, 0], [1, 2, 3]])  # whole numbers name the texts that are packed into a row
TEXT = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize(
    "batch, expected",
    [
        ({"attention_mask": MASK}, TEXT),
        ({"attention_mask": MASK.bool()}, TEXT),
        ({"src": None, "src_key_padding_mask": ~TEXT}, TEXT),
        ({"src_key_padding_mask": torch.zeros(2, 3).masked_fill(~TEXT, float("-inf"))}, TEXT),
        ({"attention_mask": torch.ones(2, 3)}, None),
        ({"attention_mask": torch.zeros(2, 1, 3, 3)}, None),
        ({"input_ids": MASK}, None),
        (MASK, None),
    ],
)
def test_text_is_what_a_mask_says(batch, expected):
    tokens = text_tokens(batch, torch.nn.Linear(2, 2))
    assert tokens is expected or torch.equal(tokens, expected)


def test_rows_of_text():
    x = torch.arange(12.0).reshape(2, 3, 2)
    kept = torch.tensor([[0.0, 1], [2, 3], [6, 7], [8, 9], [10, 11]])
    assert torch.equal(text_rows(x, TEXT), kept) and torch.equal(text_rows(x.flatten(0, 1), TEXT), kept)
    assert text_rows(x, None) is x and text_rows(x[:, 0], TEXT).shape == (2, 2)  # pooled: a row a text
    with pytest.raises(ValueError, match="padding alone"):
        text_tokens({"attention_mask": MASK * 0}, torch.nn.Identity())
