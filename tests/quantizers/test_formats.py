"""Number formats against hand tables, torch and torchao."""

import itertools
import sys

import numpy as np
import pytest
import torch

from beyond_outliers.quantizers import (
    FORMATS,
    QuantSpec,
    hadamard_transform,
    quantize_model,
    quantize_tensor,
    table,
)
from grids import BLOCKS, LEVELS, nearest, rounded


@pytest.fixture
def normal():
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("format, axis", [*((name, -1) for name in LEVELS), ("int3", None), ("fp4", None)])
def test_formats_against_their_levels(normal, format, axis):
    assert LEVELS[format][-1] == FORMATS[format].largest and FORMATS[format].block == BLOCKS.get(format)
    x = normal.numpy() * np.logspace(0, -3, 64)  # into the subnormals of small floats
    found = quantize_tensor(torch.from_numpy(x), format, "row" if axis else "tensor")
    np.testing.assert_allclose(found.numpy(), rounded(x, format, axis), rtol=1e-14)


@pytest.mark.parametrize("format", [name for name in LEVELS if name != "nvfp4"])  # whose scale depends on all blocks
def test_every_level_and_every_tie_between_two(format):
    """Under the scale 1, which the first entry of a group sets."""
    levels = LEVELS[format]
    points = np.unique(levels + [(a + b) / 2 for a, b in itertools.pairwise(levels)])
    first = 2.0 ** np.floor(np.log2(levels[-1])) if format in BLOCKS else levels[-1]
    points = np.concatenate([points, -points, np.zeros(-2 * len(points) % 31)]).reshape(-1, 31)
    x = np.concatenate([np.full((len(points), 1), float(first)), points], axis=1)
    assert quantize_tensor(torch.from_numpy(x).float(), format).tolist() == nearest(x, levels).tolist()


def test_fp8_is_torchs_e4m3():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    between = (every[:, None] + every[None, :]).flatten() / 2  # includes every midpoint, that is every tie
    x = torch.cat([torch.tensor([448.0]), every, between])
    assert torch.equal(quantize_tensor(x, "fp8"), x.to(torch.float8_e4m3fn).float())


def test_mxfp4_is_torchaos(normal):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = (normal.float() * torch.logspace(0, -6, 64)).contiguous()
    theirs = mx.MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    assert torch.equal(quantize_tensor(x, "mxfp4"), theirs)


def test_nvfp4_is_torchaos(normal):
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = normal.float().contiguous()
    x[0, 0] = 448 * 6 / 512  # tensor scale 2^-9 exactly: both ways of applying it round alike
    scale = nv.per_tensor_amax_to_scale(x.abs().amax())
    theirs = nv.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)
    assert torch.equal(quantize_tensor(x, "nvfp4"), theirs)


def test_nf4_is_made_of_normal_quantiles(normal):
    """Appendix E of arXiv 2305.14314: evenly spaced quantiles, 8 for one side, 7 for the other, and 0."""
    from scipy.stats import norm

    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2  # the mean of both sides' outermost quantiles
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort([*positive, *negative, 0.0]) / positive.max()
    x = normal.numpy()
    unit = x / np.abs(x).max(-1, keepdims=True)
    expected = levels[np.abs(unit[..., None] - levels).argmin(-1)] * np.abs(x).max(-1, keepdims=True)
    found = quantize_tensor(normal, "nf4").numpy()
    np.testing.assert_allclose(found, expected, atol=4e-6)  # the published levels are rounded
    assert len(np.unique(np.round(found / np.abs(x).max(-1, keepdims=True), 9))) == 16


