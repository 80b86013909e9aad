"""AdamW, and SGD with momentum as the study's floor: torch's own, with this package's groups and gradient check.

Sources: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), as `torch.optim.AdamW`
computes it (fused kernel); Sutskever et al. 2013 as `torch.optim.SGD`.
"""

from collections.abc import Callable

import torch

from beyond_outliers.optimizers.groups import KINDS, ROLES, RoleGroups, lay_out, require


class _Checked(RoleGroups):
    def step(self, closure: Callable | None = None):
        """One update. Returns the closure's loss. NonFiniteGradientError before anything is changed."""
        loss = self.evaluated(closure)
        for group in self.param_groups:
            lay_out(group["params"])
        super().step()
        return loss


class AdamW(_Checked, torch.optim.AdamW):
    """p <- p (1 - lr wd);  p <- p - lr m_hat / (sqrt(v_hat) + eps), for every role alike.

    m and v are EMAs (betas) of g and g^2, m_hat and v_hat their bias-corrected values. The betas default to
    (0.9, 0.95), the habit of language-model training; torch's own default is (0.9, 0.999).
    """

    squared = ROLES

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        for name, value in {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}.items():
            require(KINDS[name], name, value)  # before torch, whose words for it are others
        super().__init__(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # a GradScaler then skips an overflow itself, as with all the others

    def state_shapes(self, group: dict, parameter: torch.Tensor) -> dict[str, torch.Size]:
        return {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}


class SGD(_Checked, torch.optim.SGD):
    """b <- momentum b + g + wd p;  p <- p - lr b, for every role alike; the decay is not decoupled, as in torch."""

    def __init__(self, params, lr: float = 1e-2, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=True)

    def state_shapes(self, group: dict, parameter: torch.Tensor) -> dict[str, torch.Size]:
        return {"momentum_buffer": parameter.shape} if group["momentum"] else {}
