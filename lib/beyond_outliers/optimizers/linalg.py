"""Linear algebra that the matrix optimizers share: products with structure, eigendecompositions."""

import torch
from torch import Tensor

from beyond_outliers.passes import one_thread

SHORT = 512  # rows of a Gram matrix below which mirroring one half costs more than it saves; measured


def add_gram_(out: Tensor, x: Tensor, beta: float, alpha: float) -> Tensor:
    """out <- beta out + alpha x x^T in place, for symmetric out: (N, n, n) and (N, n, k); beta 0 ignores old content.

    Of long sides only strips up to the diagonal are computed, the rest is mirrored.
    """
    n = x.shape[1]
    size = n if n < SHORT else -(-n // 4)
    for r in (slice(start, min(start + size, n)) for start in range(0, n, size)):
        out[:, r, : r.stop].baddbmm_(x[:, r], x[:, : r.stop].mT, beta=beta, alpha=alpha)
        if r.start:
            out[:, : r.start, r] = out[:, r, : r.start].mT
    return out


def gram(x: Tensor) -> Tensor:
    """x x^T."""
    if x.shape[1] < SHORT:
        return torch.bmm(x, x.mT)
    return add_gram_(x.new_empty(*x.shape[:2], x.shape[1]), x, beta=0, alpha=1)


@one_thread()
def orthonormal(x: Tensor) -> Tensor:
    """Q of the QR decomposition of a matrix, without R."""
    return torch.linalg.householder_product(*torch.geqrf(x))


@one_thread()
def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N, n), ascending, and eigenvectors (N, n, n) of symmetric matrices; in float64 if float32 fails."""
    try:
        return torch.linalg.eigh(x)
    except torch.linalg.LinAlgError:
        values, vectors = torch.linalg.eigh(x.double())
        return values.to(x.dtype), vectors.to(x.dtype)


def norm_lower_bound(a: Tensor) -> Tensor:
    """Lower bound of the spectral norm of symmetric matrices, within sqrt(2) in practice: (N, n, n) -> (N, 1, 1).

    One and a half power iterations from the longest row. Squares of the entries must neither overflow nor vanish.
    """
    longest = torch.linalg.vector_norm(a, dim=-1).argmax(-1).view(-1, 1, 1)
    tiny = torch.finfo(a.dtype).tiny
    row = a.take_along_dim(longest, 1) @ a  # (N, 1, n)
    row = row / (torch.linalg.vector_norm(row, dim=-1, keepdim=True) + tiny)
    return torch.linalg.vector_norm(row @ a, dim=-1, keepdim=True) + tiny


def norm_lower_bound_of_gram(u: Tensor) -> Tensor:
    """`norm_lower_bound(u u^T)` without that product: (N, n, k) -> (N, 1, 1)."""
    lengths = ((u @ (u.mT @ u)) * u).sum(-1)  # squared, of the rows of u u^T
    tiny = torch.finfo(u.dtype).tiny
    row = u.take_along_dim(lengths.argmax(-1).view(-1, 1, 1), 1) @ u.mT  # (N, 1, n)
    row = (row @ u) @ u.mT
    row = row / (torch.linalg.vector_norm(row, dim=-1, keepdim=True) + tiny)
    return torch.linalg.vector_norm((row @ u) @ u.mT, dim=-1, keepdim=True) + tiny
