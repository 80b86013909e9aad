"""What must hold of the four evaluations whatever the model is, so that a wrong table cannot pass as a right one.

A = 0 where no input differs, B = 0 where the function has not changed, and a module gives the same output for the same
input again. R = A + B + C holds for any four tensors, so that it would not notice.
"""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from beyond_outliers.anymodel.linears import is_plain
from beyond_outliers.passes import same_tensors
from beyond_outliers.propagation.norms import dot, pieces


def repeats(module: nn.Module) -> bool:
    """Whether all of `module` is of classes that keep no state between two calls in evaluation mode."""
    return all(map(is_plain, module.modules()))


def unchanged(module: nn.Module, quantized: nn.Module) -> bool:
    """Whether two modules are the same function, as far as classes, tensors, plain attributes and hooks tell."""
    parts, parts_q = list(module.named_modules()), list(quantized.named_modules())
    if [(name, type(part)) for name, part in parts] != [(name, type(part)) for name, part in parts_q]:
        return False
    states = [
        {key: value for key, value in vars(part).items() if key not in ("_modules", "training")}
        for _, part in (*parts, *parts_q)
    ]
    return all(map(_same, states[: len(parts)], states[len(parts) :]))


def _same(a, b) -> bool:
    """Whether two attributes are equal; of what is no tensor, number, text or function the class decides."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return same_tensors([a], [b])
    if isinstance(a, dict):  # attributes, parameters, hooks
        return len(a) == len(b) and all(map(_same, a.values(), b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (bool, int, float, str)):
        return a == b
    return not callable(a) or isinstance(a, nn.Module) or getattr(a, "__qualname__", a) == getattr(b, "__qualname__", b)


def check_repeated(label: str, first: list[Tensor], again: list[Tensor], given: tuple):
    """ValueError naming the module `label` unless an evaluation on equal inputs gave equal outputs."""
    how = "gives another output for the same input when it runs again, by {:.2g} of its squared norm"
    _refuse_difference(label, first, again, given, how, "A, B and C")


def check_unchanged(label: str, ours: list[Tensor], theirs: list[Tensor], given: tuple):
    """ValueError naming the module `label` unless both models' evaluations of an unchanged function agree."""
    how = "is the same in both models, yet its outputs for one input differ by {:.2g} of their squared norm"
    _refuse_difference(label, ours, theirs, given, how, "B")


def _refuse_difference(label: str, first: list[Tensor], again: list[Tensor], given: tuple, how: str, wrong: str):
    """ValueError where they differ; how: in words, with room for by how much; wrong: the terms that would be."""
    if difference := _difference(first, again):
        kinds = {
            type(x).__name__ for x in tree_leaves(given) if not type(x).__module__.startswith(("torch", "builtins"))
        }
        cause = "it keeps a state between calls, or draws random numbers (F.dropout without training=self.training)"
        if kinds:
            cause = f"it is given a {', '.join(sorted(kinds))}, which may change (a key/value cache does), or {cause}"
        raise ValueError(
            f"module {label!r} {how.format(difference)}: {cause}. Its {wrong} would be wrong; valid: modules whose "
            "output depends on what they are given alone"
        )


def _difference(first: list[Tensor], again: list[Tensor]) -> float:
    """Squared norm of the difference over that of `first`; 0 where rounding explains it (kernels may sum anew)."""
    if same_tensors(first, again):
        return 0.0
    if [x.shape for x in first] != [x.shape for x in again]:
        return float("inf")
    error = signal = 0.0
    for pair in zip(first, again, strict=True):
        for a, b in pieces(pair, "global"):
            error, signal = error + float(dot(b - a, b - a)), signal + float(dot(a, a))
    if error <= max(1e-8, *(torch.finfo(x.dtype).eps ** 2 for x in first)) * signal:
        return 0.0
    return error / signal if signal else float("inf")
