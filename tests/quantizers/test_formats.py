"""Number formats against hand tables, torch and torchao."""

import itertools

import numpy as np
import pytest
import torch

from beyond_outliers.quantizers import (
    FORMATS,
    QuantSpec,
    hadamard_transform,
    quantize_tensor,
)

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]

E4M3 = sorted({m / 8 * 2.0**-6 for m in range(8)} | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)})[:-1]


def nearest(x, levels):
    """float64 reference: nearest of the non-negative `levels`, ties to the one with an even index (even mantissa)."""
    levels, x = np.asarray(levels, float), np.asarray(x, float)
    distance = np.abs(np.abs(x)[..., None] - levels)
    best = distance.min(-1, keepdims=True)
    candidates = distance == best
    even = candidates & (np.arange(len(levels)) % 2 == 0)
    index = np.where(even.any(-1), even.argmax(-1), candidates.argmax(-1))
    return np.sign(x) * levels[index]


@pytest.fixture
def normal():
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity, axis", [("row", -1), ("tensor", None)])
def test_integer_grids_against_numpy(normal, bits, granularity, axis):
    top = 2 ** (bits - 1) - 1
    x = normal.numpy()
    scale = np.abs(x).max(axis=axis, keepdims=True) / top
    expected = np.rint(x / scale) * scale
    np.testing.assert_allclose(quantize_tensor(normal, f"int{bits}", granularity).numpy(), expected, rtol=1e-15)


def test_int4_by_hand():
    x = torch.tensor([[7.0, 3.4, -3.6, 0.5, 1.5, -7.0], [-14.0, 1.0, 3.0, -0.9, 13.1, 0.0]])
    expected = torch.tensor([[7.0, 3, -4, 0, 2, -7], [-14, 0, 4, 0, 14, 0]])  # 0.5, 1.5: ties to even
    assert torch.equal(quantize_tensor(x, "int4"), expected)


@pytest.mark.parametrize("format, levels", [("fp4", E2M1), ("fp8", E4M3)])
def test_float_formats_against_their_tables(normal, format, levels):
    assert levels[-1] == FORMATS[format].largest
    x = normal.numpy() * np.logspace(0, -4, 64)  # into the subnormals
    scale = np.abs(x).max(-1, keepdims=True) / levels[-1]
    expected = nearest(x / scale, levels) * scale
    np.testing.assert_allclose(quantize_tensor(torch.from_numpy(x), format).numpy(), expected, rtol=1e-14)


def test_fp4_ties_go_to_the_even_mantissa():
    x = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert quantize_tensor(x, "fp4").tolist() == [6, 0, 1, 1, 2, 2, 4, 4]
    assert quantize_tensor(-x, "fp4").tolist() == [-6, 0, -1, -1, -2, -2, -4, -4]


def test_fp8_is_torchs_e4m3():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    between = (every[:, None] + every[None, :]).flatten() / 2  # includes every midpoint, that is every tie
    x = torch.cat([torch.tensor([448.0]), every, between])
    assert torch.equal(quantize_tensor(x, "fp8"), x.to(torch.float8_e4m3fn).float())


def test_block_granularity_is_row_granularity_of_the_blocks(normal):
    blocks = quantize_tensor(normal.reshape(-1, 16), "int4").reshape(normal.shape)
    assert torch.equal(quantize_tensor(normal, "int4", "block", 16), blocks)
    assert not torch.equal(quantize_tensor(normal, "int4"), blocks)


def test_mxfp4_by_hand():
    block = torch.zeros(32)
    block[:6] = torch.tensor([7.9, 5.0, -1.0, 0.3, 0.26, 0.24])  # floor(log2 7.9) = 2: scale 1, 7.9 saturates to 6
    expected = torch.zeros(32)
    expected[:6] = torch.tensor([6.0, 4.0, -1.0, 0.5, 0.5, 0.0])
    assert torch.equal(quantize_tensor(block, "mxfp4"), expected)
    x = torch.cat([block, block * 2**-9, block * 2**20])  # the scale is a power of two: rounding commutes with it
    assert torch.equal(quantize_tensor(x, "mxfp4"), torch.cat([expected, expected * 2**-9, expected * 2**20]))


def test_mxfp4_is_torchaos(normal):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = (normal.float() * torch.logspace(0, -6, 64)).contiguous()
    theirs = mx.MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    assert torch.equal(quantize_tensor(x, "mxfp4"), theirs)


def test_nvfp4_against_numpy(normal):
    x = normal.numpy() * np.logspace(0, -3, 64)
    tensor_scale = np.abs(x).max() / (448 * 6)
    blocks = x.reshape(-1, 16)
    scale = nearest(np.abs(blocks).max(-1, keepdims=True) / 6 / tensor_scale, E4M3) * tensor_scale
    expected = (nearest(np.clip(blocks / scale, -6, 6), E2M1) * scale).reshape(x.shape)
    np.testing.assert_allclose(quantize_tensor(torch.from_numpy(x), "nvfp4").numpy(), expected, rtol=1e-14)


def test_nvfp4_is_torchaos(normal):
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = normal.float().contiguous()
    x[0, 0] = 448 * 6 / 512  # tensor scale 2^-9 exactly: both ways of applying it round alike
    scale = nv.per_tensor_amax_to_scale(x.abs().amax())
    theirs = nv.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)
    assert torch.equal(quantize_tensor(x, "nvfp4"), theirs)


