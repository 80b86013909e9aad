"""What must hold of the four evaluations whatever the model is, so that a wrong table cannot pass as a right one.

A = 0 where no input differs, B = 0 where the function has not changed, and a module gives the same output for the same
input again. R = A + B + C holds for any four tensors, so that it would not notice.
"""

import torch
from torch import Tensor, nn

from beyond_outliers.passes import same_tensors
from beyond_outliers.propagation.norms import dot, pieces

_KNOWN = ("torch.nn.", "beyond_outliers.")  # modules of these keep no state between two calls in evaluation mode


def repeats(module: nn.Module) -> bool:
    """Whether all of `module` is of classes that are known to give the same output again."""
    return all(type(part).__module__.startswith(_KNOWN) for part in module.modules())


def unchanged(module: nn.Module, quantized: nn.Module) -> bool:
    """Whether two modules are the same function, as far as classes, tensors, plain attributes and hooks tell."""
    pairs = list(module.named_modules()), list(quantized.named_modules())
    if [(name, type(part)) for name, part in pairs[0]] != [(name, type(part)) for name, part in pairs[1]]:
        return False
    if not all(_same_attributes(one, other) for (_, one), (_, other) in zip(*pairs, strict=True)):
        return False
    states = ([*part.parameters(), *part.buffers()] for part in (module, quantized))
    return same_tensors(*states)


def _same_attributes(one: nn.Module, other: nn.Module) -> bool:
    """Plain values equal, and equally many hooks; what else is there is taken for equal if its class is."""
    a, b = vars(one), vars(other)
    if a.keys() != b.keys():
        return False
    return all(_same_value(a[key], b[key], "hooks" in key) for key in a if key not in ("_modules", "training"))


def _same_value(a, b, hooks: bool) -> bool:
    if hooks and hasattr(a, "__len__"):
        return len(a) == len(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return same_tensors([a], [b])
    if isinstance(a, (bool, int, float, str, type(None))):
        return a == b
    if isinstance(a, (list, tuple)) and all(isinstance(x, (bool, int, float, str)) for x in (*a, *b)):
        return a == b
    return not callable(a) or isinstance(a, nn.Module) or getattr(a, "__qualname__", a) == getattr(b, "__qualname__", b)


def check_repeated(label: str, first: list[Tensor], again: list[Tensor], given: tuple):
    """ValueError naming the module `label` unless an evaluation on equal inputs gave equal outputs."""
    said = "gives another output for the same input when it runs again, by {:.2g} of its squared norm"
    _refuse_difference(label, first, again, given, said, "A, B and C")


def check_unchanged(label: str, ours: list[Tensor], theirs: list[Tensor], given: tuple):
    """ValueError naming the module `label` unless both models' evaluations of an unchanged function agree."""
    said = "is the same in both models, yet its outputs for one input differ by {:.2g} of their squared norm"
    _refuse_difference(label, ours, theirs, given, said, "B")


def _refuse_difference(label: str, first: list[Tensor], again: list[Tensor], given: tuple, said: str, wrong: str):
    """ValueError where they differ; `said`: how, with room for by how much, `wrong`: the terms that would be."""
    if off := _difference(first, again):
        raise ValueError(
            f"module {label!r} {said.format(off)}: {_cause(given)}. Its {wrong} would be wrong; valid: modules whose "
            "output depends on what they are given alone"
        )


def _difference(first: list[Tensor], again: list[Tensor]) -> float:
    """Squared norm of the difference over that of `first`; 0 where rounding explains it (kernels may sum anew)."""
    if same_tensors(first, again):
        return 0.0
    if [x.shape for x in first] != [x.shape for x in again]:
        return float("inf")
    error = signal = 0.0
    worst = 1e-8
    for x, y in zip(first, again, strict=True):
        for a, b in pieces((x, y), "global"):
            error, signal = error + float(dot(b - a, b - a)), signal + float(dot(a, a))
        worst = max(worst, torch.finfo(x.dtype).eps ** 2)
    if error <= worst * signal:
        return 0.0
    return error / signal if signal else float("inf")


def _cause(given: tuple) -> str:
    """The likely cause, by what the module is given beside tensors."""
    kinds = sorted({type(value).__name__ for value in _objects(given)})
    if any("cache" in kind.lower() for kind in kinds):
        return f"its {', '.join(kinds)} is appended to by every evaluation (a key/value cache: switch use_cache off)"
    held = f"it is given a {', '.join(kinds)}, which may change, or " if kinds else ""
    return held + "it keeps a state between calls, or draws random numbers (F.dropout without training=self.training)"


def _objects(value):
    """Objects other than tensors, numbers and text in nested tuples, lists and mappings."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _objects(item)
    elif isinstance(value, dict):
        yield from _objects(list(value.values()))
    elif not isinstance(value, (Tensor, bool, int, float, str, type(None))) and type(value).__module__ != "torch":
        yield value
