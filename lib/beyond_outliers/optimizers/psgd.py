"""PSGD with Kronecker-factored triangular preconditioners ("Kron").

Sources: Li, "Preconditioned Stochastic Gradient Descent" (arXiv 1512.04202) and psgd_torch; Walters' kron_torch, whose
conventions are followed. Call n + 1, n from 0, gradient G (rows x cols), factors Q_L, Q_R upper triangular from I:

    M <- 0.9 M + 0.1 G,   M_hat = M / (1 - 0.9^(n+1))
    when the preconditioner is due, with a standard normal probe v:
        G_d = M_hat + 2^-13 mean|M_hat| v                       damping bounds the covariance from below
        A = Q_L G_d Q_R^T,   B = Q_L^-T v Q_R^-1
        Q_L <- Q_L - 0.1 triu(A A^T - B B^T) Q_L / |A A^T + B B^T|      |.| a lower bound of the spectral norm
        Q_R <- Q_R - 0.1 triu(A^T A - B^T B) Q_R / |A^T A + B^T B|
    D = Q_L^T Q_L G_d Q_R^T Q_R                                 M_hat in place of G_d where no probe was drawn
    D <- D min(1, 1.1 / rms(D))
    W <- W - lr (D + wd W)                                      decay after clipping

A gradient of zeros leaves the factors as they are (the reference lets the probe drive them to infinity).

Due: a counter of calls since the last update reaches 1 / p, p = exp(-0.001 (n - 500)) clamped to [0.03, 1]: every
call up to 500, every 34th in the end. The reference draws this at random in its older versions; counting it is
reproducible. Every 100th update the factors of a matrix are balanced to equal largest entries, which leaves their
product as it is (the reference does it with probability 0.01). Vectors, dimensions of size 1 and dimensions above
`max_size_triangular` have diagonal factors (q <- q - 0.1 (t1 - t2) q / max|t1 + t2|, with the diagonals t of the terms
above). All randomness comes from one generator, which the state_dict carries.

Nothing is approximated beyond the formulas: what follows saves work and equals them up to rounding (float64: 1e-10).
A and B are divided by their common largest entry, which both updates are invariant to and which keeps their products
in range. The factor of a side much longer than the other (m > 4 k, an embedding's vocabulary) is updated in
O(m^2 k) rather than O(m^3), without any other m x m matrix: |.| and triu(.) Q come from the m x 2k matrices [A B] and
[A -B]. Where Q^T Q serves enough calls until the next update it is kept, otherwise Q is applied twice.
"""

import math
import warnings
from typing import Annotated

import torch
from torch import Tensor

from beyond_outliers.config.parsing import between
from beyond_outliers.optimizers.groups import require
from beyond_outliers.optimizers.linalg import gram, norm_lower_bound, norm_lower_bound_of_gram
from beyond_outliers.optimizers.stacking import Stack, StackedOptimizer

DAMPING = 2.0**-13
BALANCE_EVERY = 100
LOW_RANK = 4  # sides more than this many times as long as the other are updated through [A B]; measured
BLOCK = 64  # rows of a factor that are updated at once; measured


