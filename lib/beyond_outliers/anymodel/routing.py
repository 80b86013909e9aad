"""Which rows of activations a model picks by activations: the tokens that a router sends to an expert.

A quantized model may pick others. What an expert then does to them is no counterpart of what it did to the first ones,
even where their number is the same.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from beyond_outliers.anymodel.checks import WatchedPass
from beyond_outliers.modules import forward
from beyond_outliers.passes import floats, same_tensors, tensors

_PICKS = ("index", "index_select", "gather", "masked_select", "take")
_SHAPES = frozenset(
    ["_local_scalar_dense", "sym_size", "sym_numel", "sym_stride", "empty_like", "new_empty", "zeros_like"]
)


class Watch(WatchedPass):
    """Follows one forward pass: activations, integers and booleans computed from them, rows picked by those.

    An activation is whatever descends from an embedding or from a floating-point input of the model; tables and masks
    made from positions alone are none. picked: module -> for each of its calls, the indices by which its inputs were
    picked; calls with none count too, so that the two models' lists correspond. output: what the model gave.
    """

    def __init__(self, model: nn.Module, batch: Any):
        super().__init__(model)
        self.rows: list[int] = []  # that each of the modules that run got
        self.activations, self.choices = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self.origins: Any = WeakIdKeyDictionary()  # picked tensor -> its picks, in order
        self.picked: dict[str, list[list[Tensor]]] = {}
        for x in floats(batch):
            self.activations[x] = True
        self.output = self.run(lambda: forward(model, batch))

    def saw(self, function, operator, given, output):
        args, inputs = given[0], list(tensors(given))
        active = operator == "embedding" or any(x in self.activations for x in inputs)
        if active:
            self.computed(function, operator)
        chosen = active or any(x in self.choices for x in inputs)
        picks = self._picks(inputs)
        if operator in _PICKS and active and (index := self._index(operator, args)):
            picks[_Pick(len(self.open), tuple(index))] = None
        if operator.startswith(("index_add", "index_put", "scatter", "index_copy")):  # back into a tensor of all rows
            picks = self._picks(args[:1])
        if operator in _SHAPES:
            chosen, picks = False, {}
        for x in tensors(output):
            if not x.is_floating_point() and not x.is_complex():
                if chosen:
                    self.choices[x] = True
                continue
            if active:
                self.activations[x] = True
            if picks:
                self.origins[x] = picks

    def computed(self, function: Any, operator: str):
        """Called for every operator that an activation goes into."""

    def _picks(self, inputs) -> "dict[_Pick, None]":
        return {pick: None for x in inputs for pick in self.origins.get(x, ())}

    def _index(self, operator: str, args: tuple) -> list[Tensor]:
        """Those indices of a pick that activations decide and that pick among rows, not within them."""
        if operator in ("gather", "index_select"):
            return [args[2]] if args[1] not in (-1, args[0].ndim - 1) and args[2] in self.choices else []
        given = args[1] if operator == "index" else [args[1]]
        rows = given[: max(1, args[0].ndim - 1)]
        return [x for x in rows if x is not None and x in self.choices]

    def enter(self, module, args, kwargs):
        super().enter(module, args, kwargs)
        inputs = list(tensors(args, kwargs))
        self.picked.setdefault(self.names[module], []).append([x for p in self._picks(inputs) for x in p.index])
        self.rows.append(max(map(_rows, floats(inputs)), default=0))

    def leave(self, module, args, kwargs, output):
        super().leave(module, args, kwargs, output)
        rows = self.rows.pop()
        for x in floats(output):
            if _rows(x) == rows and x in self.origins:  # as many as went in: those picked inside are back in order
                self.origins[x] = {p: None for p in self.origins[x] if p.depth <= len(self.open)}


@dataclass(frozen=True, eq=False)  # hashable by identity
class _Pick:
    """Rows that a module at `depth` picked, by an index of one or more tensors."""

    depth: int
    index: tuple[Tensor, ...]


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel() if x.ndim else 1


def other_tokens(model: nn.Module, quantized: nn.Module, batch, names) -> set[str]:
    """Those of `names`, modules that get picked rows, for which the two models pick other ones from `batch`."""
    if not names:
        return set()
    one, other = (Watch(network, batch).picked for network in (model, quantized))

    def same(a: list, b: list) -> bool:
        return len(a) == len(b) and all(map(same_tensors, a, b))

    return {name for name in names if not same(one.get(name, []), other.get(name, []))}
