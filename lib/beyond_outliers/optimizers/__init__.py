"""The study's optimizers, one file each, built by name over parameter groups that know their role.

`build_optimizer(model, "muon", lr=1e-2)` sorts a model's parameters into hidden matrices, embeddings and vectors.
"""

from beyond_outliers.optimizers.adamw import SGD, AdamW
from beyond_outliers.optimizers.groups import NonFiniteGradientError, parameter_groups
from beyond_outliers.optimizers.muon import Muon
from beyond_outliers.optimizers.outside import Outside
from beyond_outliers.optimizers.psgd import PSGD
from beyond_outliers.optimizers.registry import OPTIMIZERS, REGISTRY, Entry, build_optimizer
from beyond_outliers.optimizers.scion import Scion
from beyond_outliers.optimizers.shampoo import Shampoo
from beyond_outliers.optimizers.soap import SOAP

__all__ = [
    "OPTIMIZERS",
    "PSGD",
    "REGISTRY",
    "SGD",
    "SOAP",
    "AdamW",
    "Entry",
    "Muon",
    "NonFiniteGradientError",
    "Outside",
    "Scion",
    "Shampoo",
    "build_optimizer",
    "parameter_groups",
]
