"""Number formats written out in NumPy: their levels, code by code, and the scales of groups, float64."""

import numpy as np


def every_code(exponent_bits, mantissa_bits, bias, special=0):
    """Non-negative values of a small float, code by code, as OCP Microscaling Formats 1.0 (5.3) defines them.

    special: how many of the last codes are infinities or NaN.
    """
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits) - special):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        values.append(fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))
    return values


E2M1, E4M3 = every_code(2, 1, 1), every_code(4, 3, 7, special=1)
LEVELS = {f"int{bits}": list(range(2 ** (bits - 1))) for bits in range(2, 9)}
LEVELS |= {"fp4": E2M1, "fp8": E4M3, "fp4_e3m0": every_code(3, 0, 3), "mxfp4": E2M1, "nvfp4": E2M1}
LEVELS |= {"mxfp6_e2m3": every_code(2, 3, 1), "mxfp6_e3m2": every_code(3, 2, 3)}
LEVELS |= {"mxfp8_e4m3": E4M3, "mxfp8_e5m2": every_code(5, 2, 15, special=4)}
BLOCKS = {name: 16 if name == "nvfp4" else 32 for name in LEVELS if name.startswith(("mx", "nv"))}


def nearest(x, levels):
    """Nearest of the non-negative `levels`, of either sign; ties to the one with an even index (even mantissa)."""
    levels, x = np.asarray(levels, float), np.asarray(x, float)
    distance = np.abs(np.abs(x)[..., None] - levels)
    best = distance == distance.min(-1, keepdims=True)
    even = best & (np.arange(len(levels)) % 2 == 0)
    return np.sign(x) * levels[np.where(even.any(-1), even.argmax(-1), best.argmax(-1))]


def scale_of(top, format, whole):
    """Scale of groups whose largest magnitudes are `top`; `whole`: that of the tensor."""
    largest = max(LEVELS[format])
    if format == "nvfp4":
        tensor_scale = whole / (6 * 448)
        return np.minimum(nearest(top / 6 / tensor_scale, E4M3), 448) * tensor_scale
    if format.startswith("mx"):
        return 2.0 ** (np.floor(np.log2(top)) - np.floor(np.log2(largest)))
    return top / largest


def rounded(x, format, axis=-1):
    """`quantize_tensor(x, format)`; axis None: one scale for all of x."""
    groups = x.reshape(-1, BLOCKS[format]) if format in BLOCKS else x
    scale = scale_of(np.abs(groups).max(axis=axis, keepdims=True), format, np.abs(x).max())
    return (nearest(groups / scale, LEVELS[format]) * scale).reshape(x.shape)
