"""Muon: momentum, orthogonalised by a Newton-Schulz iteration.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024) and its repository.

Hidden matrices W (rows x cols), gradient G, from M = 0:

    M <- beta M + (1 - beta) G                      momentum buffer, beta = 0.95
    U  = (1 - beta) G + beta M                      Nesterov look-ahead
    O  = NS5(U) sqrt(max(1, rows / cols))
    W <- (1 - lr wd) W - lr O                       decoupled decay, before the update

Embeddings and vectors follow AdamW with their own learning rate (3e-3), betas (0.9, 0.95) and eps 1e-6; so the paper.
The reference's repository defaults to 3e-4 and eps 1e-10 there.
"""

import math

import torch
from torch import Tensor

from beyond_outliers.optimizers.groups import KINDS, lay_out, require
from beyond_outliers.optimizers.stacking import Stack, StackedOptimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate orthogonal factor U V^T of every x = U S V^T: (N, rows, cols) -> (N, rows, cols), dtype of x.

    On the wide orientation, after X = x / (||x||_F + 1e-7), `steps` times
        A = X X^T;  X <- a X + (b A + c A^2) X
    which takes the singular values to about [0.7, 1.2], not to 1 (the coefficients trade that for steps).

    `dtype` of the iteration, None: bfloat16 on CUDA as the reference does, otherwise the dtype of x: bfloat16 is 1 %
    off, and on CPUs without instructions for it slower.
    """
    if dtype is None:
        dtype = torch.bfloat16 if x.is_cuda and x.dtype == torch.float32 else x.dtype
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    work = (x.mT if tall else x).to(dtype)
    work = work / (torch.linalg.vector_norm(work, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = torch.bmm(work, work.mT)
        work = torch.baddbmm(work, torch.baddbmm(square, square, square, beta=b, alpha=c), work, beta=a)
    return (work.mT if tall else work).to(x.dtype)


class Muon(StackedOptimizer):
    """Muon for matrices, AdamW for embeddings and vectors.

    Arguments: `params`, `lr` (matrices), `momentum` (beta above), `nesterov`, `ns_steps`, `ns_dtype` (see
    `newton_schulz`), `weight_decay` (decoupled; matrices and embeddings), and
    `adamw_lr`, `adamw_betas`, `adamw_eps` of the roles embedding and vector. ValueError for values out of range.
    """

    squared = ("embedding", "vector")

    def __init__(
        self,
        params,
        lr: float = 2e-2,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        adamw_lr: float = 3e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-6,
    ):
        for name, value in {"lr": adamw_lr, "betas": adamw_betas, "eps": adamw_eps}.items():
            require(KINDS[name], f"adamw_{name}", value)
        defaults: dict = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        defaults |= {"ns_steps": ns_steps, "ns_dtype": ns_dtype, "betas": tuple(adamw_betas), "eps": adamw_eps}
        super().__init__(params, defaults, {role: {"lr": adamw_lr} for role in self.squared})

    def init_state(self, group: dict, parameter: Tensor) -> dict[str, Tensor]:
        if group["role"] == "matrix":
            return {"momentum": torch.zeros_like(parameter)}
        return {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    def update(self, group: dict, stack: Stack) -> None:
        step = stack.advance()
        if group["role"] != "matrix":
            return adamw_step(group, stack, step)
        gradient, momentum = stack.gradient(), stack.state["momentum"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = torch.lerp(gradient, momentum, group["momentum"]) if group["nesterov"] else momentum
        rows, cols = stack.shape
        stack.decay(group["lr"], group["weight_decay"])
        stack.descend(
            newton_schulz(direction, group["ns_steps"], group["ns_dtype"]),
            group["lr"] * math.sqrt(max(1.0, rows / cols)),
        )


def adamw_step(group: dict, stack: Stack, step: int) -> None:
    """torch's fused AdamW on a stack: an inner optimizer whose state are the stack's own exp_avg and exp_avg_sq."""
    inner = stack.derived.get("adamw")
    if inner is None:
        inner = stack.derived["adamw"] = torch.optim.AdamW(stack.params, fused=True)
        for p, entry in zip(stack.params, stack.per_parameter, strict=True):
            count = torch.tensor(float(step - 1), dtype=torch.float32, device=p.device)
            inner.state[p] = {"step": count, "exp_avg": entry["exp_avg"], "exp_avg_sq": entry["exp_avg_sq"]}
    inner.param_groups[0] |= {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    lay_out(stack.params)
    inner.step()
