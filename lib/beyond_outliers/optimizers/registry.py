"""The optimizers by name, and `build_optimizer`, which makes one for a model; `config/registry.py` lists them."""

import inspect

import torch
from torch import nn

from beyond_outliers.config.registry import OPTIMIZER_NAMES, REGISTRY, ROLE_RATES, Entry, entry
from beyond_outliers.optimizers.groups import ZERO_OR_MORE, parameter_groups, require
from beyond_outliers.optimizers.outside import Outside, check_hyperparameters

__all__ = ["OPTIMIZERS", "REGISTRY", "Entry", "build_optimizer"]

OPTIMIZERS = {name: REGISTRY[name] for name in OPTIMIZER_NAMES}  # in the paper's order, without the study's floor


def build_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float = 0.0, **hyper
) -> torch.optim.Optimizer:
    """Optimizer `name` of the registry, or `module:Class` from outside, over `model`'s parameters, grouped by role.

    Every group carries `role` and `lr`, which a schedule may change. `weight_decay` reaches matrices and embeddings.
    `embedding_lr` and `vector_lr` give those roles rates of their own, whatever the optimizer, `embedding_decay` gives
    embeddings a weight decay of theirs, and `centred_embedding` takes the mean row out of them after every step.
    ValueError for an unknown name or hyperparameter, listing the valid ones.
    """
    one = entry(name)
    if name in REGISTRY:
        taken = inspect.signature(one.optimizer).parameters
        check_hyperparameters(one.label, taken, hyper, [*ROLE_RATES, "centred_embedding"])
    groups = parameter_groups(model)
    for key, (role, setting) in ROLE_RATES.items():
        if hyper.get(key) is not None:
            require(ZERO_OR_MORE, key, hyper[key])
            own = hyper.pop(key)
            groups = [{**group, setting: own} if group["role"] == role else group for group in groups]
    centred = hyper.pop("centred_embedding", False)
    tables = [table for group in groups if group["role"] == "embedding" for _, table in group["params"]]
    settings = {"lr": lr, "weight_decay": weight_decay, **hyper}
    optimizer = one.optimizer(groups, **settings) if name in REGISTRY else Outside(groups, name, **settings)

    def centre(*_: object) -> None:
        for table in tables:
            table.data -= table.data.mean(0)  # of all words: the offset that their logits share

    if centred:
        optimizer.register_step_post_hook(centre)
    return optimizer
