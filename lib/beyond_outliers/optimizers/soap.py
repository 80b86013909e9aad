"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's factors.

Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam" (arXiv 2409.11321) and the authors' soap.py.
Gradient G (rows x cols). The FIRST call only sets L = (1 - b) G G^T, R = (1 - b) G^T G and the bases Q_L, Q_R (eigh,
eigenvalues descending): no update, no decay. Call s + 1, s from 1:

    H = Q_L^T G Q_R
    M <- b1 M + (1 - b1) H          V <- b2 V + (1 - b2) H^2             both live in the rotated basis
    W <- W - lr sqrt(1 - b2^s) / (1 - b1^s) Q_L (M / (sqrt(V) + eps)) Q_R^T     eps beside the uncorrected sqrt(V)
    W <- (1 - lr wd) W                                                   after the update
    L <- b L + (1 - b) G G^T        R <- b R + (1 - b) G^T G             after the step; b = b2 unless `shampoo_beta`
    when s is a multiple of `frequency`:  columns of Q, and V, sorted by diag(Q^T L Q) descending, then
        Q <- QR-orthonormalised L Q, and M carried over to the new basis

Vectors, and dimensions above `max_preconditioned_size`, keep the identity: plain Adam there (the first call is skipped
for them too, as in the reference). The paper's configuration is the reference's default, frequency 10 and bias
correction, but for the weight decay (0.01 in the reference).
"""

import torch
from torch import Tensor

from beyond_outliers.optimizers.groups import ROLES
from beyond_outliers.optimizers.linalg import add_gram_, eigh, orthonormal
from beyond_outliers.optimizers.stacking import Stack, StackedOptimizer


class SOAP(StackedOptimizer):
    """SOAP.

    Arguments: `params`, `lr`, `betas` (b1, b2), `shampoo_beta` (b above; None: b2), `eps`, `frequency` (steps between
    basis updates), `max_preconditioned_size` (longer sides are left alone), `weight_decay` (decoupled; matrices and
    embeddings). ValueError for values out of range.

    The default, 10,000, is the paper's: at 32,000 words the vocabulary side of the embedding is left alone. A study of
    1,024 words has the same sides with 512 (tests/optimizers/test_sides.py).
    """

    squared = ROLES

    def __init__(
        self,
        params,
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        frequency: int = 10,
        max_preconditioned_size: int = 10_000,
    ):
        super().__init__(params, locals())

    def init_state(self, group: dict, parameter: Tensor) -> dict[str, Tensor]:
        state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        if parameter.ndim == 2:
            for side, size in zip(("left", "right"), parameter.shape, strict=True):
                if size <= group["max_preconditioned_size"]:
                    state[side] = parameter.new_zeros(size, size)
                    state[f"{side}_basis"] = parameter.new_zeros(size, size)
        return state

    def update(self, group: dict, stack: Stack) -> None:
        step = stack.advance() - 1  # the first call does not count
        beta1, beta2 = group["betas"]
        gradient, state = stack.gradient(), stack.state
        if step > 0:
            rotated = rotate(gradient, state)
            state["exp_avg"].lerp_(rotated, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
            update = rotate(state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"]), state, back=True)
            stack.descend(update, group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step))
            stack.decay(group["lr"], group["weight_decay"])

        beta = beta2 if group["shampoo_beta"] is None else group["shampoo_beta"]
        for side in ("left", "right"):
            if side in state:
                x = gradient if side == "left" else gradient.mT
                add_gram_(state[side], x, beta=beta, alpha=1 - beta)
                if step == 0:
                    state[f"{side}_basis"].copy_(eigh(state[side])[1].flip(-1))
        if step > 0 and step % group["frequency"] == 0:
            self.turn_bases(state)

    def turn_bases(self, state: dict[str, Tensor]) -> None:
        """One power iteration and QR per factor; V follows the sorting, M goes back and forth."""
        state["exp_avg"].copy_(rotate(state["exp_avg"], state, back=True))
        for axis, side in enumerate(("left", "right")):
            if side not in state:
                continue
            # One matrix at a time: LAPACK gains nothing by batching, and large temporaries cost page faults.
            for factor, basis, square in zip(state[side], state[f"{side}_basis"], state["exp_avg_sq"], strict=True):
                power = factor @ basis
                order = (basis * power).sum(0).argsort(descending=True, stable=True)
                basis.copy_(orthonormal(power[:, order]))
                square.copy_(square.index_select(axis, order))
        state["exp_avg"].copy_(rotate(state["exp_avg"], state))


def rotate(x: Tensor, state: dict[str, Tensor], back: bool = False) -> Tensor:
    """Q_L^T x Q_R, or `back` Q_L x Q_R^T, an absent basis being the identity.

    x: (N, rows, cols), or (N, n) without bases.
    """
    if "left" in state:
        x = (state["left_basis"] if back else state["left_basis"].mT) @ x
    if "right" in state:
        x = x @ (state["right_basis"].mT if back else state["right_basis"])
    return x
