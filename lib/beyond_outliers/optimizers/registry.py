"""The optimizers by name, and `build_optimizer`, which makes one for a model."""

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from beyond_outliers.optimizers.adamw import SGD, AdamW
from beyond_outliers.optimizers.groups import parameter_groups, require
from beyond_outliers.optimizers.muon import Muon
from beyond_outliers.optimizers.psgd import PSGD
from beyond_outliers.optimizers.scion import Scion
from beyond_outliers.optimizers.shampoo import Shampoo
from beyond_outliers.optimizers.soap import SOAP


@dataclass(frozen=True)
class Entry:
    """An optimizer of the registry: its class, and its name in figures."""

    label: str
    optimizer: type[torch.optim.Optimizer]

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """What `build_optimizer` accepts beside lr and weight_decay."""
        names = inspect.signature(self.optimizer.__init__).parameters
        own = [name for name in names if name not in ("self", "params", "lr", "weight_decay")]
        return tuple(dict.fromkeys([*own, *ROLE_RATES]))


# Learning rates of the roles beside the hidden matrices; without them every optimizer keeps its own rule.
ROLE_RATES = {"embedding_lr": "embedding", "vector_lr": "vector"}
# In the paper's order.
OPTIMIZERS = {
    "adamw": Entry("AdamW", AdamW),
    "muon": Entry("Muon", Muon),
    "psgd": Entry("PSGD", PSGD),
    "scion": Entry("Scion", Scion),
    "shampoo": Entry("Shampoo", Shampoo),
    "soap": Entry("SOAP", SOAP),
}
REGISTRY = {**OPTIMIZERS, "sgd": Entry("SGD", SGD)}  # the study's floor is not one of its subjects


def build_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float = 0.0, **hyper
) -> torch.optim.Optimizer:
    """Optimizer `name` of the registry over `model`'s parameters, grouped by role.

    Every group carries `role`, `lr` and `initial_lr`; a schedule sets lr = initial_lr * factor. `weight_decay` reaches
    matrices and embeddings. `embedding_lr` and `vector_lr` give those roles rates of their own, whatever the optimizer.
    ValueError for an unknown name or hyperparameter, listing the valid ones.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown optimizer {name!r}: valid names are {', '.join(REGISTRY)}")
    entry = REGISTRY[name]
    unknown = sorted(set(hyper) - set(entry.hyperparameters))
    if unknown:
        raise ValueError(
            f"{entry.label} has no hyperparameter {', '.join(unknown)}: valid ones are "
            f"lr, weight_decay, {', '.join(entry.hyperparameters)}"
        )
    groups = parameter_groups(model)
    for rate, role in ROLE_RATES.items():
        if hyper.get(rate) is not None:
            require(hyper[rate] >= 0, rate, hyper[rate], "at least 0")
            own = hyper.pop(rate)
            groups = [{**group, "lr": own} if group["role"] == role else group for group in groups]
    # torch's base class takes defaults instead; ours all take these two
    return entry.optimizer(groups, lr=lr, weight_decay=weight_decay, **hyper)  # type: ignore[call-arg]
