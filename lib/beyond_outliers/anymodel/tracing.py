"""Models that are not ours under the decomposition: which modules touch activations, what is kept, what is refused.

Functions between modules, tensors that are changed in place, pooled states beside the answer, experts that see other
tokens, modules that keep a state: what `decompose` must look after in a model of which it knows nothing.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from beyond_outliers.anymodel.invariants import REPEATED, UNCHANGED, check_equal, unchanged
from beyond_outliers.anymodel.routing import Watch, other_tokens
from beyond_outliers.passes import floats, main_output, mapped, reals, same_tensors, tensors
from beyond_outliers.propagation.decomposition import FUNCTIONAL, Ours, Row, kind_of, units
from beyond_outliers.propagation.hooks import Call, Tape

# aten operators beside views that only move, copy or recast numbers: between modules they are no function of their own
# fmt: off
_MOVES = frozenset([
    "_to_copy", "_unsafe_view", "cat", "clone", "copy_", "empty_like", "index", "index_select", "lift_fresh",
    "new_empty", "new_zeros", "repeat", "stack", "zeros_like",
])
# fmt: on


class _Trace(Watch):
    """Watches one forward pass: which modules touch activations, which call others, which compute between the calls.

    last: the output of the last of `units` to finish.
    """

    def __init__(self, model: nn.Module, batch: Any, units: set[nn.Module]):
        self.units = units
        self.seen: set[str] = set()  # modules whose output is an activation
        self.parents: set[str] = set()  # modules that call modules
        self.functional: set[str] = set()  # modules that compute on activations themselves
        self.last: list[Tensor] = []
        super().__init__(model, batch)

    def computed(self, function, operator):
        if not (function.is_view or operator in _MOVES) and self.open:
            self.functional.add(self.names[self.open[-1]])

    def enter(self, module, args, kwargs):
        self.parents.update(self.names[parent] for parent in self.open[-1:])
        super().enter(module, args, kwargs)

    def leave(self, module, args, kwargs, output):
        super().leave(module, args, kwargs, output)
        if any(x in self.activations for x in floats(output)):
            self.seen.add(self.names[module])
            if module in self.units:
                self.last = reals(output)

    def ends_with_the_last(self) -> bool:
        """Whether the model's answer holds the numbers that the last unit gave, in whatever shape."""
        answer, last = (
            {(x.numel(), float(x.double().sum())) for x in values} for values in (main_output(self.output), self.last)
        )
        return answer <= last


class Foreign(Ours):
    """Rows are units that touch activations, and what computes around them.

    Where the model's answer is not what the last unit gave, such as beside a pooler, the model itself has the last row.
    picking: names of those whose inputs are rows that the model picks (see `routing`).
    """

    def __init__(self, model: nn.Module, quantized: nn.Module, batch: Any, granularity: str, attention: str):
        self.model, self.quantized = model, quantized
        whole = set(units(model, granularity, attention))
        trace = _Trace(model, batch, whole)
        names = {trace.names[module] for module in whole}
        around = {""} | {".".join(name.split(".")[:i]) for name in names for i in range(1, name.count(".") + 1)}
        if not trace.ends_with_the_last():
            trace.functional.add("")
        self.kinds = {}
        for module, name in trace.names.items():
            if name in trace.seen and (name in names or name in around & trace.functional):
                partial = name not in names and name in trace.parents
                self.kinds[name] = kind_of(name, module) + (FUNCTIONAL if partial else "")
        self.picking = {name for name, calls in trace.picked.items() if any(calls)} & set(self.kinds)
        self.elsewhere: set[str] = set()
        self.clone = False  # set once the model has been caught changing a tensor in place
        self.repeated: set[str] = set()
        self.same: dict[nn.Module, bool] = {}

    def run(self, batch: Any, keep: Callable, compare: Callable) -> None:
        self.elsewhere |= other_tokens(self.model, self.quantized, batch, self.picking - self.elsewhere)
        names = [name for name in self.kinds if name not in self.elsewhere]
        versions: list[tuple[Tensor, int]] = []

        def noted(values: Any) -> Any:
            values = self.copy(values)
            versions.extend((x, x._version) for x in tensors(values) if not x.is_inference())
            return values

        Tape(self.model, names, keep, noted).run(batch)
        if not self.clone and any(x._version != version for x, version in versions):
            self.clone = True
            return self.run(batch, keep, compare)
        versions.clear()  # the quantized pass releases what was kept, call by call
        Tape(self.quantized, names, compare, self.copy).run(batch)

    def copy(self, values: Any) -> Any:
        return mapped(Tensor.clone, values) if self.clone else values

    def check(self, row: Row, calls: tuple[Call, Call], evaluate: Callable, outputs: tuple) -> None:
        f_h, fq_hq, f_hq, fq_h = outputs
        module, quantized = row.pair
        label, held = row.name, (calls[0].args, calls[0].kwargs)
        given, given_q = (list(tensors(call.args, call.kwargs)) for call in calls)
        repeated = []
        if same_tensors(given, given_q):
            repeated = [(f_h, f_hq), (fq_hq, fq_h)]
        else:
            integers = ([x for x in values if not floats(x)] for values in (given, given_q))
            row.other_integers |= not same_tensors(*integers)
            if label not in self.repeated:
                repeated = [(f_h, evaluate(module, calls[0]))]
        self.repeated.add(label)  # once is enough
        if module not in self.same:
            self.same[module] = unchanged(module, quantized)
        for pair in repeated:
            check_equal(label, pair, held, REPEATED)
        for pair in [(f_hq, fq_hq), (f_h, fq_h)] if self.same[module] else []:
            check_equal(label, pair, held, UNCHANGED)
