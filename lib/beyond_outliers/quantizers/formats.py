"""Number formats: what a tensor becomes when every entry is rounded to a few levels times a shared scale.

Conventions, and their sources:
    int2 .. int8   symmetric AbsMax, levels -(2^(b-1) - 1) .. 2^(b-1) - 1; arXiv 2509.23500, section 3
    fp4, fp8       e2m1 (largest 6) and e4m3 (largest 448) under an AbsMax scale that maps the largest entry to the
                   largest level
    mxfp4          e2m1 in blocks of 32 under a power of two, 2^(floor(log2 max|x|) - 2); OCP Microscaling Formats 1.0
    nvfp4          e2m1 in blocks of 16 under an e4m3 scale, and one float scale a tensor, max|x| / (448 * 6); NVIDIA
    none           the tensor as it is
Rounding is to the nearest level, ties to the even one. A "group" is the set of entries that share a scale.

Edge cases. A group of zeros stays zero. So does, in float32, a group whose scale would be subnormal: one whose largest
entry is below L 2^-126 with L the largest level (int2 2^-126, ..., int8 2^-119, fp4 2^-123.4, fp8 2^-117.2); with
nvfp4 2688 2^-126 = 2^-114.6, for then the tensor's scale is subnormal; with mxfp4 from 2^-128 down, half the smallest
level of its smallest scale. The error is then the entry itself. A group that holds NaN or an infinity has no scale and
becomes NaN as a whole (with nvfp4, because of its tensor scale, the whole tensor), so that it cannot pass unnoticed.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from beyond_outliers.config.parsing import choose

GRANULARITIES = ("tensor", "row", "block")
METHODS = ("rtn", "gptq")


def power_of_two_below(x: Tensor) -> Tensor:
    """2^floor(log2|x|) of normal float32 or float64 numbers, 0 of zeros and subnormals: the exponent bits alone."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)
    return (x.view(torch.int32) & 0x7F80_0000).view(torch.float32)


def round_to_float(x: Tensor, mantissa_bits: int, smallest_exponent: int) -> Tensor:
    """Nearest number of `mantissa_bits` explicit bits, subnormal below 2^smallest_exponent; unbounded above."""
    step = power_of_two_below(x).clamp(min=2.0**smallest_exponent) * 2.0**-mantissa_bits
    return (x / step).round() * step


round_e2m1 = partial(round_to_float, mantissa_bits=1, smallest_exponent=0)
round_e4m3 = partial(round_to_float, mantissa_bits=3, smallest_exponent=-6)
E2M1_MAX, E4M3_MAX = 6.0, 448.0


def _absmax_scale(top: Tensor, largest: float, whole: Tensor) -> Tensor:
    """The largest entry of a group goes to the level `largest`."""
    scale = top / largest
    return torch.where(scale < torch.finfo(top.dtype).tiny, 0.0, scale)


def _mxfp4_scale(top: Tensor, largest: float, whole: Tensor) -> Tensor:
    """The scale's exponent stays within e8m0 and above float32's subnormals."""
    scale = power_of_two_below(top).clamp(2.0**-124, 2.0**127) / 4  # 4: the largest power of two in e2m1
    return torch.where(top.isfinite(), scale, torch.nan)


def _nvfp4_scale(top: Tensor, largest: float, whole: Tensor) -> Tensor:
    """Blocks whose largest entry is under about 2^-19 of the tensor's get the scale 0 and vanish."""
    tensor_scale = _absmax_scale(whole, largest * E4M3_MAX, whole)
    block_scale = top / largest / torch.where(tensor_scale == 0, 1.0, tensor_scale)
    return round_e4m3(block_scale).clamp(max=E4M3_MAX) * tensor_scale


@dataclass(frozen=True)
class Format:
    """`largest` level; `round_unit`, the rounding of already scaled entries; `block`, where blocks have a size of the
    format's own; `scale`, from the largest magnitudes of the groups, `largest`, and that of the whole tensor."""

    largest: float = 0.0
    round_unit: Callable[[Tensor], Tensor] = torch.round
    block: int | None = None
    scale: Callable[[Tensor, float, Tensor], Tensor] = _absmax_scale


FORMATS = {
    **{f"int{bits}": Format(2 ** (bits - 1) - 1, torch.round) for bits in range(2, 9)},
    "fp4": Format(E2M1_MAX, round_e2m1),
    "fp8": Format(E4M3_MAX, round_e4m3),
    "mxfp4": Format(E2M1_MAX, round_e2m1, 32, _mxfp4_scale),
    "nvfp4": Format(E2M1_MAX, round_e2m1, 16, _nvfp4_scale),
    "none": Format(),
}


