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

Due: a counter of calls since the last update reaches 1 / p, p = exp(-0.001 (n - 500)) clamped to [0.03, 1]: every
call up to 500, every 34th in the end. The reference draws this at random in its older versions; counting it is
reproducible. Every 100th update the factors of a matrix are balanced to equal largest entries, which leaves their
product as it is (the reference does it with probability 0.01). Vectors, dimensions of size 1 and dimensions above
`max_size_triangular` have diagonal factors (q <- q - 0.1 (t1 - t2) q / max|t1 + t2|, with the diagonals t of the terms
above). All randomness comes from one generator, which the state_dict carries.
"""

import math

import torch
from torch import Tensor

from beyond_outliers.optimizers.groups import require, require_common
from beyond_outliers.optimizers.linalg import add_gram_, strips
from beyond_outliers.optimizers.stacking import Stack, StackedOptimizer

DAMPING = 2.0**-13
BALANCE_EVERY = 100


class PSGD(StackedOptimizer):
    """PSGD Kron.

    Arguments: `params`, `lr`, `momentum`, `preconditioner_lr` (0.1 above), `max_size_triangular`,
    `update_probability` (a constant in place of the schedule, or None), `seed` of the generator, `weight_decay`
    (decoupled; matrices and embeddings). ValueError for values out of range.
    """

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
        require_common(lr, weight_decay)
        require(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        require(0 < preconditioner_lr <= 1, "preconditioner_lr", preconditioner_lr, "in (0, 1]")
        require(max_size_triangular >= 0, "max_size_triangular", max_size_triangular, "at least 0")
        valid = update_probability is None or 0 < update_probability <= 1
        require(valid, "update_probability", update_probability, "None or in (0, 1]")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        defaults |= {"preconditioner_lr": preconditioner_lr, "max_size_triangular": max_size_triangular}
        super().__init__(params, defaults | {"update_probability": update_probability})
        device = next(p.device for group in self.param_groups for p in group["params"])
        self.generator = torch.Generator(device).manual_seed(seed)

    def __getstate__(self) -> dict:  # what copy.deepcopy and pickle see
        return {**super().__getstate__(), "generator": self.generator}

    def state_dict(self) -> dict:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.generator.set_state(state_dict["generator"].cpu())

    def init_state(self, group: dict, parameter: Tensor) -> dict:
        state: dict = {"momentum": torch.zeros_like(parameter), "since_update": 0, "updates": 0}
        for side, size in zip(("left", "right"), parameter.shape or (1,), strict=False):
            triangular = parameter.ndim == 2 and 1 < size <= group["max_size_triangular"]
            state[side] = torch.eye(size) if triangular else torch.ones(size)
            state[side] = state[side].to(parameter)
        return state

    def update(self, group: dict, stack: Stack) -> None:
        step = stack.advance()
        beta, state = group["momentum"], stack.state
        state["momentum"].lerp_(stack.gradient(), 1 - beta)
        shape = state["momentum"].shape
        # A vector is one column whose right factor is absent.
        momentum = (state["momentum"] / (1 - beta**step)).view(shape[0], -1, *shape[2:])
        momentum = momentum if momentum.ndim == 3 else momentum.unsqueeze(-1)

        if self.due(group, stack, step - 1):
            probe = torch.randn(momentum.shape, generator=self.generator, dtype=momentum.dtype, device=momentum.device)
            momentum = momentum + DAMPING * momentum.abs().mean((1, 2), keepdim=True) * probe
            if "right" in state and stack.count("updates") % BALANCE_EVERY == 0:
                balance(state["left"], state["right"])
            update_factors(state, momentum, probe, group["preconditioner_lr"])
            stack.derived.clear()
            direction = precondition(state, momentum)
        else:
            direction = precondition_with_products(state, stack.derived, momentum)

        rms = direction.square().mean((1, 2), keepdim=True).sqrt()
        direction = direction * (1.1 / (rms + 1e-8)).clamp(max=1.0)
        stack.decay(1 - group["lr"] * group["weight_decay"])
        stack.descend(direction.view(shape), group["lr"])

    def due(self, group: dict, stack: Stack, n: int) -> bool:
        """Whether the preconditioner is updated in call n (from 0); counts it."""
        probability = group["update_probability"] or min(1.0, max(0.03, math.exp(-0.001 * (n - 500))))
        waited = stack.count("since_update") + 1
        due = waited >= 1 / probability
        for entry in stack.per_parameter:
            entry["since_update"] = 0 if due else waited
            entry["updates"] += due
        return due


def left_product(q: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """q x or q^T x, with q upper triangular (N, m, m), whose zeros are skipped by strips, or a diagonal (N, m)."""
    if q.ndim == 2:
        return q.unsqueeze(-1) * x
    out = torch.empty_like(x)
    for r in strips(q.shape[1]):
        if transposed:
            torch.bmm(q[:, : r.stop, r].mT, x[:, : r.stop], out=out[:, r])
        else:
            torch.bmm(q[:, r, r.start :], x[:, r.start :], out=out[:, r])
    return out


def right_product(x: Tensor, q: Tensor, transposed: bool = False) -> Tensor:
    """x q or x q^T, as above."""
    if q.ndim == 2:
        return x * q.unsqueeze(-2)
    out = torch.empty_like(x)
    for r in strips(q.shape[1]):
        if transposed:
            torch.bmm(x[:, :, r.start :], q[:, r, r.start :].mT, out=out[:, :, r])
        else:
            torch.bmm(x[:, :, : r.stop], q[:, : r.stop, r], out=out[:, :, r])
    return out


def inverse_left(q: Tensor, x: Tensor) -> Tensor:
    """q^-T x."""
    return torch.linalg.solve_triangular(q.mT, x, upper=False) if q.ndim == 3 else x / q.unsqueeze(-1)


def inverse_right(x: Tensor, q: Tensor) -> Tensor:
    """x q^-1."""
    return torch.linalg.solve_triangular(q, x, upper=True, left=False) if q.ndim == 3 else x / q.unsqueeze(-2)


def precondition(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Q_L^T Q_L x Q_R^T Q_R, (N, m, n) -> (N, m, n)."""
    x = left_product(state["left"], left_product(state["left"], x), transposed=True)
    if "right" in state:
        x = right_product(right_product(x, state["right"], transposed=True), state["right"])
    return x


