"""Scion: steepest descent under a norm chosen per role (a linear minimisation oracle over its ball).

Source: Pethick et al., "Training Deep Learning Models with Norm-Constrained LMOs" (arXiv 2502.07529), and the
authors' repository. Gradient G, from M = 0, for every role:

    M <- (1 - w) M + w G                            w = `momentum` = 0.1; no bias correction, no Nesterov
    W <- W - lr lmo(M)                              unconstrained, the paper's choice here
    W <- (1 - lr) W - lr lmo(M)                     constrained: the weights stay in a ball

    spectral (matrix):    scale NS5(M) sqrt(rows / cols)        may shrink: not max(1, .) as in Muon
    sign (embedding):     sign(M) / cols                        `embedding_lmo="sign"`, the paper's choice here
    column (embedding):   every token's row of M over its RMS   `embedding_lmo="column"`
    sign (vector):        sign(M)

Embeddings and vectors move by learning rates of their own. The reference's class takes one norm for all it is given
and re-initialises weights on request; its defaults are `momentum` 1 (none) and constrained.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from beyond_outliers.optimizers.groups import TO_1, ZERO_OR_MORE, require
from beyond_outliers.optimizers.muon import newton_schulz
from beyond_outliers.optimizers.stacking import Stack, StackedOptimizer


class Scion(StackedOptimizer):
    """Scion with a spectral step for matrices and sign steps elsewhere.

    Arguments: `params`, `lr` (matrices), `embedding_lr`, `vector_lr`, `momentum` (w above), `scale` (radius of the
    spectral ball), `embedding_lmo` ("sign" or "column"), `constrained`, `weight_decay` (decoupled, for the
    unconstrained form, matrices and embeddings), `ns_steps` and `ns_dtype` (see `newton_schulz`).
    ValueError for values out of range, and for weight decay with `constrained`, which is a decay of 1 already.
    """

    kinds: ClassVar = {"momentum": TO_1}

    def __init__(
        self,
        params,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        momentum: float = 0.1,
        scale: float = 1.0,
        embedding_lr: float = 0.2,
        embedding_lmo: str = "sign",
        vector_lr: float = 3e-3,
        constrained: bool = False,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
    ):
        require(ZERO_OR_MORE, "embedding_lr", embedding_lr)
        require(ZERO_OR_MORE, "vector_lr", vector_lr)
        role_rates = {"embedding": {"lr": embedding_lr}, "vector": {"lr": vector_lr}}
        super().__init__(params, locals(), role_rates, ("embedding_lr", "vector_lr", "role_rates"))

    def check(self, group: dict) -> None:
        super().check(group)
        if group["constrained"] and group["weight_decay"]:
            raise ValueError(f"weight_decay must be 0 when constrained, not {group['weight_decay']!r}")

    def init_state(self, group: dict, parameter: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(parameter)}

    def update(self, group: dict, stack: Stack) -> None:
        stack.advance()
        momentum = stack.state["momentum"]
        momentum.lerp_(stack.gradient(), group["momentum"])
        stack.decay(group["lr"], 1.0 if group["constrained"] else group["weight_decay"])
        if group["role"] == "matrix":
            rows, cols = momentum.shape[-2:]
            update = newton_schulz(momentum, group["ns_steps"], group["ns_dtype"])
            stack.descend(update, group["lr"] * group["scale"] * math.sqrt(rows / cols))
        elif group["role"] == "vector":
            stack.descend(momentum.sign(), group["lr"])
        elif group["embedding_lmo"] == "sign":
            stack.descend(momentum.sign(), group["lr"] / momentum.shape[-1])
        else:
            rms = momentum.square().mean(-1, keepdim=True).sqrt()
            stack.descend(momentum / (rms + 1e-8), group["lr"])
