"""torch's attention and encoder layers in terms of linear layers, against torch's own and an explicit reference."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beyond_outliers.propagation import decompose, relative_error
from beyond_outliers.quantizers import QuantSpec, open_layers, prepare_qat, quantize_model, quantize_tensor
from rounded_models import squared_error

W, B, T, S = 16, 3, 5, 7


def attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(W, 4, **options).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def inputs(made: nn.MultiheadAttention, batched: bool = True) -> list:
    torch.manual_seed(1)
    widths = W, made.kdim, made.vdim
    shapes = [(B, n, w) if made.batch_first else (n, B, w) for n, w in zip((T, S, S), widths, strict=True)]
    if not batched:
        shapes = [(n, w) for n, w in zip((T, S, S), widths, strict=True)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


OPTIONS = [{}, {"batch_first": True}, {"bias": False}, {"kdim": 8, "vdim": 12}, {"add_bias_kv": True}]
OPTIONS += [{"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True}]
PADDING = torch.arange(S) >= torch.tensor([[7], [4], [6]])
CAUSAL = torch.ones(T, S, dtype=torch.bool).triu(1)
CALLS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"key_padding_mask": PADDING},
    {"attn_mask": CAUSAL, "need_weights": False},
    {"attn_mask": CAUSAL, "is_causal": True},
    {"attn_mask": torch.randn(B * 4, T, S, dtype=torch.float64), "key_padding_mask": PADDING},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: "+".join(call))
def test_attention_is_torchs_in_full_precision(options, call):
    made = attention(**options).eval()
    opened = open_layers(copy.deepcopy(made))
    assert type(opened) is not type(made)
    expected, got = (one(*inputs(made), **call) for one in (made, opened))
    for y, x in zip(got, expected, strict=True):
        assert (y is None) == (x is None)
        if x is not None:
            torch.testing.assert_close(y, x)


def test_attention_without_a_batch_and_its_gradients():
    made = attention()
    opened = open_layers(copy.deepcopy(made))
    expected, got = (one(*inputs(made, batched=False)) for one in (made, opened))
    torch.testing.assert_close(got, expected)
    expected[0].square().sum().backward()
    got[0].square().sum().backward()
    grads = torch.cat([getattr(opened, f"{name}_proj").weight.grad for name in "qkv"])
    torch.testing.assert_close(grads, made.in_proj_weight.grad)
    with pytest.raises(ValueError, match="nested"):
        opened(*[torch.nested.nested_tensor([torch.randn(2, W)])] * 3)


def q(x, format="int3"):
    return quantize_tensor(x, format)


def by_hand(layer: nn.TransformerEncoderLayer, x: torch.Tensor) -> torch.Tensor:
    """Post-norm encoder layer with both operands of its six products with weights rounded."""

    def linear(x, weight, bias):
        return q(x) @ q(weight).T + bias

    attn = layer.self_attn
    heads = []
    for weight, bias in zip(attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True):
        heads.append(linear(x, weight, bias).unflatten(-1, (2, -1)).transpose(1, 2))
    scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(heads[0].shape[-1])
    mixed = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(-2)
    x = layer.norm1(x + linear(mixed, attn.out_proj.weight, attn.out_proj.bias))
    inner = F.relu(linear(x, layer.linear1.weight, layer.linear1.bias))
    return layer.norm2(x + linear(inner, layer.linear2.weight, layer.linear2.bias))


def encoder(depth: int) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(W, 2, 24, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, depth).eval()


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_encoder_layers_round_every_operand(context):
    stack = encoder(2)
    quantized = quantize_model(stack, QuantSpec("int3", "int3"), strict=True)
    assert quantized.quantization.share == 1
    x = torch.randn(B, T, W, dtype=torch.float64)
    with context():
        y = x
        for layer in stack.layers:
            y = by_hand(layer, y)
        torch.testing.assert_close(quantized(x), y)
    padding = torch.arange(T) >= torch.tensor([[5], [3], [4]])
    with context():  # torch's kernel for padded batches is off as well
        torch.testing.assert_close(quantized(x, src_key_padding_mask=~padding & False), quantized(x))
        assert quantized(x, src_key_padding_mask=padding).isfinite().all()


def test_measures_see_the_layers_of_an_encoder():
    stack = encoder(1)
    x = torch.randn(B, T, W, dtype=torch.float64)
    quantized = quantize_model(stack, QuantSpec("none", "int2"))
    expected = squared_error(stack, quantized, x, None)
    assert expected > 1e-3
    assert relative_error(stack, quantized, x, reduction="global").value == pytest.approx(expected, rel=1e-9)
    table = decompose(stack, quantized, x, reduction="global")
    assert table["R"].iloc[-1] == pytest.approx(expected, rel=1e-9)
    opened = open_layers(copy.deepcopy(stack))
    table = decompose(opened, quantize_model(opened, QuantSpec("none", "int2")), x, attention="open")
    assert (table["kind"] == "linear").sum() == 6


def test_decoders_and_training():
    torch.manual_seed(0)
    decoder = nn.TransformerDecoderLayer(W, 2, 24, batch_first=True, dropout=0.0)
    quantized = quantize_model(decoder, QuantSpec("none", "none", rotate=True), strict=True)
    x, memory = torch.randn(B, T, W), torch.randn(B, S, W)
    torch.testing.assert_close(quantized(x, memory), decoder(x, memory), rtol=1e-4, atol=1e-4)
    qat = prepare_qat(decoder, QuantSpec())
    qat(x, memory).square().sum().backward()
    assert sum(p.numel() for p in qat.parameters()) == sum(p.numel() for p in decoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in qat.named_parameters() if p.ndim > 1)


def test_attention_that_cannot_be_opened_is_named():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    model = nn.Sequential(Own(W, 2), nn.Linear(W, W))
    with pytest.warns(UserWarning, match=r"0\.in_proj_weight \(parent reads \.weight.*0\.out_proj"):
        quantized = quantize_model(model, QuantSpec())
    torch.testing.assert_close(quantized[0](torch.ones(2, W)), model[0](torch.ones(2, W)))