class PSGD(StackedOptimizer):
    """PSGD Kron.

    Arguments: `params`, `lr`, `momentum`, `preconditioner_lr` (0.1 above), `max_size_triangular` (longer sides keep a
    diagonal), `update_probability` (a constant in place of the schedule, or None), `seed` of the generator,
    `weight_decay` (decoupled; matrices and embeddings). ValueError for values out of range.

    The default, 8,192, is the paper's: at 32,000 words the vocabulary side of the embedding has a diagonal alone. A
    study of 1,024 words has the same sides with 512 (tests/optimizers/test_sides.py).
    """

    travels = ("role_defaults", "generator")

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        preconditioner_lr: float = 0.1,
        max_size_triangular: int = 8192,
        update_probability: float | None = None,
        seed: int = 0,
    ):
        require(Annotated[int, between(0, 2**63)], "seed", seed)
        super().__init__(params, locals(), beside=("seed",))
        device = next(p.device for group in self.param_groups for p in group["params"])
        self.generator = torch.Generator(device).manual_seed(seed)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict) -> None:
        """As its base's. A state without its generator (so torch.distributed.checkpoint) loads with a warning."""
        super().load_state_dict(state_dict)
        if "generator" in state_dict:
            self.generator.set_state(state_dict["generator"].cpu())
        else:
            warnings.warn(
                "this state of PSGD has no 'generator': its probes go on from this optimizer's own, so that the run is "
                "not continued to the same numbers; valid: what state_dict() returned, with all its keys",
                stacklevel=2,
            )

    def init_state(self, group: dict, parameter: Tensor) -> dict:
        state: dict = {"momentum": torch.zeros_like(parameter), "since_update": 0, "updates": 0}
        for side, size in zip(("left", "right"), parameter.shape or (1,), strict=False):
            triangular = parameter.ndim == 2 and 1 < size <= group["max_size_triangular"]
            make = torch.eye if triangular else torch.ones
            state[side] = make(size, dtype=parameter.dtype, device=parameter.device)
        return state

    def update(self, group: dict, stack: Stack) -> None:
        step = stack.advance()
        beta, state = group["momentum"], stack.state
        gradient = stack.gradient()
        state["momentum"].lerp_(gradient, 1 - beta)
        # a gradient of zeros says nothing of the curvature: the probe alone would drive the factors to infinity
        learns = gradient.reshape(len(gradient), -1).any(1)
        shape = state["momentum"].shape
        # A vector is one column whose right factor is absent.
        momentum = (state["momentum"] / (1 - beta**step)).view(shape[0], -1, *shape[2:])
        momentum = momentum if momentum.ndim == 3 else momentum.unsqueeze(-1)

        period = self.period(group, step - 1)
        if self.due(stack, period):
            probe = torch.randn(momentum.shape, generator=self.generator, dtype=momentum.dtype, device=momentum.device)
            momentum.addcmul_(probe, DAMPING * momentum.abs().mean((1, 2), keepdim=True))
            if "right" in state and stack.count("updates") % BALANCE_EVERY == 0:
                balance(state["left"], state["right"])
            update_factors(
                state, momentum, probe, group["preconditioner_lr"] * learns.to(gradient.dtype).view(-1, 1, 1)
            )
            stack.derived.clear()
            direction = precondition(state, momentum)
        else:
            direction = precondition(state, momentum, stack.derived, period)

        rms = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True) / direction[0].numel() ** 0.5
        direction *= (1.1 / (rms + 1e-8)).clamp(max=1.0)
        stack.decay(group["lr"], group["weight_decay"])
        stack.descend(direction.view(shape), group["lr"])

    def skip(self, group: dict, stack: Stack) -> None:
        step = stack.advance()
        if self.due(stack, self.period(group, step - 1)):  # the probe that its owner draws: all draw the same ones
            shape, like = (len(stack), *stack.shape), stack.params[0]
            torch.randn(shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def period(self, group: dict, n: int) -> float:
        """Calls between two updates of the preconditioner, 1 / p, as of call n (from 0)."""
        return 1 / (group["update_probability"] or min(1.0, max(0.03, math.exp(-0.001 * (n - 500)))))

    def due(self, stack: Stack, period: float) -> bool:
        """Whether the preconditioner is updated in this call; counts it."""
        waited = stack.count("since_update") + 1
        due = waited >= period
        stack.put("since_update", 0 if due else waited)
        stack.put("updates", stack.count("updates") + due)
        return due


def apply(q: Tensor, x: Tensor, side: str, transposed: bool = False) -> Tensor:
    """Q x, or x Q^T on the right; `transposed`: Q^T x, or x Q. q (N, m, m), or a diagonal (N, m)."""
    if q.ndim == 2:
        return x * q.unsqueeze(-1 if side == "left" else -2)
    q = q.mT if transposed else q
    return q @ x if side == "left" else x @ q.mT


def solve(q: Tensor, x: Tensor, side: str) -> Tensor:
    """Q^-T x, or x Q^-1 on the right."""
    if q.ndim == 2:
        return x / q.unsqueeze(-1 if side == "left" else -2)
    left = side == "left"
    return torch.linalg.solve_triangular(q.mT if left else q, x, upper=not left, left=left)


def precondition(
    state: dict[str, Tensor], x: Tensor, products: dict[str, Tensor] | None = None, calls: float = 1
) -> Tensor:
    """Q_L^T Q_L x Q_R^T Q_R, (N, m, n) -> (N, m, n).

    A side's Q^T Q is kept in `products`, if given, where it pays: it serves `calls` calls until the next update.
    """
    for side, length, other in (("left", x.shape[1], x.shape[2]), ("right", x.shape[2], x.shape[1])):
        q = state.get(side)
        if q is None:
            continue
        if q.ndim == 3 and products is not None and calls * other >= length:
            if side not in products:
                products[side] = q.mT @ q
            x = apply(products[side], x, side)
        else:
            x = apply(q, apply(q, x, side), side, transposed=True)
    return x


def update_factors(state: dict[str, Tensor], gradient: Tensor, probe: Tensor, lr: float | Tensor) -> None:
    """One step of both factors, in place, from a gradient and a standard normal probe, (N, m, n) each; lr (N, 1, 1)."""
    sides = [side for side in ("left", "right") if side in state]
    a, b = gradient, probe
    for side in sides:
        a, b = apply(state[side], a, side), solve(state[side], b, side)
    largest = torch.maximum(a.abs().amax((1, 2), keepdim=True), b.abs().amax((1, 2), keepdim=True))
    scale = 1 / (largest + torch.finfo(a.dtype).tiny)
    a, b = a * scale, b * scale
    for side in sides:
        q, x, y = state[side], *((a, b) if side == "left" else (a.mT, b.mT))
        if q.ndim == 2:
            update_diagonal_(q, x, y, lr)
        elif x.shape[1] > LOW_RANK * x.shape[2]:
            update_low_rank_(q, x, y, lr)
        else:
            update_dense_(q, x, y, lr)


def update_diagonal_(q: Tensor, x: Tensor, y: Tensor, lr: float | Tensor) -> None:
    """q <- q - lr (t1 - t2) q / max(t1 + t2), t the diagonals of x x^T and y y^T: (N, m) and twice (N, m, k)."""
    term1, term2 = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    largest = (term1 + term2).amax(1, keepdim=True) + torch.finfo(q.dtype).tiny
    q.sub_((lr * (term1 - term2) * q.unsqueeze(-1) / largest).squeeze(-1))


def update_dense_(q: Tensor, x: Tensor, y: Tensor, lr: float | Tensor) -> None:
    """q <- q - lr triu(x x^T - y y^T) q / |x x^T + y y^T|: upper triangular (N, m, m) and twice (N, m, k).

    Entries of x and y are at most of order one (see `norm_lower_bound`).
    """
    term1, term2 = gram(x), gram(y)
    rate = lr / norm_lower_bound(term1 + term2)
    for r in blocks(q.shape[1]):  # downwards: a block of the product reads only its own and later rows of q
        difference = (term1[:, r, r.start :] - term2[:, r, r.start :]).triu_()
        q[:, r, r.start :].addcmul_(torch.bmm(difference, q[:, r.start :, r.start :]), rate, value=-1)


def update_low_rank_(q: Tensor, x: Tensor, y: Tensor, lr: float | Tensor) -> None:
    """The same for k much smaller than m: x x^T + y y^T = u u^T and x x^T - y y^T = u v^T have rank 2k.

    Rows r of triu(u v^T) q are triu(u_r v_r^T) q_r + u_r (sum over the blocks s below r of v_s^T q_s). Going upwards,
    one running sum serves all blocks, and every q_r joins it before it is overwritten.
    """
    u, v = torch.cat((x, y), -1), torch.cat((x, -y), -1)
    rate = lr / norm_lower_bound_of_gram(u)
    below = q.new_zeros(q.shape[0], u.shape[2], q.shape[1])  # (N, 2k, m); columns left of the blocks done are zero
    for r in reversed(blocks(q.shape[1])):
        rows, u_r, v_r = q[:, r, r.start :], u[:, r], v[:, r]
        product = torch.bmm(torch.bmm(u_r, v_r.mT).triu_(), rows)
        product[:, :, r.stop - r.start :].baddbmm_(u_r, below[:, :, r.stop :])
        below[:, :, r.start :].baddbmm_(v_r.mT, rows)
        rows.addcmul_(product, rate, value=-1)


def blocks(n: int) -> list[slice]:
    """Cuts of 0..n for the product of two triangular matrices, which gains more from small ones than thin products."""
    return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


def balance(left: Tensor, right: Tensor) -> None:
    """Scale both factors, in place, to equal largest entries; their Kronecker product stays."""
    left_largest, right_largest = left.abs().flatten(1).amax(-1), right.abs().flatten(1).amax(-1)
    ratio = (right_largest / left_largest).sqrt()
    left.mul_(ratio.view(-1, *[1] * (left.ndim - 1)))
    right.div_(ratio.view(-1, *[1] * (right.ndim - 1)))
