"""Block Hadamard rotation of a tensor's last dimension: it spreads an outlier over its block and keeps every norm.

Both uses have block-diagonal matrices of the largest power of two up to 128 that divides the width: QuEST (arXiv
2502.05003, section 3) before rounding, and the rotated PTQ in the manner of QuaRot (arXiv 2404.00456).
"""

import torch
from torch import Tensor

from beyond_outliers.passes import made_once

LARGEST_BLOCK = 128


def hadamard_block(width: int) -> int:
    """Largest power of two, up to 128, that divides `width`; 1 (no rotation) for odd widths."""
    return min(width & -width, LARGEST_BLOCK)


_MATRICES: dict = {}


def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's (size, size) matrix over sqrt(size), `size` a power of two: symmetric and its own inverse."""

    def make() -> Tensor:
        matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / size**0.5).to(device, dtype)

    return made_once(_MATRICES, (size, dtype, device), make)


def hadamard_transform(x: Tensor, block: int | None = None) -> Tensor:
    """x (..., width) times the block-diagonal Hadamard matrix, in x's dtype under autocast too; twice, it gives x back.

    `block` is a power of two that divides the width, `hadamard_block(width)` by default; ValueError otherwise.
    """
    block = block or hadamard_block(x.shape[-1])
    if block & (block - 1) or x.shape[-1] % block:
        raise ValueError(f"block must be a power of two that divides the width {x.shape[-1]}, not {block}")
    if block == 1:
        return x
    rows, matrix = x.reshape(-1, block), hadamard_matrix(block, x.dtype, x.device)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return (rows @ matrix).reshape(x.shape)
    return (rows @ matrix).reshape(x.shape)