def test_uint4_is_torchs_affine_quantization(normal):
    from torch.ao.quantization import PerChannelMinMaxObserver

    observer = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.quint8, quant_min=0, quant_max=15)
    x = normal.float()
    x[0] += 5  # all positive: 0 is the lowest level all the same
    x[1] -= 5
    observer(x)
    scale, zero = observer.calculate_qparams()
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero.int(), 0, 0, 15)
    torch.testing.assert_close(quantize_tensor(x, "uint4"), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_int4_with_groups_is_int4_in_blocks_whatever_the_granularity(granularity):
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    for size in (32, 64, 128):
        blocks = quantize_tensor(x.reshape(-1, size), "int4").reshape(x.shape)
        assert torch.equal(quantize_tensor(x, "int4", "block", size), blocks)
        assert torch.equal(quantize_tensor(x, f"int4g{size}", granularity), blocks)


OWN = """
from beyond_outliers.quantizers import Format, microscale, table
import torch
ternary = table([-1, 0, 1])
halves = Format(4.0, lambda x: (2 * x).round() / 2, block=8, scale=microscale(2))
uint3 = Format(7, zero_point=True)
number = 3
"""


@pytest.fixture
def own_formats(tmp_path, monkeypatch):
    (tmp_path / "formats_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("formats_of_mine", None)


def test_a_format_of_your_own_by_module_and_name(own_formats):
    x = torch.tensor([[3.0, -1.6, 1.4, 0.0, -3.0, 1.5, 2.0, -0.1]])
    assert quantize_tensor(x, "formats_of_mine:ternary").tolist() == [[3, -3, 0, 0, -3, 0, 3, 0]]
    # largest power of two below 3 is 2: scale 1/2; 3 / 0.5 = 6 goes to the largest level, 4
    assert quantize_tensor(x, "formats_of_mine:halves").tolist() == [[2, -1.5, 1.5, 0, -2, 1.5, 2, 0]]
    spec = QuantSpec("formats_of_mine:ternary", "formats_of_mine:uint3", method="gptq")
    assert spec.name == "Wformats_of_mine:ternaryAformats_of_mine:uint3+gptq" and QuantSpec.named(spec.name) == spec
    linear = torch.nn.Sequential(torch.nn.Linear(8, 5))
    rounded = quantize_model(linear, spec, calibration=x.repeat(4, 1))
    assert rounded[0].rounded.abs().unique().numel() <= 5 + 1  # a scale a row, and zero
    with pytest.raises(ValueError, match=r"blocks of 8 do not divide the width 12"):
        quantize_tensor(torch.ones(12), "formats_of_mine:halves")


@pytest.mark.parametrize(
    "name, words",
    [
        ("formats_of_mine:binary", ["'binary'", "ternary"]),
        ("formats_of_mine:number", ["is a int", "Format"]),
        ("formats_of_nobody:ternary", ["formats_of_nobody.py", "installed module"]),
        ("formats_of_mine", ["unknown format", "module:name"]),
    ],
)
def test_formats_of_your_own_that_are_not_there(own_formats, name, words):
    with pytest.raises(ValueError) as refusal:
        QuantSpec(weights=name)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


@pytest.mark.parametrize("levels", [[1.0], [0.0, 0.0, 1.0], [1.0, -1.0]])
def test_levels_that_are_no_table_are_refused(levels):
    with pytest.raises(ValueError, match="ascending"):
        table(levels)


QUANTIZING = [format for format in FORMATS if format != "none"]


LOPSIDED = ("uint4", "nf4")  # whose levels are not those of the negative


@pytest.mark.parametrize("format", QUANTIZING)
def test_invariants(normal, format):
    x = normal.float().reshape(-1, max(64, FORMATS[format].block or 0))
    q = quantize_tensor(x, format)
    assert q.shape == x.shape and q.dtype == x.dtype
    if format not in LOPSIDED:
        assert torch.equal(quantize_tensor(-x, format), -q)
    assert torch.equal(quantize_tensor(4 * x, format), 4 * q)
    assert torch.equal(quantize_tensor(x.T.contiguous().T, format), q)  # strides do not matter
    assert 0 < (q - x).norm() < 0.75 * x.norm()
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert torch.equal(quantize_tensor(half, format), quantize_tensor(half.float(), format).to(dtype))


# largest entry from which on a group vanishes, float32, over 2^-126: the largest level, that of e4m3 too for nvfp4's
# scale of scales; mxfp4's scales go down to 2^-126 and its levels to a half
VANISHING = {f"int{bits}": 2 ** (bits - 1) - 1 for bits in range(2, 9)} | {"fp4": 6, "fp8": 448, "nvfp4": 6 * 448}
VANISHING |= {"mxfp4": 0.25}


@pytest.mark.parametrize("format", VANISHING)
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
    width = max(32, FORMATS[format].block or 0)
    assert torch.equal(quantize_tensor(torch.zeros(3, width), format), torch.zeros(3, width))
    assert not quantize_tensor(torch.full((2, width), 1e-45), format).any()
    assert quantize_tensor(torch.zeros(0, width), format).shape == (0, width)
    huge = quantize_tensor(torch.full((2, width), torch.finfo(torch.float32).max), format)
    assert huge.isfinite().all() and huge.min() > 2.5e38


@pytest.mark.parametrize("format", QUANTIZING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_groups_become_nan_as_a_whole(normal, format, bad):
    width = max(32, FORMATS[format].block or 0)
    x = normal.float().reshape(-1, 128)[:, :width].contiguous()
    x[3, 5] = bad
    q = quantize_tensor(x, format)
    group = 16 if format == "nvfp4" else width
    assert q[3, :group].isnan().all()
    others = torch.arange(12) != 3
    assert q.isnan().all() if format == "nvfp4" else torch.equal(q[others], quantize_tensor(x[others], format))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: quantize_tensor(torch.ones(4), "int9"), ["int9", "int8", "mxfp4"]),
        (lambda: quantize_tensor(torch.ones(2, 48), "mxfp4"), ["32", "48"]),
        (lambda: quantize_tensor(torch.ones(2, 48), "int4", "block", 32), ["32", "48", "16, 24"]),
        (lambda: quantize_tensor(torch.ones(2, 48), "int4", "block"), ["block", "None"]),
        (lambda: quantize_tensor(torch.ones(2, 48, dtype=torch.int64), "int4"), ["int64"]),
        (lambda: QuantSpec(weights="int9"), ["weights", "int9", "int8"]),
        (lambda: QuantSpec(granularity="column"), ["column", "tensor, row, block"]),
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
        "A8": QuantSpec("none", "int8"),
        "Wmxfp4": QuantSpec("mxfp4", "none"),
        "FP": QuantSpec("none", "none"),
        "W4A4+rot+gptq+head": QuantSpec(rotate=True, method="gptq", head=True),
        "mxfp4+gptq": QuantSpec("mxfp4", "mxfp4", method="gptq"),
        "W3Afp8+block32": QuantSpec("int3", "fp8", "block", block=32),
        "W4g64A8": QuantSpec("int4g64", "int8"),
        "Wnf4+block64": QuantSpec("nf4", "none", "block", block=64),
        "Amxfp6_e3m2+head": QuantSpec("none", "mxfp6_e3m2", head=True),
    }
    assert {key: spec.name for key, spec in name.items()} == {key: key for key in name}


@pytest.mark.parametrize("weights", FORMATS)
def test_every_name_leads_back_to_its_spec(weights):
    for activations in FORMATS:
        spec = QuantSpec(weights, activations)
        assert QuantSpec.named(spec.name) == spec


@pytest.mark.parametrize("name", ["", "W", "W4A", "Ag", "W4g16", "A4W4", "W4A4+block", "WnoneA4", "int4", "mxfp"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="names no quantization"):
        QuantSpec.named(name)
