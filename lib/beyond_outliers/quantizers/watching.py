"""One forward pass watched: which weights are multiplied by, and whether their layers were called for it."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from beyond_outliers.modules import UNCALLED, evaluating, every_module, forward
from beyond_outliers.passes import floats, plain_settings
from beyond_outliers.quantizers.formats import QuantSpec
from beyond_outliers.quantizers.record import HEAD, CoverageWarning, Quantization, Weight, record_of
from beyond_outliers.quantizers.weights import NO_HEAD, OUTSIDE, UNSEEN, path, rounding_layers, treated_weights

# fmt: off
_PRODUCTS = frozenset([  # aten operators that sum over a dimension of two operands
    "_grouped_mm", "_mkl_linear", "_native_multi_head_attention", "_scaled_mm", "_transformer_encoder_layer_fwd",
    "_trilinear", "addbmm", "addmm", "addmv", "baddbmm", "bmm", "convolution", "_convolution", "dot",
    "grouped_mm_fallback", "linear", "lstm", "matmul", "mkldnn_rnn_layer", "mm", "mv", "_thnn_fused_gru_cell",
    "_linear_pointwise", "linear_pointwise",
])
_SUMS = frozenset(["addbmm", "addmm", "addmv", "baddbmm"])  # those whose first operand is added to the product
# fmt: on


class _Products(TorchDispatchMode):
    """Watches one forward pass for products of an activation with something made of a weight alone.

    An activation descends from an embedding lookup, a floating-point input, or a product. uses: id of the weight ->
    (operator, whether a module that owns the weight was running).
    """

    def __init__(self, model: nn.Module, weights: list[Tensor]):
        super().__init__()
        self.modules = every_module(model)
        self.owners: dict[int, set] = {}
        for module in self.modules:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self.owners.setdefault(id(tensor), set()).add(module)
            for part in getattr(module, "parametrizations", {}).values():
                for tensor in part.parameters():
                    self.owners.setdefault(id(tensor), set()).add(module)
        self.sources, self.activations = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        for tensor in weights:
            self.sources[tensor] = frozenset([id(tensor)])
        self.open: list[nn.Module] = []
        self.ran: set[nn.Module] = set()
        self.uses: dict[int, set[tuple[str, bool]]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        operator = function.overloadpacket.__name__
        inputs = floats(args, kwargs)
        active = any(x in self.activations for x in inputs)
        operands = floats(args[1:] if operator in _SUMS else args, kwargs)
        origins = [self.sources[x] for x in operands if x not in self.activations and x in self.sources]
        made_of = frozenset().union(*origins)
        activated = active or operator == "embedding"
        if operator in _PRODUCTS:
            for source in made_of:
                owners = self.owners.get(source, set())
                if active or owners & set(self.open[-1:]):
                    self.uses.setdefault(source, set()).add((operator, not owners.isdisjoint(self.open)))
                    activated = True  # what a layer makes of a constant input is its output, no weight any more
            activated |= len(origins) > 1
        for x in floats(output):
            if activated:
                self.activations[x] = True
            elif made_of and x not in self.sources:
                self.sources[x] = made_of
        return output

    def _enter(self, module, args):
        self.open.append(module)
        self.ran.add(module)

    def _leave(self, module, args, output):
        if self.open and self.open[-1] is module:
            self.open.pop()

    def run(self, model: nn.Module, batch) -> "_Products":
        handles = [m.register_forward_pre_hook(self._enter, prepend=True) for m in self.modules]
        handles += [m.register_forward_hook(self._leave) for m in self.modules]
        for x in floats(batch):
            self.activations[x] = True
        try:
            with evaluating(model), self:
                forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return self


def watched_weights(model: nn.Module, record: Quantization, batch) -> list[Weight]:
    """The record's rows, corrected by what one forward pass shows.

    A row of reason `UNCALLED` that is rounded: the layer rounds, and others read its weight without its inputs.
    """
    treated = treated_weights(model)
    names = {id(tensor): weight.name for weight, tensor, _ in treated if tensor is not None}
    candidates = {id(tensor): tensor for _, tensor, _ in treated if tensor is not None}
    modules, tables, owner = every_module(model), set(), {}
    for module, name in modules.items():
        is_table = isinstance(module, nn.Embedding)
        for own, tensor in _candidates(module).items():
            if id(tensor) not in names:
                label = name if own == "weight" and not is_table else path(name, own)
                names[id(tensor)], candidates[id(tensor)], owner[label] = label, tensor, module
            if is_table:
                tables.add(id(tensor))
    seen = _Products(model, list(candidates.values())).run(model, batch)
    uses = {names[i]: found for i, found in seen.uses.items()}
    rows = [_corrected(row, uses.get(row.name, set()), record.spec) for row in record.weights]
    rows = [row for row in rows if row.reason != UNSEEN or owner.get(row.name) not in seen.ran]
    rows = [row for row in rows if row.reason != NO_HEAD]
    heads = {row.name for row in rows if row.reason == HEAD}
    told = {row.name for row in record.weights} | {names[id(m.weight)] for m, n in modules.items() if n in heads}
    for name in sorted(uses.keys() - told):
        (i,) = (i for i, label in names.items() if label == name)
        reason = OUTSIDE if i not in tables else UNCALLED if record.spec.head else HEAD
        kind = "embedding" if i in tables else "parameter"
        rows.append(Weight(name, kind, candidates[i].numel(), False, reason))
    return rows


def _corrected(row: Weight, uses: set[tuple[str, bool]], spec: QuantSpec) -> Weight:
    """`row` with the reason that its uses in products show."""
    if row.rounded and spec.activations != "none" and any(not owned for _, owned in uses):
        return replace(row, reason=UNCALLED)
    if row.reason == NO_HEAD and uses:
        return replace(row, reason=UNCALLED)
    if row.reason == UNSEEN and uses:
        return replace(row, reason="convolution" if any("convolution" in name for name, _ in uses) else OUTSIDE)
    return row


def _candidates(module: nn.Module) -> dict[str, Tensor]:
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return {}
    return {n: p for n, p in module._parameters.items() if p is not None and p.is_floating_point() and p.ndim > 1}


@plain_settings()
def coverage(quantized: nn.Module, batch=None) -> pd.DataFrame:
    """Table of `quantized.quantization`: one row a matrix-multiply weight; `attrs["share"]` is the share rounded.

    batch: an input (see `forward`); its pass through the model is watched, and the record brought up to date.
    Raises ValueError for a model that no function of this wing returned.
    """
    record = record_of(quantized)
    if batch is not None:
        forget_first_pass(quantized)
        rows = watched_weights(quantized, record, batch)
        record.weights = [replace(row, rounded=False) if row.reason == UNCALLED else row for row in rows]
    return record.table()


# --------------------------------------------------------------------------------------------- which layers ran


class Runs:
    """Counts the runs of the layers that round, while a measurement goes on.

    `check(batch)`, once it is over: layers that never ran are put into the record as such; if one pass of `batch` shows
    that some module reads such a layer's weight without calling it, that is a ValueError: its inputs were not rounded.
    """

    def __init__(self, quantized: nn.Module):
        self.model, self.layers = quantized, rounding_layers(quantized)
        self.counts: Counter[nn.Module] = Counter()

    @property
    def idle(self) -> dict[nn.Module, str]:
        return {layer: name for layer, name in self.layers.items() if not self.counts[layer]}

    @contextmanager
    def counted(self) -> Iterator["Runs"]:
        forget_first_pass(self.model)  # what it would say, `check` says better
        handles = [
            layer.register_forward_pre_hook(lambda layer, _: self.counts.update([layer])) for layer in self.layers
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def check(self, batch):
        idle = self.idle
        record = vars(self.model).get("quantization")
        if record is not None:
            record.never_ran = list(idle.values())
        if not idle:
            return
        treated = [(w, t) for w, t, owner in treated_weights(self.model) if owner in idle and t is not None]
        uses = _Products(self.model, [tensor for _, tensor in treated]).run(self.model, batch).uses
        read = [weight.name for weight, tensor in treated if id(tensor) in uses]
        if read and record is not None and record.spec.activations != "none":
            raise ValueError(
                f"layers that were replaced but never ran, whose weights another module reads: {', '.join(read)}"
            )
        warnings.warn(
            f"layers that never ran in this measurement: {', '.join(idle.values())}", CoverageWarning, stacklevel=3
        )


def check_first_pass(quantized: nn.Module):
    """Lets the first forward pass of a converted model warn of layers that round and did not run in it.

    A module that multiplies by such a layer's weight past the layer would otherwise get unrounded inputs in silence.
    """
    quantized.register_forward_pre_hook(_first_pass)


def forget_first_pass(quantized: nn.Module):
    for key, hook in list(quantized._forward_pre_hooks.items()):
        if hook is _first_pass:
            del quantized._forward_pre_hooks[key]


def _first_pass(quantized: nn.Module, _args):
    """A forward pre-hook, which copies and files of the model keep: a function of the module, not a bound method."""
    if torch.compiler.is_compiling():
        return
    runs, stack = Runs(quantized), ExitStack()
    stack.enter_context(runs.counted())
    runs.counts.update([quantized])  # runs, hooked too late

    def end(quantized, _args, output):
        handle.remove()
        stack.close()
        if output is None:  # it failed: the next one is the first
            check_first_pass(quantized)
        elif runs.idle:
            names = ", ".join(runs.idle.values())
            warnings.warn(
                f"layers that round but did not run in the model's first pass: {names}. Where another module reads "
                "their weights, its inputs are not rounded: coverage(model, batch) tells",
                CoverageWarning,
                stacklevel=2,
            )

    handle = quantized.register_forward_hook(end, always_call=True)
