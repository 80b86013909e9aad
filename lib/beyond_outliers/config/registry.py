"""The one list of optimizers: what each is called, how figures draw it, and where its class is. No torch here.

A further optimizer of the study is one entry, and the file of its class: scales tune it as soon as they give it
learning rates. One from outside needs no entry: its name is `module:Class`, of an installed package or a file of yours.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

from beyond_outliers.config.loading import is_own
from beyond_outliers.config.parsing import choose

if TYPE_CHECKING:
    import torch

# What the roles beside the hidden matrices may have of their own: hyperparameter -> role, and setting of its group.
# Without a learning rate every optimizer keeps its own rule.
ROLE_RATES = {
    "embedding_lr": ("embedding", "lr"),
    "vector_lr": ("vector", "lr"),
    "embedding_decay": ("embedding", "weight_decay"),
}


@dataclass(frozen=True)
class Entry:
    """An optimizer of the registry. `source` is "module:Class"; `subject` is False for what no study compares."""

    label: str  # its name in figures
    source: str
    colour: str
    marker: str
    subject: bool = True

    @property
    def optimizer(self) -> "Callable[..., torch.optim.Optimizer]":
        """The class itself; imports its module, and torch with it."""
        module, _, name = self.source.partition(":")
        return getattr(importlib.import_module(module), name)


# The six in the paper's order. Okabe-Ito colours: told apart with any colour vision, one an optimizer in every figure.
REGISTRY: dict[str, Entry] = {
    "adamw": Entry("AdamW", "beyond_outliers.optimizers.adamw:AdamW", "#000000", "o"),
    "muon": Entry("Muon", "beyond_outliers.optimizers.muon:Muon", "#D55E00", "s"),
    "psgd": Entry("PSGD", "beyond_outliers.optimizers.psgd:PSGD", "#CC79A7", "D"),
    "scion": Entry("Scion", "beyond_outliers.optimizers.scion:Scion", "#E69F00", "^"),
    "shampoo": Entry("Shampoo", "beyond_outliers.optimizers.shampoo:Shampoo", "#0072B2", "v"),
    "soap": Entry("SOAP", "beyond_outliers.optimizers.soap:SOAP", "#009E73", "P"),
    "sgd": Entry("SGD", "beyond_outliers.optimizers.adamw:SGD", "#56B4E9", "X", subject=False),  # the study's floor
}
OPTIMIZER_NAMES = tuple(name for name, entry in REGISTRY.items() if entry.subject)
# for optimizers from outside, told apart from the study's by a marker of their own
OUTSIDE_COLOURS = ("#882255", "#332288", "#999933", "#666666", "#8B4513", "#661100")
OUTSIDE_MARKERS = ("*", "h", "<", ">", "p", "d")
_labels: dict[str, str] = {}  # what scale files call optimizers from outside


def entry(name: str) -> Entry:
    """The optimizer of that name, or of that `module:Class`; ValueError for neither, naming the valid ones."""
    if name in REGISTRY:
        return REGISTRY[name]
    if not is_own(name):
        choose("optimizer", name, [*REGISTRY, "module:Class of your own"])
    row, column = divmod(crc32(name.encode()), len(OUTSIDE_COLOURS))
    marker = OUTSIDE_MARKERS[row % len(OUTSIDE_MARKERS)]
    return Entry(_labels.get(name, name.partition(":")[2]), name, OUTSIDE_COLOURS[column], marker)


def call(name: str, label: str) -> None:
    """Gives an optimizer from outside its label in figures and sentences."""
    _labels[name] = label


def ordered(names: Iterable[str]) -> list[str]:
    """Different names in the order of the registry, those from outside behind, by name."""
    places = list(REGISTRY)
    return sorted(set(names), key=lambda name: (places.index(name) if name in REGISTRY else len(places), name))
