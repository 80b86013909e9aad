"""The one list of optimizers: what each is called, how figures draw it, and where its class is. No torch here.

A further optimizer of the study is one entry, and the file of its class: scales tune it as soon as they give it
learning rates. One from outside needs no entry: its name is `module:Class`, of an installed package or a file of yours.
"""

import ast
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

from beyond_outliers.config.loading import is_own
from beyond_outliers.config.parsing import choose

if TYPE_CHECKING:
    import torch

# Learning rates of the roles beside the hidden matrices; without them every optimizer keeps its own rule.
ROLE_RATES = {"embedding_lr": "embedding", "vector_lr": "vector"}
FURTHER = {"embedding_decay": "float | None", "centred_embedding": "bool"}  # see `build_optimizer`


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

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """What `build_optimizer` accepts beside lr and weight_decay."""
        return tuple(self.annotations)

    @property
    def annotations(self) -> dict[str, str]:
        """Hyperparameter -> its annotation, as the class writes it ("" where it writes none)."""
        own = _parameters(self.source)
        return own | {rate: "float | None" for rate in ROLE_RATES if rate not in own} | FURTHER


@functools.cache
def _parameters(source: str) -> dict[str, str]:
    """Hyperparameters of a class, read off the text of its `__init__`: importing it would import torch."""
    module, _, name = source.partition(":")
    package, *inside = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"no module {package!r} for the optimizer {source!r}; valid: one that can be imported")
    file = Path(spec.origin).parent.joinpath(*inside).with_suffix(".py") if inside else Path(spec.origin)
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    given = [*method.args.args, *method.args.kwonlyargs]
                    kinds = {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in given}
                    return {n: kind for n, kind in kinds.items() if n not in ("self", "params", "lr", "weight_decay")}
    raise ValueError(f"no class {name!r} with an __init__ of its own in {file.name}, the source of an optimizer")


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
    place = crc32(name.encode())
    colour = OUTSIDE_COLOURS[place % len(OUTSIDE_COLOURS)]
    marker = OUTSIDE_MARKERS[place // len(OUTSIDE_COLOURS) % len(OUTSIDE_MARKERS)]
    return Entry(_labels.get(name, name.partition(":")[2]), name, colour, marker)


def call(name: str, label: str) -> None:
    """Gives an optimizer from outside its label in figures and sentences."""
    _labels[name] = label


def ordered(names: Iterable[str]) -> list[str]:
    """Different names in the order of the registry, those from outside behind, by name."""
    given = set(names)
    return [*(name for name in REGISTRY if name in given), *sorted(given - set(REGISTRY))]


OPTIMIZER_NAMES = tuple(name for name, entry in REGISTRY.items() if entry.subject)
