"""What must hold of the four evaluations whatever the model is, so that a wrong table cannot pass as a right one.

A = 0 where no input differs, B = 0 where the function has not changed, and a module gives the same output for the same
input again. R = A + B + C holds for any four tensors, so that it would not notice.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from beyond_outliers.passes import same_tensors
from beyond_outliers.propagation.norms import dot, pieces


def unchanged(module: nn.Module, quantized: nn.Module) -> bool:
    """Whether two modules are the same function, as far as classes, tensors, plain attributes and hooks tell."""
    parts, parts_q = (
        {
            name: (type(part), {key: value for key, value in vars(part).items() if key not in ("_modules", "training")})
            for name, part in one.named_modules()
        }
        for one in (module, quantized)
    )
    leaves, leaves_q = tree_leaves(parts), tree_leaves(parts_q)
    return parts.keys() == parts_q.keys() and len(leaves) == len(leaves_q) and all(map(_same, leaves, leaves_q))


def _same(a: Any, b: Any) -> bool:
    """Whether two attributes are equal; of what is no tensor, number, text or function the class decides."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return same_tensors([a], [b])
    if isinstance(a, (bool, int, float, str, type)):
        return a == b
    return not callable(a) or isinstance(a, nn.Module) or getattr(a, "__qualname__", a) == getattr(b, "__qualname__", b)


# what a module does that it should not, with room for by how much, and the terms that would be wrong
REPEATED = ("gives another output for the same input when it runs again, by {:.2g} of its squared norm", "A, B and C")
UNCHANGED = ("is the same in both models, yet its outputs for one input differ by {:.2g} of their squared norm", "B")


def check_equal(label: str, outputs: tuple[list[Tensor], list[Tensor]], given: tuple, what: tuple[str, str]):
    """ValueError naming the module `label` where two outputs for `given` differ; what: REPEATED or UNCHANGED."""
    if size := difference(*outputs):
        kinds = {
            type(x).__name__ for x in tree_leaves(given) if not type(x).__module__.startswith(("torch", "builtins"))
        }
        cause = "it keeps a state between calls, or draws random numbers (F.dropout without training=self.training)"
        if kinds:
            cause = f"it is given a {', '.join(sorted(kinds))}, which may change (a key/value cache does), or {cause}"
        how, wrong = what
        raise ValueError(
            f"module {label!r} {how.format(size)}: {cause}. Its {wrong} would be wrong; valid: modules whose "
            "output depends on what they are given alone"
        )


def difference(first: list[Tensor], again: list[Tensor]) -> float:
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
