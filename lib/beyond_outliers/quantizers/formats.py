"""Number formats: what a tensor becomes when every entry is rounded to a few levels times a shared scale.

Conventions, and their sources:
    int2 .. int8     symmetric AbsMax, levels -(2^(b-1) - 1) .. 2^(b-1) - 1; arXiv 2509.23500, section 3
    int4g32, ...     int4 with a scale for every 32, 64 or 128 consecutive entries of a row, whatever the granularity
    uint4            asymmetric: levels 0 .. 15 and a zero point, the range of a group and 0 between them
    fp4, fp8         e2m1 (largest 6) and e4m3 (largest 448) under an AbsMax scale that maps the largest entry to the
                     largest level
    fp4_e3m0         powers of two, 1/4 .. 16, and 0, under an AbsMax scale
    nf4              quantiles of a normal distribution under an AbsMax scale; arXiv 2305.14314 (there in blocks of 64)
    mxfp4            e2m1 in blocks of 32 under a power of two, 2^(floor(log2 max|x|) - 2)
    mxfp6_e2m3, ...  likewise e2m3 (largest 7.5), e3m2 (28), e4m3 (448) and e5m2 (57344); OCP Microscaling Formats 1.0
    nvfp4            e2m1 in blocks of 16 under an e4m3 scale, and one float scale a tensor, max|x| / (448 * 6); NVIDIA
    none             the tensor as it is
    module:name      yours: a `Format` in a Python file
Rounding is to the nearest level, ties to the even one. A "group" is the set of entries that share a scale.

Edge cases. A group of zeros stays zero. So does, in float32, a group whose scale would be subnormal: one whose largest
entry is below L 2^-126 with L the largest level (int2 2^-126, ..., int8 2^-119, fp4 2^-123.4, fp8 2^-117.2); with
nvfp4 2688 2^-126 = 2^-114.6, for then the tensor's scale is subnormal; with mxfp4 from 2^-128 down, half the smallest
level of its smallest scale. The error is then the entry itself. A group that holds NaN or an infinity has no scale and
becomes NaN as a whole (with nvfp4, because of its tensor scale, the whole tensor), so that it cannot pass unnoticed.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from beyond_outliers.config.loading import is_own, load_own
from beyond_outliers.config.parsing import choose

GRANULARITIES = ("tensor", "row", "block")

Rounding = Callable[[Tensor], Tensor]
Scale = Callable[[Tensor, float, Tensor], Tensor]

# ----------------------------------------------------------------------------------------------------------- roundings


def power_of_two_below(x: Tensor) -> Tensor:
    """2^floor(log2|x|) of normal float32 or float64 numbers, 0 of zeros and subnormals: the exponent bits alone."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)
    return (x.view(torch.int32) & 0x7F80_0000).view(torch.float32)


def round_to_float(x: Tensor, mantissa_bits: int, smallest_exponent: int) -> Tensor:
    """Nearest number of `mantissa_bits` explicit bits, subnormal below 2^smallest_exponent; unbounded above."""
    step = power_of_two_below(x).clamp(min=2.0**smallest_exponent) * 2.0**-mantissa_bits
    return (x / step).round() * step


def float_rounding(mantissa_bits: int, smallest_exponent: int) -> Rounding:
    return partial(round_to_float, mantissa_bits=mantissa_bits, smallest_exponent=smallest_exponent)


def nearest_of(levels: Sequence[float]) -> Rounding:
    """Rounding to the nearest of any levels; a tie goes to the one an even number of levels away from the smallest.

    ValueError for fewer than two levels, or levels that are not in ascending order.
    """
    if len(levels) < 2 or any(a >= b for a, b in itertools.pairwise(levels)):
        raise ValueError(f"levels must be two or more in ascending order, not {tuple(levels)}")
    wide = torch.tensor(levels, dtype=torch.float64, device="cpu")
    zero = int(wide.abs().argmin())

    def rounding(x: Tensor) -> Tensor:
        table = wide.to(x)
        between = (table[1:] + table[:-1]) / 2
        below = torch.bucketize(x, between)  # a tie goes to the lower level
        odd = (below - zero) % 2 == 1
        tie = odd & (x == between[below.clamp(max=len(between) - 1)])
        return torch.where(x.isnan(), x, table[below + tie.to(below.dtype)])

    return rounding


