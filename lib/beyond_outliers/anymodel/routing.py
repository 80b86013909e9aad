"""Which rows of activations a model picks by activations: the tokens that a router sends to an expert.

A quantized model may pick others. What an expert then does to them is no counterpart of what it did to the first ones,
even where their number is the same.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from beyond_outliers.modules import forward
from beyond_outliers.passes import floats, same_tensors, tensors

_PICKS = ("index", "index_select", "gather", "masked_select", "take")
_SHAPES = frozenset(
    ["_local_scalar_dense", "sym_size", "sym_numel", "sym_stride", "empty_like", "new_empty", "zeros_like"]
)


class Watch(TorchDispatchMode):
    """Follows one forward pass: activations, integers and booleans computed from them, rows picked by those.

    An activation is whatever descends from an embedding or from a floating-point input of the model; tables and masks
    made from positions alone are none. picked: module -> for each of its calls, the indices by which its inputs were
    picked; calls with none count too, so that the two models' lists correspond.
    """

    def __init__(self, model: nn.Module, batch):
        super().__init__()
        self.model, self.batch = model, batch
        self.names = {module: name for name, module in model.named_modules()}
        self.open: list[tuple[str, int]] = []  # modules that run, with the number of rows that each got
        self.activations, self.choices = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self.origins: Any = WeakIdKeyDictionary()  # picked tensor -> its picks
        self.picked: dict[str, list[list[Tensor]]] = {}
        self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        operator = function.overloadpacket.__name__
        inputs = list(tensors(args, kwargs))
        active = operator == "embedding" or any(x in self.activations for x in inputs)
        if active:
            self.computed(operator)
        chosen = active or any(x in self.choices for x in inputs)
        picks = {pick for x in inputs for pick in self.origins.get(x, ())}
        if operator in _PICKS and active and (index := self._index(operator, args)):
            self.made += 1
            picks |= {_Pick(len(self.open), self.made, tuple(index))}
        if operator.startswith(("index_add", "index_put", "scatter", "index_copy")):  # back into a tensor of all rows
            picks = set(self.origins.get(args[0], ()))
        for x in tensors(output):
            if not x.is_floating_point() and not x.is_complex():
                if chosen and operator not in _SHAPES:
                    self.choices[x] = True
                continue
            if active:
                self.activations[x] = True
            if picks and operator not in _SHAPES:
                self.origins[x] = picks
        return output

    def computed(self, operator: str):
        """Called for every operator that an activation goes into."""

    def _index(self, operator: str, args: tuple) -> list[Tensor]:
        """Those indices of a pick that activations decide and that pick among rows, not within them."""
        if operator in ("gather", "index_select"):
            return [args[2]] if args[1] not in (-1, args[0].ndim - 1) and args[2] in self.choices else []
        given = args[1] if operator == "index" else [args[1]]
        rows = given[: max(1, args[0].ndim - 1)]
        return [x for x in rows if x is not None and x in self.choices]

    def enter(self, module, args, kwargs):
        inputs = list(tensors(args, kwargs))
        name = self.names[module]
        picks = {pick for x in inputs for pick in self.origins.get(x, ())}
        self.picked.setdefault(name, []).append([x for p in sorted(picks, key=_number) for x in p.index])
        self.open.append((name, max((_rows(x) for x in floats(inputs)), default=0)))

    def leave(self, module, args, kwargs, output):
        _, rows = self.open.pop()
        for x in floats(output):
            own = {pick for pick in self.origins.get(x, ()) if pick.depth > len(self.open)}
            if own and _rows(x) == rows:  # as many as went in: put back in their order
                self.origins[x] = self.origins[x] - own

    def run(self):
        """One pass; returns what the model gave."""
        for x in floats(self.batch):
            self.activations[x] = True
        with ExitStack() as stack:
            for module in self.names:
                stack.enter_context(module.register_forward_pre_hook(self.enter, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(self.leave, with_kwargs=True))
            stack.enter_context(self)
            return forward(self.model, self.batch)


@dataclass(frozen=True, eq=False)  # hashable by identity
class _Pick:
    """The `number`-th pick of a pass, made by a module at `depth`, by an index of one or more tensors."""

    depth: int
    number: int
    index: tuple[Tensor, ...]


def _number(pick: _Pick) -> int:
    return pick.number


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel() if x.ndim else 1


def other_tokens(model: nn.Module, quantized: nn.Module, batch, names) -> set[str]:
    """Those of `names`, modules that get picked rows, for which the two models pick other ones from `batch`."""
    if not names:
        return set()
    one, other = (Watch(network, batch) for network in (model, quantized))
    one.run(), other.run()
    return {
        name
        for name in names
        if len(one.picked.get(name, ())) != len(other.picked.get(name, ()))
        or not all(map(same_tensors, one.picked.get(name, ()), other.picked.get(name, ())))
    }