def group_scale(x: Tensor, format: str, group: int = 1, whole: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and largest magnitude of every group of `x`: its last `group` dimensions, kept with size 1.

    `x` is contiguous float32 or float64. `whole`: the largest magnitude of the whole tensor, which nvfp4's scales
    depend on; 0-d, of `x` by default.
    """
    top = x.abs().amax(dim=tuple(range(-group, 0)), keepdim=True)
    return FORMATS[format].scale(top, FORMATS[format].largest, top.amax() if whole is None else whole), top


def round_to_scale(x: Tensor, format: str, scale: Tensor, top: Tensor) -> Tensor:
    """`x` rounded to levels times the `scale` that `group_scale` gave, with `top`, for a tensor like it.

    Entries beyond the largest level go to it.
    """
    chosen = FORMATS[format]
    levels = chosen.round_unit(x / torch.where(scale == 0, 1.0, scale)).clamp(-chosen.largest, chosen.largest)
    if chosen.block:
        return levels * scale
    return (levels * scale).clamp(-top, top)  # the product may round past `top`, near the end of the range to infinity


def check_width(width: int, format: str, granularity: str = "row", block: int | None = None) -> None:
    """ValueError unless rows of `width` entries divide into the blocks that the format or the granularity asks for."""
    own = FORMATS[format].block
    size = own or (block if granularity == "block" and format != "none" else None)
    if size is not None and width % size:
        divisors = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        valid = f"widths that are multiples of {own}" if own else f"blocks of {divisors}"
        raise ValueError(f"{format}: blocks of {size} do not divide the width {width}; valid: {valid}")


def check_block(granularity: str, block: int | None) -> None:
    """ValueError unless a block size is given exactly where granularity is "block"."""
    choose("granularity", granularity, GRANULARITIES)
    if (granularity == "block") != (block is not None):
        raise ValueError(f"granularity {granularity!r} with block {block!r}; valid: a size with 'block', else None")
    if block is not None and (not isinstance(block, int) or block < 1):
        raise ValueError(f"block must be a whole number of entries from 1, not {block!r}")


def quantize_tensor(x: Tensor, format: str, granularity: str = "row", block: int | None = None) -> Tensor:
    """Rounds `x` (..., width) to `format` and back: the dequantized tensor, of the same shape and dtype.

    granularity: one scale a "tensor", a "row" (last dimension: one token of an activation, one output of a weight) or
    a "block" of `block` consecutive entries of a row. mxfp4 and nvfp4 bring blocks of their own: it does not apply.
    Half precision is computed in float32 and rounded back at the end. "none" returns `x` itself.

    Raises ValueError for an unknown format or granularity, a block that does not divide the width, integers, scalars.
    """
    choose("format", format, FORMATS)
    check_block(granularity, block)
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"x must be a floating-point tensor of rows, not {x.dtype} of shape {tuple(x.shape)}")
    check_width(x.shape[-1], format, granularity, block)
    if format == "none" or x.numel() == 0:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide.contiguous()  # the exponent bits are read through a view of another dtype
    size = FORMATS[format].block or block
    grouped = wide.unflatten(-1, (-1, size)) if size else wide
    whole_tensor = granularity == "tensor" and not size
    rounded = round_to_scale(grouped, format, *group_scale(grouped, format, x.ndim if whole_tensor else 1))
    return rounded.reshape(x.shape).to(x.dtype)


@dataclass(frozen=True)
class QuantSpec:
    """What of a model is rounded, and how: the names of `FORMATS` for weights and for activations.

    granularity, block: see `quantize_tensor`. head: the output head too (its embedding lookup stays as it is).
    rotate: the input of every linear layer is rotated by block Hadamard matrices and the weights to match.
    method: how weights are rounded: "rtn", each to the nearest level, or "gptq" (see `gptq`), which needs calibration.
    Raises ValueError on construction for what is not valid, naming what is.
    """

    weights: str = "int4"
    activations: str = "int4"
    granularity: str = "row"
    head: bool = False
    rotate: bool = False
    block: int | None = None
    method: str = "rtn"

    def __post_init__(self):
        choose("format of the weights", self.weights, FORMATS)
        choose("format of the activations", self.activations, FORMATS)
        check_block(self.granularity, self.block)
        choose("method", self.method, METHODS)
        if self.method == "gptq" and self.weights == "none":
            raise ValueError("method 'gptq' with weights 'none'; valid: a format for the weights, or method 'rtn'")

    @property
    def name(self) -> str:
        """Short name for tables: W4A4, W4, A8, W4Afp8, W4A4+block32+rot+gptq+head; FP when nothing is rounded."""
        if self.weights == self.activations and not self.weights.startswith("int"):
            name = "FP" if self.weights == "none" else self.weights
        else:
            letters = zip("WA", (self.weights, self.activations), strict=True)
            name = "".join(letter + format.removeprefix("int") for letter, format in letters if format != "none")
        name += "" if self.granularity == "row" else f"+{self.granularity}{self.block or ''}"
        return name + "+rot" * self.rotate + "+gptq" * (self.method == "gptq") + "+head" * self.head

    @classmethod
    def named(cls, name: str) -> "QuantSpec":
        """The spec that calls itself `name`; ValueError for what is no such name."""
        start, *parts = name.split("+")
        options: dict = {"rotate": "rot" in parts, "head": "head" in parts}
        options["method"] = "gptq" if "gptq" in parts else "rtn"
        for part in parts:
            if found := re.fullmatch(r"(tensor|block)(\d*)", part):
                options |= {"granularity": found[1], "block": int(found[2]) if found[2] else None}
        if found := re.fullmatch(r"(?:W([a-z]*\d+))?(?:A([a-z]*\d+))?", start):
            formats = [f"int{format}" if (format or "").isdigit() else format or "none" for format in found.groups()]
        else:
            formats = ["none" if start == "FP" else start] * 2
        with contextlib.suppress(ValueError):
            if (spec := cls(weights=formats[0], activations=formats[1], **options)).name == name:
                return spec
        raise ValueError(f"{name!r} names no quantization; valid: W4A4, W4, A8, mxfp4, ..., then +rot, +gptq, +head")

    def check_width(self, width: int) -> None:
        """ValueError unless both formats fit rows of `width` entries."""
        check_width(width, self.weights, self.granularity, self.block)
        check_width(width, self.activations, self.granularity, self.block)
