"""Shampoo: Kronecker-factored preconditioning with inverse roots, its step length grafted from Adam.

Sources: Gupta et al. (arXiv 1802.09568); Shi et al., "A Distributed Data-Parallel PyTorch Implementation of the
Distributed Shampoo Optimizer" (arXiv 2309.06497) and its repository, in the setting of arXiv 2509.23500. Step t from
1, gradient G (rows x cols), hats for bias-corrected EMAs (divided by 1 - beta^t):

    M <- b1 M + (1 - b1) G          V <- b2 V + (1 - b2) G^2
    L <- b2 L + (1 - b2) G G^T      R <- b2 R + (1 - b2) G^T G
    when t is a multiple of `frequency`:  P_L = (L_hat + eps I)^(-1/4),  P_R = (R_hat + eps I)^(-1/4)   by eigh
    A = M_hat / (sqrt(V_hat) + eps)                              the grafted method's step, Adam
    D = A before the first refresh, then  P_L M_hat P_R ||A|| / ||P_L M_hat P_R||     with the roots last computed
    W <- W - lr (D + wd W)                                       decay after grafting

Vectors have one factor, and its inverse square root. Matrices stay two-dimensional (the reference may merge small
dimensions). A dimension above `max_block_size` is cut: every block has factors, roots and grafting of its own, as in
the reference. A negative eigenvalue, which only rounding produces, shifts the spectrum up before eps is added.

The paper's configuration: betas (0.95, 0.95), eps 1e-10, frequency 20, blocks up to 12,288. The reference defaults to
betas (0.9, 1.0), eps 1e-12, blocks of 1024, no grafting, and takes separate beta2 and eps for the grafted method.
"""

from typing import ClassVar

import torch
from torch import Tensor

from beyond_outliers.optimizers.groups import ABOVE_0, ROLES
from beyond_outliers.optimizers.linalg import add_gram_, eigh, gram
from beyond_outliers.optimizers.stacking import Stack, StackedOptimizer


class Shampoo(StackedOptimizer):
    """Distributed Shampoo with Adam grafting on one device.

    Arguments: `params`, `lr`, `betas` (b1, b2), `eps` (both places above), `frequency` (steps between refreshes),
    `max_block_size` (longer sides are cut), `weight_decay` (decoupled; matrices and embeddings). ValueError for values
    out of range.

    The default, 12,288, is the paper's: at 32,000 words the vocabulary side of the embedding is three blocks. A study
    of 1,024 words has the same blocks with 384 (tests/optimizers/test_sides.py).
    """

    kinds: ClassVar = {"eps": ABOVE_0}
    squared = ROLES

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-10,
        frequency: int = 20,
        max_block_size: int = 12_288,
    ):
        super().__init__(params, locals())

    def init_state(self, group: dict, parameter: Tensor) -> dict[str, Tensor]:
        state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        for b, (row_slice, col_slice) in enumerate(blocks(parameter.shape, group["max_block_size"])):
            sides = {"left": row_slice, "right": col_slice} if parameter.ndim == 2 else {"left": row_slice}
            for side, extent in sides.items():
                size = extent.stop - extent.start
                state[f"{side}{b}"] = parameter.new_zeros(size, size)
                state[f"{side}_root{b}"] = parameter.new_zeros(size, size)
        return state

    def update(self, group: dict, stack: Stack) -> None:
        step = stack.advance()
        (beta1, beta2), state = group["betas"], stack.state
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        gradient = stack.gradient()
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        momentum = state["exp_avg"] / correction1
        adam = momentum / (state["exp_avg_sq"] / correction2).sqrt_().add_(group["eps"])

        as_matrix = (len(stack), *matrix_shape(stack.shape))
        gradient, momentum, adam = gradient.view(as_matrix), momentum.view(as_matrix), adam.view(as_matrix)
        order = len(stack.shape) or 1
        for b, (rows, cols) in enumerate(blocks(stack.shape, group["max_block_size"])):
            g, target = gradient[:, rows, cols], adam[:, rows, cols]
            direction = momentum[:, rows, cols]
            for side in ("left", "right")[:order]:
                factor, root = state[f"{side}{b}"], state[f"{side}_root{b}"]
                x = g if side == "left" else g.mT
                add_gram_(factor, x, beta=beta2, alpha=1 - beta2)
                if step % group["frequency"] == 0:
                    inverse_root(factor, correction2, 2 * order, group["eps"], out=root)
                if step >= group["frequency"]:
                    direction = root @ direction if side == "left" else direction @ root
            if step >= group["frequency"]:
                length = torch.linalg.vector_norm(target, dim=(1, 2), keepdim=True)
                direction_length = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)
                # `adam` becomes the update: its block is replaced by the grafted direction.
                target.copy_(direction * (length / (direction_length + 1e-16)))
        stack.decay(group["lr"], group["weight_decay"])
        stack.descend(adam.view(-1, *stack.shape), group["lr"])


def inverse_root(factor: Tensor, correction: float, root: int, eps: float, out: Tensor) -> None:
    """out <- (factor / correction + eps I)^(-1/root) for symmetric positive semi-definite matrices (N, n, n)."""
    count = len(factor) if factor.is_cuda else 1  # LAPACK gains nothing by batching
    for one, result in zip(factor.split(count), out.split(count), strict=True):
        values, vectors = eigh(one / correction)
        values = values - values.amin(-1, keepdim=True).clamp(max=0) + eps
        result.copy_(gram(vectors * values.pow(-0.5 / root).unsqueeze(-2)))


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """(rows, cols) as which a parameter is preconditioned: a vector is one column."""
    return (shape[0], shape[1]) if len(shape) == 2 else (shape.numel(), 1)


def blocks(shape: torch.Size, size: int) -> list[tuple[slice, slice]]:
    """Row and column slices that tile a matrix with blocks of at most size x size, row by row."""
    rows, cols = matrix_shape(shape)
    return [
        (slice(r, min(r + size, rows)), slice(c, min(c + size, cols)))
        for r in range(0, rows, size)
        for c in range(0, cols, size)
    ]
