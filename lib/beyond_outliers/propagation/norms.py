"""Squared norms and their ratios in float64, a bounded number of elements at a time."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from beyond_outliers.passes import one_thread

REDUCTIONS = ("token", "global")


def pieces(tensors: tuple[Tensor, ...], reduction: str, centred: bool = False) -> Iterator[list[Tensor]]:
    """float64 copies of tensors of one shape, a bounded number of elements at a time.

    (rows, features) for the reduction "token" and for `centred`, which takes every row's mean away; (1, elements) for
    "global", where rows do not matter. Positions where the first tensor is not finite are zero in all.
    """
    size = 2**16 if tensors[0].device.type == "cpu" else 2**24  # a cache's worth, or enough to keep a GPU busy
    by_row = centred or reduction == "token"
    features = tensors[0].shape[-1] if by_row and tensors[0].ndim else tensors[0].numel()
    if not features:
        return
    rows = [x.reshape(-1, features) for x in tensors]
    step = max(1, size // features) if by_row else size
    clean = bool(tensors[0].sum().isfinite())  # a sum that overflows only costs the look below
    for piece in zip(*(x.split(step, 0 if by_row else 1) for x in rows), strict=True):
        values = [x.double() for x in piece]
        if not clean:
            finite = piece[0].isfinite()
            values = [x.masked_fill(~finite, 0.0) for x in values]
        if centred:
            values = [x - x.mean(-1, keepdim=True) for x in values]
        yield values


def dot(x: Tensor, y: Tensor) -> Tensor:
    """(rows,): inner products of the rows of two (rows, features) tensors."""
    return torch.dot(x[0], y[0])[None] if len(x) == 1 else (x * y).sum(-1)


def squared_norms(x: Tensor, reduction: str) -> Tensor:
    """Squared norms, float64: (rows,) for "token", of the whole tensor, (1,), for "global"."""
    norms = [dot(piece, piece) for (piece,) in pieces((x,), reduction)]
    if not norms:  # no entries: an expert without tokens
        return torch.zeros(0 if reduction == "token" else 1, dtype=torch.float64, device=x.device)
    return torch.cat(norms) if reduction == "token" else torch.stack(norms).sum(0)


class Ratios:
    """Sums of `numerators` over a `denominator`, (rows,) squared norms: "global" over all rows, "token" of ratios."""

    def __init__(self, reduction: str):
        self.reduction, self.sums = reduction, torch.zeros((), dtype=torch.float64)

    def add(self, denominator: Tensor, *numerators: Tensor):
        if self.reduction == "token":
            kept = denominator != 0  # a row of zeros has no relative error
            numerators = tuple(x[kept] / denominator[kept] for x in numerators)
            denominator = kept.double()
        self.sums = self.sums + torch.stack([denominator.sum(), *(x.sum() for x in numerators)])

    def values(self, n: int = 1) -> np.ndarray:
        """The `n` ratios, NaN where nothing was added."""
        sums = self.sums.cpu().numpy() if self.sums.ndim else np.zeros(1 + n)
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums[1:] / sums[0]


def quotient(a: float, b: float) -> float:
    """a / b; NaN where b is zero: the ratios of a matrix of zeros are not defined."""
    return a / b if b else float("nan")


def spectral_norm(weight: Tensor) -> float:
    """Largest singular value of a matrix (out, in), in float64, on one CPU thread.

    Up to 128 rows or columns from the eigenvalues of the smaller Gram matrix. Beyond, where all of them would be much
    work for one, by Lanczos iterations (ARPACK), which start from the same vector every time.
    """
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    weight = weight.double()
    wide = weight.T if weight.shape[0] > weight.shape[1] else weight
    with one_thread():
        if len(wide) > 128 and bool(wide.any()):
            matrix = wide.cpu().numpy()
            gram = LinearOperator((len(wide),) * 2, matvec=lambda x: matrix @ (x @ matrix), dtype=matrix.dtype)
            start = np.random.default_rng(0).normal(size=len(wide))
            with contextlib.suppress(ArpackError):  # no convergence: singular values that hardly differ
                return float(eigsh(gram, k=1, v0=start, return_eigenvectors=False)[0] ** 0.5)
        return torch.linalg.eigvalsh(wide @ wide.T)[-1].clamp(min=0).sqrt().item()
