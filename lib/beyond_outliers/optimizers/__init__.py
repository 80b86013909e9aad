"""The study's optimizers, one file each, built by name over parameter groups that know their role.

`build_optimizer(model, "muon", lr=1e-2)` sorts a model's parameters into hidden matrices, embeddings and vectors.
"""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    adamw="SGD AdamW",
    groups="NonFiniteGradientError parameter_groups",
    muon="Muon",
    outside="Outside",
    psgd="PSGD",
    registry="OPTIMIZERS REGISTRY Entry build_optimizer",
    scion="Scion",
    shampoo="Shampoo",
    soap="SOAP",
)