# -------------------------------------------------------------------------------------------------------------- scales


def absmax_scale(top: Tensor, largest: float, whole: Tensor) -> Tensor:
    """The largest entry of a group goes to the level `largest`; a scale that would be subnormal is 0."""
    scale = top / largest
    return torch.where(scale < torch.finfo(top.dtype).tiny, 0.0, scale)


def microscale(exponent: int) -> Scale:
    """2^(floor(log2 max|x|) - exponent), where 2^exponent is the largest power of two among the levels.

    OCP Microscaling Formats 1.0, section 6.3. The scale's exponent stays within e8m0 and above float32's subnormals.
    """

    def scale(top: Tensor, largest: float, whole: Tensor) -> Tensor:
        found = power_of_two_below(top).clamp(2.0 ** (exponent - 126), 2.0**127) / 2**exponent
        return torch.where(top.isfinite(), found, torch.nan)

    return scale


round_e4m3 = float_rounding(3, -6)
E4M3_MAX = 448.0


def nvfp4_scale(top: Tensor, largest: float, whole: Tensor) -> Tensor:
    """Blocks whose largest entry is under about 2^-19 of the tensor's get the scale 0 and vanish."""
    tensor_scale = absmax_scale(whole, largest * E4M3_MAX, whole)
    block_scale = top / largest / torch.where(tensor_scale == 0, 1.0, tensor_scale)
    return round_e4m3(block_scale).clamp(max=E4M3_MAX) * tensor_scale


# -------------------------------------------------------------------------------------------------------------- formats


@dataclass(frozen=True)
class Format:
    """A number format: Format(largest level, rounding of already scaled entries, ...); `FORMATS` has examples.

    block: size of the groups, where the format fixes one. scale: from the largest magnitudes of the groups,
    `largest`, and the largest magnitude of the whole tensor. zero_point: levels are the whole numbers 0 .. `largest`,
    and the range of a group, 0 included, is mapped onto them: scale (max - min) / largest, of which 0 stays a multiple.
    """

    largest: float = 0.0
    round_unit: Rounding = torch.round
    block: int | None = None
    scale: Scale = absmax_scale
    zero_point: bool = False


def table(levels: Sequence[float], block: int | None = None, scale: Scale = absmax_scale) -> Format:
    """A format of any levels, in ascending order: `table([-1, 0, 1])` is a ternary one."""
    return Format(max(abs(level) for level in levels), nearest_of(levels), block, scale)


# ------------------------------------------------------------------------------------------------------------ the list

round_e2m1 = float_rounding(1, 0)
E2M1_MAX = 6.0
POWERS = [2.0**exponent for exponent in range(-2, 5)]
# fmt: off
NORMAL_QUANTILES = [  # as published with QLoRA: zero is one of them, so that one side has a level more
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]
# fmt: on

FORMATS = {
    **{f"int{bits}": Format(2 ** (bits - 1) - 1) for bits in range(2, 9)},
    **{f"int4g{size}": Format(7, block=size) for size in (32, 64, 128)},
    "uint4": Format(15, zero_point=True),
    "fp4": Format(E2M1_MAX, round_e2m1),
    "fp4_e3m0": table([-power for power in reversed(POWERS)] + [0.0, *POWERS]),
    "nf4": table(NORMAL_QUANTILES),
    "fp8": Format(E4M3_MAX, round_e4m3),
    "mxfp4": Format(E2M1_MAX, round_e2m1, 32, microscale(2)),
    "mxfp6_e2m3": Format(7.5, float_rounding(3, 0), 32, microscale(2)),
    "mxfp6_e3m2": Format(28.0, float_rounding(2, -2), 32, microscale(4)),
    "mxfp8_e4m3": Format(E4M3_MAX, round_e4m3, 32, microscale(8)),
    "mxfp8_e5m2": Format(57344.0, float_rounding(2, -14), 32, microscale(15)),
    "nvfp4": Format(E2M1_MAX, round_e2m1, 16, nvfp4_scale),
    "none": Format(),
}


