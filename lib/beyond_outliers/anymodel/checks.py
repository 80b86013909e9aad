"""What a pass of a model that is not ours must be: a function of its input, with nothing kept for the next pass."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from beyond_outliers.passes import as_real, floats

_CACHES = ("past_key_values", "past_key_value", "cache_params", "mems", "use_cache")


def check_batch(batch: Mapping):
    """ValueError for a batch that brings or asks for a cache: every pass would add to it."""
    given = [key for key in _CACHES if batch.get(key) is not None and batch.get(key) is not False]
    if given:
        raise ValueError(
            f"the batch has {', '.join(given)}: each of several passes over it would add to the cache; "
            "valid: a batch without"
        )


# ---------------------------------------------------------------------------------------------------- random numbers


class _Draws(TorchDispatchMode):
    """Names the modules in which random numbers are drawn, with the operators that do it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.open: list[str] = []
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in function.tags:
            module = self.open[-1] if self.open else ""
            self.found[f"{module or '(model)'} ({function.overloadpacket.__name__})"] = None
        return function(*args, **(kwargs or {}))

    def run(self, call: Callable) -> object:
        def enter(module, args):
            self.open.append(self.names[module])

        def leave(module, args, output):
            self.open.pop()

        handles = [module.register_forward_pre_hook(enter) for module in self.names]
        handles += [module.register_forward_hook(leave) for module in self.names]
        try:
            with self:
                return call()
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    kept = [(module, kind, vars(module)[kind]) for module in model.modules() for kind in kinds]
    try:
        for module, kind, _ in kept:
            vars(module)[kind] = OrderedDict()
        yield
    finally:
        for module, kind, hooks in kept:
            vars(module)[kind] = hooks


def check_draws(model: nn.Module, call: Callable):
    """ValueError naming the modules at fault if `call()`, which moved torch's generators, answers by random numbers.

    The pass is repeated twice: numbers that are drawn and not used do no harm.
    """
    draws = _Draws(model)
    with _without_hooks(model):  # what counts or records passes must not see these two
        first, again = floats(call()), floats(draws.run(call))
    if len(first) != len(again) or not all(map(_near, first, again)):
        where = ", ".join(draws.found) or "not seen where"
        raise ValueError(
            f"{type(model).__name__} answers by random numbers in evaluation mode, drawn in {where}; valid: dropout as "
            "nn.Dropout, or F.dropout(x, p, training=self.training)"
        )


def _near(x: Tensor, y: Tensor) -> bool:
    """Equal but for what the order of a sum changes (a watched pass may take other kernels)."""
    if x.shape != y.shape:
        return False
    x, y = as_real(x), as_real(y)
    largest = x.abs().nan_to_num(posinf=0.0).amax().item() if x.numel() else 0.0
    return torch.allclose(x, y, rtol=1e-3, atol=1e-3 * largest, equal_nan=True)
