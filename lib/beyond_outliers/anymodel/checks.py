"""What a pass of a model that is not ours must be: a function of its input, with nothing kept for the next pass."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from beyond_outliers.anymodel.invariants import difference
from beyond_outliers.modules import hooked, module_names
from beyond_outliers.passes import reals

_CACHES = ("past_key_values", "past_key_value", "cache_params", "mems", "use_cache")


def check_batch(batch: Mapping):
    """ValueError for a batch that brings or asks for a cache: every pass would add to it."""
    given = [key for key in _CACHES if batch.get(key) is not None and batch.get(key) is not False]
    if given:
        raise ValueError(
            f"the batch has {', '.join(given)}: each of several passes over it would add to the cache; "
            "valid: a batch without"
        )


class WatchedPass(TorchDispatchMode):
    """One pass of a model, operator by operator. open: the modules that run, the innermost last."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = module_names(model)
        self.open: list[nn.Module] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.saw(function, function.overloadpacket.__name__, (args, kwargs), output)
        return output

    def saw(self, function: Any, operator: str, given: tuple, output: Any):
        """After every operator. given: its arguments, positional and by keyword."""

    def enter(self, module: nn.Module, args: tuple, kwargs: dict):
        self.open.append(module)

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any):
        self.open.pop()

    def run(self, call: Callable) -> Any:
        """What `call()` returns, a pass of the model."""
        with hooked(self.names, self.enter, self.leave), self:
            return call()


# ---------------------------------------------------------------------------------------------------- random numbers


class _Draws(WatchedPass):
    """Names the modules in which random numbers are drawn, with the operators that do it."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.found: dict[str, None] = {}

    def saw(self, function, operator, given, output):
        if torch.Tag.nondeterministic_seeded in function.tags:
            place = self.names[self.open[-1]] if self.open else ""
            self.found[f"{place or '(model)'} ({operator})"] = None


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
        first, again = reals(call()), reals(draws.run(call))
    if difference(first, again):
        raise ValueError(
            f"{type(model).__name__} answers by random numbers in evaluation mode, drawn in "
            f"{', '.join(draws.found) or 'not seen where'}; valid: dropout as nn.Dropout, or "
            "F.dropout(x, p, training=self.training)"
        )