QUANTIZING = [format for format in FORMATS if format != "none"]


@pytest.mark.parametrize("format", QUANTIZING)
def test_invariants(normal, format):
    x = normal.float()
    q = quantize_tensor(x, format)
    assert q.shape == x.shape and q.dtype == x.dtype
    assert torch.equal(quantize_tensor(-x, format), -q)
    assert torch.equal(quantize_tensor(4 * x, format), 4 * q)
    assert torch.equal(quantize_tensor(x.T.contiguous().T, format), q)  # strides do not matter
    assert 0 < (q - x).norm() < 0.75 * x.norm()
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert torch.equal(quantize_tensor(half, format), quantize_tensor(half.float(), format).to(dtype))


def test_error_falls_with_every_bit(normal):
    errors = [(quantize_tensor(normal, f"int{b}") - normal).norm() for b in range(2, 9)]
    assert all(a > 1.5 * b for a, b in itertools.pairwise(errors))


# largest entry from which on a group vanishes, float32, over 2^-126: the largest level, that of e4m3 too for nvfp4's
# scale of scales; mxfp4's scales go down to 2^-126 and its levels to a half
VANISHING = {f"int{bits}": 2 ** (bits - 1) - 1 for bits in range(2, 9)} | {"fp4": 6, "fp8": 448, "nvfp4": 6 * 448}
VANISHING |= {"mxfp4": 0.25}


@pytest.mark.parametrize("format", QUANTIZING)
def test_small_groups_keep_their_relative_error_down_to_the_format_s_own_bound(format):
    """Powers of two commute with rounding: a group keeps its rounded form until its scale is subnormal."""
    group = torch.linspace(-1, 1, 32)[None]
    expected = quantize_tensor(group, format)
    bound = VANISHING[format] * 2.0**-126
    for exponent in range(-30, -112, -1):
        assert torch.equal(quantize_tensor(group * 2.0**exponent, format), expected * 2.0**exponent), exponent
    flat = torch.ones(1, 32)
    assert not quantize_tensor(flat * bound * 0.999, format).any()
    assert (quantize_tensor(flat * bound * 1.001, format) / bound - 1).abs().max() < (
        1.01 if format == "mxfp4" else 0.07
    )


@pytest.mark.parametrize("format", QUANTIZING)
def test_zeros_and_extremes(format):
    assert torch.equal(quantize_tensor(torch.zeros(3, 32), format), torch.zeros(3, 32))
    assert not quantize_tensor(torch.full((2, 32), 1e-45), format).any()
    assert quantize_tensor(torch.zeros(0, 32), format).shape == (0, 32)
    huge = quantize_tensor(torch.full((2, 32), torch.finfo(torch.float32).max), format)
    assert huge.isfinite().all() and huge.min() > 2.5e38


@pytest.mark.parametrize("format", QUANTIZING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_groups_become_nan_as_a_whole(normal, format, bad):
    x = normal[:, :32].float()
    x[3, 5] = bad
    q = quantize_tensor(x, format)
    group = 16 if format == "nvfp4" else 32
    assert q[3, :group].isnan().all()
    others = torch.arange(24) != 3
    assert q.isnan().all() if format == "nvfp4" else torch.equal(q[others], quantize_tensor(x[others], format))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: quantize_tensor(torch.ones(4), "int9"), ["int9", "int8", "mxfp4"]),
        (lambda: quantize_tensor(torch.ones(4), "int4", "column"), ["column", "row"]),
        (lambda: quantize_tensor(torch.ones(2, 48), "mxfp4"), ["32", "48"]),
        (lambda: quantize_tensor(torch.ones(2, 48), "int4", "block", 32), ["32", "48", "16, 24"]),
        (lambda: quantize_tensor(torch.ones(2, 48), "int4", "block"), ["block", "None"]),
        (lambda: quantize_tensor(torch.ones(2, 48, dtype=torch.int64), "int4"), ["int64"]),
        (lambda: QuantSpec(weights="int9"), ["weights", "int9", "int8"]),
        (lambda: QuantSpec(activations="int1"), ["activations", "int1", "int2"]),
        (lambda: QuantSpec(granularity="column"), ["column", "tensor, row, block"]),
        (lambda: QuantSpec(granularity="block"), ["block", "None"]),
        (lambda: QuantSpec(block=32), ["row", "32"]),
        (lambda: QuantSpec(granularity="block", block=-1), ["-1"]),
        (lambda: hadamard_transform(torch.ones(2, 48), 32), ["32", "48"]),
    ],
)
def test_bad_input_is_refused_by_name(call, words):
    with pytest.raises(ValueError) as refusal:
        call()
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_names():
    name = {
        "W4A4": QuantSpec(),
        "W4": QuantSpec(activations="none"),
        "A8": QuantSpec("none", "int8"),
        "mxfp4": QuantSpec("mxfp4", "mxfp4"),
        "Wmxfp4": QuantSpec("mxfp4", "none"),
        "FP": QuantSpec("none", "none"),
        "W4A4+rot": QuantSpec(rotate=True),
        "W4A4+head": QuantSpec(head=True),
        "W3Afp8+block32": QuantSpec("int3", "fp8", "block", block=32),
    }
    assert {key: spec.name for key, spec in name.items()} == {key: key for key in name}