def precondition_with_products(state: dict[str, Tensor], products: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same with Q^T Q kept in `products`: they stay valid until the next update, dozens of calls in the end."""
    if not products:
        for side in ("left", "right"):
            if side in state:
                q = state[side]
                products[side] = left_product(q, q, transposed=True) if q.ndim == 3 else q.square()
    left, right = products["left"], products.get("right")
    x = left @ x if left.ndim == 3 else left.unsqueeze(-1) * x
    if right is not None:
        x = x @ right if right.ndim == 3 else x * right.unsqueeze(-2)
    return x


def update_factors(state: dict[str, Tensor], gradient: Tensor, probe: Tensor, lr: float) -> None:
    """One step of both factors, in place, from a gradient and a standard normal probe, (N, m, n) each."""
    left, right = state["left"], state.get("right")
    a, b = left_product(left, gradient), inverse_left(left, probe)
    if right is not None:
        a, b = right_product(a, right, transposed=True), inverse_right(b, right)
    for q, x, y in ((left, a, b), (right, a.mT, b.mT)):
        if q is None:
            continue
        if q.ndim == 2:
            term1, term2 = x.square().sum(-1), y.square().sum(-1)
            largest = (term1 + term2).amax(-1, keepdim=True) + torch.finfo(q.dtype).tiny
            q.sub_(lr * (term1 - term2) * q / largest)
            continue
        total = add_gram_(torch.empty_like(q), x, beta=0, alpha=1)
        difference = total.clone()
        add_gram_(total, y, beta=1, alpha=1)
        add_gram_(difference, y, beta=1, alpha=-1)
        difference.triu_().mul_(lr / norm_lower_bound(total))
        for r in strips(q.shape[1]):  # downwards: a strip of the product reads only its own and later rows of q
            q[:, r, r.start :] -= difference[:, r, r.start :] @ q[:, r.start :, r.start :]


def norm_lower_bound(a: Tensor) -> Tensor:
    """Lower bound of the spectral norm of symmetric matrices, within sqrt(2) in practice: (N, n, n) -> (N, 1, 1).

    One and a half power iterations from the longest row; everything over the largest entry against overflow.
    """
    tiny = torch.finfo(a.dtype).tiny
    largest = a.abs().amax((1, 2), keepdim=True) + tiny
    a = a / largest
    longest = a.square().sum(-1).argmax(-1).view(-1, 1, 1)
    row = a.take_along_dim(longest, 1)  # (N, 1, n)
    row = row @ a
    row = row / (torch.linalg.vector_norm(row, dim=-1, keepdim=True) + tiny)
    return torch.linalg.vector_norm(row @ a, dim=-1, keepdim=True) * largest + tiny


def balance(left: Tensor, right: Tensor) -> None:
    """Scale both factors, in place, to equal largest entries; their Kronecker product stays."""
    left_largest, right_largest = left.abs().flatten(1).amax(-1), right.abs().flatten(1).amax(-1)
    ratio = (right_largest / left_largest).sqrt()
    left.mul_(ratio.view(-1, *[1] * (left.ndim - 1)))
    right.div_(ratio.view(-1, *[1] * (right.ndim - 1)))