@cache
def _loaded(name: str) -> Format:
    found = load_own(name, "format")
    if not isinstance(found, Format):
        raise ValueError(f"format {name!r} is a {type(found).__name__}; valid: a beyond_outliers.quantizers.Format")
    return found


def format_named(name: str, kind: str = "format") -> Format:
    """An entry of `FORMATS`, or yours by `module:name`. ValueError naming the valid ones."""
    if name in FORMATS:
        return FORMATS[name]
    if not is_own(name):
        choose(kind, name, [*FORMATS, "module:name of your own"])
    return _loaded(name)


def group_scale(x: Tensor, format: str, group: int = 1, whole: Tensor | None = None) -> tuple[Tensor, ...]:
    """Scale and largest magnitude of every group of `x`: its last `group` dimensions, kept with size 1.

    `x` is contiguous float32 or float64. `whole`: the largest magnitude of the whole tensor, which nvfp4's scales
    depend on; 0-d, of `x` by default. Formats with a zero point have it as a third tensor: the level of the value 0.
    """
    chosen, dims = format_named(format), tuple(range(-group, 0))
    top = x.abs().amax(dim=dims, keepdim=True)
    if not chosen.zero_point:
        return chosen.scale(top, chosen.largest, top.amax() if whole is None else whole), top
    low, high = (end(x, dim=dims, keepdim=True) for end in (torch.amin, torch.amax))
    low, high = low.clamp(max=0), high.clamp(min=0)
    # halves: the range itself may overflow
    scale = 2 * absmax_scale(high / 2 - low / 2, chosen.largest, top)
    return scale, top, (-low / torch.where(scale == 0, 1.0, scale)).round()


def round_to_scale(x: Tensor, format: str, scale: Tensor, top: Tensor, zero: Tensor | None = None) -> Tensor:
    """`x` rounded to levels times the `scale` that `group_scale` gave, with `top`, for a tensor like it.

    Entries beyond the largest level go to it.
    """
    chosen = format_named(format)
    levels = chosen.round_unit(x / torch.where(scale == 0, 1.0, scale))
    if zero is not None:
        limit = torch.finfo(x.dtype).max  # a level may lie just past the range
        return (levels.clamp(-zero, chosen.largest - zero) * scale).clamp(-limit, limit)
    levels = levels.clamp(-chosen.largest, chosen.largest)
    if chosen.scale is not absmax_scale:
        return levels * scale
    return (levels * scale).clamp(-top, top)  # the product may round past `top`, near the end of the range to infinity


def check_width(width: int, format: str, granularity: str = "row", block: int | None = None) -> None:
    """ValueError unless rows of `width` entries divide into the blocks that the format or the granularity asks for."""
    block_size = format_named(format).block
    size = block_size or (block if granularity == "block" and format != "none" else None)
    if size is not None and width % size:
        divisors = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        valid = f"widths that are multiples of {block_size}" if block_size else f"blocks of {divisors}"
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
    a "block" of `block` consecutive entries of a row. To formats with fixed blocks it does not apply.
    Half precision is computed in float32 and rounded back at the end. "none" returns `x` itself.

    Raises ValueError for an unknown format or granularity, a block that does not divide the width, integers, scalars.
    """
    block_size = format_named(format).block
    check_block(granularity, block)
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"x must be a floating-point tensor of rows, not {x.dtype} of shape {tuple(x.shape)}")
    check_width(x.shape[-1], format, granularity, block)
    if format == "none" or x.numel() == 0:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide.contiguous()  # the exponent bits are read through a view of another dtype
    size = block_size or block
    grouped = wide.unflatten(-1, (-1, size)) if size else wide
    whole_tensor = granularity == "tensor" and not size
    rounded = round_to_scale(grouped, format, *group_scale(grouped, format, x.ndim if whole_tensor else 1))
    return rounded.reshape(x.shape).to(x.dtype)
