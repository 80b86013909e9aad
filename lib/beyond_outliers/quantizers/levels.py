"""What number formats are made of: roundings to a few levels, rules for the scale of a group, and `Format`.

A "group" is the set of entries that share a scale. Rounding is to the nearest level, ties to the even one.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

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

    block: size of the groups, where the format has one of its own. scale: from the largest magnitudes of the groups,
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
