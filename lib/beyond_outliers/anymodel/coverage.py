"""Which weights of matrix products a model has, and which of them a conversion rounded.

By what its modules are (`known_weights`), and by one watched forward pass (`watched_weights`): which weights are
multiplied by, and whether their layers were called for it.
"""

import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from beyond_outliers.anymodel.checks import WatchedPass
from beyond_outliers.anymodel.linears import COMPLEX, OWN_FORWARD, QUANTIZED, UNCALLED, why_not_replaced
from beyond_outliers.anymodel.operands import Rounding
from beyond_outliers.modules import evaluating, forward, linear_weight, module_names
from beyond_outliers.passes import floats, plain_settings
from beyond_outliers.quantizers.convert import QuantizedLinear, rounding_layers
from beyond_outliers.quantizers.qat import QATLinear
from beyond_outliers.quantizers.record import HEAD, CoverageWarning, Quantization, Runs, Weight, record_of
from beyond_outliers.quantizers.spec import QuantSpec

OUTSIDE = "the module multiplies by a parameter of its own"
UNSEEN = "parameter outside of a layer: only a forward pass shows whether it is multiplied by; pass example="
NEAREST = "rounded to nearest: GPTQ takes linear layers only"
NO_HEAD = "no head was found to round: this table may be multiplied by without a layer; pass example="


def path(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def treated_weights(model: nn.Module) -> list[tuple[Weight, Tensor | None, nn.Module]]:
    """Rounded weights with their tensors (None for computed ones) and owners."""
    found: list[tuple[Weight, Tensor | None, nn.Module]] = []
    for module, name in rounding_layers(model).items():
        if isinstance(rounding := module._modules.get("operand_rounding"), Rounding):
            for attribute in rounding.sums:
                tensor = getattr(module, attribute)
                kind = "experts" if tensor.ndim > 2 else "router"
                found.append((Weight(path(name, attribute), kind, tensor.numel(), True), tensor, module))
        elif isinstance(module, (QuantizedLinear, QATLinear)):
            tensor = module.rounded if isinstance(module, QuantizedLinear) else module._parameters.get("weight")
            entries = module.in_features * module.out_features
            found.append((Weight(name, "linear", entries, True), tensor, module))
    return found


def known_weights(model: nn.Module, head: str | None, spec: QuantSpec, past: Collection[str] = ()) -> list[Weight]:
    """Rows of a converted model, in the order of its modules, by what these are.

    head: the name of its head. past: names of weights that are known to be read past their layers.
    """
    treated: dict[nn.Module, list[Weight]] = {}
    for row, _, owner in treated_weights(model):
        is_nearest = spec.method == "gptq" and row.kind != "linear"
        treated.setdefault(owner, []).append(replace(row, reason=NEAREST) if is_nearest else row)
    kept = None if head is None or spec.head else model.get_submodule(head)
    modules, rows = module_names(model), list[Weight]()
    for module, name in modules.items():
        if module is kept:
            rows.append(Weight(name, "linear", linear_weight(module).numel(), False, HEAD))
        elif module in treated:
            rows += treated[module]
        else:
            rows += (replace(row, reason=UNCALLED) if row.name in past else row for row in _left_alone(module, name))
    if spec.head and head is None:
        tables = [(m, n) for m, n in modules.items() if isinstance(m, nn.Embedding)]
        rows += [Weight(path(n, "weight"), "embedding", m.weight.numel(), False, NO_HEAD) for m, n in tables[:1]]
    return rows


_QUIET = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_KNOWN = {
    nn.modules.conv._ConvNd: ("convolution", "convolution"),
    nn.RNNBase: ("recurrent", "recurrent layer"),
    nn.RNNCellBase: ("recurrent", "recurrent layer"),
    nn.Bilinear: ("bilinear", "bilinear layer"),
    nn.MultiheadAttention: ("attention", UNCALLED),
}


def _why_left(module: nn.Module, name: str, attribute: str, tensor: Tensor) -> tuple[str, str]:
    """Kind of a matrix that is not rounded, and the reason; "" for what no product is made with."""
    is_layer = isinstance(module, nn.Linear)
    if tensor.is_complex():
        return "linear" if is_layer else "parameter", COMPLEX
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return "linear", QUANTIZED
    if is_layer:
        return "linear", (attribute.startswith("weight") and why_not_replaced(module)) or OWN_FORWARD
    known = [told for kind, told in _KNOWN.items() if isinstance(module, kind)]
    if known or "bias" in attribute:
        return known[0] if known else ("parameter", "")
    is_expert = tensor.ndim == 3 and "expert" in (name + type(module).__name__).lower()
    return ("experts", "fused experts") if is_expert else ("parameter", UNSEEN)


def _left_alone(module: nn.Module, name: str) -> Iterator[Weight]:
    """Rows for the matrices that a module which does not round holds itself."""
    if isinstance(module, (*_QUIET, nn.utils.parametrize.ParametrizationList)):
        return
    for attribute, tensor in _matrices(module).items():
        kind, reason = _why_left(module, name, attribute, tensor)
        if reason:
            label = name if attribute == "weight" else path(name, attribute)
            yield Weight(label, kind, tensor.numel(), False, reason)
    if type(module).__module__.startswith("torch.ao.nn") and hasattr(module, "in_features"):
        entries = cast(int, module.in_features) * cast(int, module.out_features)
        yield Weight(name, "linear", entries, False, QUANTIZED)


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of at least two dimensions longer than 1, parametrized ones by the largest of their originals."""
    weights: dict[str, Tensor] = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    for name, parts in getattr(module, "parametrizations", {}).items():
        weights[name] = max(parts.parameters(recurse=False), key=Tensor.numel, default=torch.empty(0))
    if "Linear" in type(module).__name__:  # packed weights are often buffers
        weights |= {n: b for n, b in module._buffers.items() if b is not None and not b.is_floating_point()}
    weights = {name: tensor for name, tensor in weights.items() if not nn.parameter.is_lazy(tensor)}
    return {name: tensor for name, tensor in weights.items() if sum(length > 1 for length in tensor.shape) > 1}


# ------------------------------------------------------------------------------------------------------ a watched pass

# fmt: off
_PRODUCTS = frozenset([  # aten operators that sum over a dimension of two operands
    "_grouped_mm", "_mkl_linear", "_native_multi_head_attention", "_scaled_mm", "_transformer_encoder_layer_fwd",
    "_trilinear", "addbmm", "addmm", "addmv", "baddbmm", "bmm", "convolution", "_convolution", "dot",
    "grouped_mm_fallback", "linear", "lstm", "matmul", "mkldnn_rnn_layer", "mm", "mv", "_thnn_fused_gru_cell",
    "_linear_pointwise", "linear_pointwise",
])
_SUMS = frozenset(["addbmm", "addmm", "addmv", "baddbmm"])  # those whose first operand is added to the product
# fmt: on


class _Products(WatchedPass):
    """Watches one forward pass for products of an activation with something made of a weight alone.

    An activation descends from an embedding lookup, a floating-point input, or a product. uses: id of the weight ->
    (operator, whether a module that owns the weight was running). ran: the modules that did.
    """

    def __init__(self, model: nn.Module, weights: Iterable[Tensor], batch):
        super().__init__(model)
        self.owners: dict[int, set[nn.Module]] = {}
        for module in self.names:
            parts = getattr(module, "parametrizations", {}).values()
            held = [module._parameters.values(), module._buffers.values(), *(part.parameters() for part in parts)]
            for tensor in itertools.chain(*held):
                self.owners.setdefault(id(tensor), set()).add(module)
        self.sources, self.activations = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        for tensor in weights:
            self.sources[tensor] = frozenset([id(tensor)])
        self.ran: set[nn.Module] = set()
        self.uses: dict[int, set[tuple[str, bool]]] = {}
        for x in floats(batch):
            self.activations[x] = True
        with evaluating(model):
            self.run(lambda: forward(model, batch))

    def saw(self, function, operator, given, output):
        args, kwargs = given
        active = any(x in self.activations for x in floats(given))
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

    def enter(self, module, args, kwargs):
        super().enter(module, args, kwargs)
        self.ran.add(module)


def watched_weights(model: nn.Module, record: Quantization, batch) -> list[Weight]:
    """The record's rows, corrected by what one forward pass shows.

    A row of reason `UNCALLED` that is rounded: the layer rounds, and others read its weight without its inputs.
    """
    modules, treated = module_names(model), treated_weights(model)
    tracked = {id(tensor): (row.name, tensor, owner) for row, tensor, owner in treated if tensor is not None}
    for module, name in modules.items():
        if not isinstance(module, nn.utils.parametrize.ParametrizationList):
            for attribute, p in module._parameters.items():
                if p is not None and p.is_floating_point() and p.ndim > 1:
                    is_layer = attribute == "weight" and not isinstance(module, nn.Embedding)
                    tracked.setdefault(id(p), (name if is_layer else path(name, attribute), p, module))
    tables = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    seen = _Products(model, [tensor for _, tensor, _ in tracked.values()], batch)
    uses = {tracked[i][0]: found for i, found in seen.uses.items()}
    ran = {name for name, _, owner in tracked.values() if owner in seen.ran}
    rows = [_corrected(row, uses.get(row.name, set()), record.spec) for row in record.weights]
    rows = [row for row in rows if row.reason != NO_HEAD and not (row.reason == UNSEEN and row.name in ran)]
    heads = {row.name for row in rows if row.reason == HEAD}
    told = {row.name for row in record.weights} | {tracked[id(m.weight)][0] for m, n in modules.items() if n in heads}
    for i, (name, tensor, _) in sorted(tracked.items(), key=lambda item: item[1][0]):
        if name in uses.keys() - told:
            reason = OUTSIDE if i not in tables else UNCALLED if record.spec.head else HEAD
            kind = "embedding" if i in tables else "parameter"
            rows.append(Weight(name, kind, tensor.numel(), False, reason))
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


@plain_settings()
def coverage(quantized: nn.Module, batch=None) -> pd.DataFrame:
    """Table of `quantized.quantization`: one row a matrix-multiply weight; `attrs["share"]` is the share rounded.

    batch: an input (see `forward`); its pass through the model is watched, and the record brought up to date.
    Raises ValueError for a model that no function of this wing returned.
    """
    record = record_of(quantized)
    if batch is not None:
        record.first_pass = False
        rows = watched_weights(quantized, record, batch)
        record.weights = [replace(row, rounded=False) if row.reason == UNCALLED else row for row in rows]
    return record.table()


def check_idle(quantized: nn.Module, idle: dict[nn.Module, str], batch):
    """Of layers that never ran in a measurement of `batch`: ValueError if another module reads the weight of one.

    That module's inputs were not rounded. Else a CoverageWarning names them all.
    """
    record = vars(quantized).get("quantization")
    treated = [(w, t) for w, t, owner in treated_weights(quantized) if owner in idle and t is not None]
    uses = _Products(quantized, [tensor for _, tensor in treated], batch).uses
    read = [weight.name for weight, tensor in treated if id(tensor) in uses]
    if read and record is not None and record.spec.activations != "none":
        raise ValueError(
            f"layers that were replaced but never ran, whose weights another module reads: {', '.join(read)}"
        )
    warnings.warn(
        f"layers that never ran in this measurement: {', '.join(idle.values())}", CoverageWarning, stacklevel=4
    )


def first_pass(quantized: nn.Module, _args):
    """Forward pre-hook of a model that was converted without an example: says which layers did not run in a first pass.

    A module that multiplies by such a layer's weight past the layer would otherwise get unrounded inputs in silence.
    It is a function, not a bound method, so that copies and files of the model keep it.
    """
    record = record_of(quantized)
    if torch.compiler.is_compiling() or not record.first_pass:
        return
    runs, counting = Runs(quantized), ExitStack()
    counting.enter_context(runs.counted())
    runs.counts.update([quantized])  # runs, hooked too late

    def end(quantized, _args, output):
        counting.close()
        record.first_pass = output is None  # it failed: the next one is the first
        if runs.idle and output is not None:
            warnings.warn(
                f"layers that round but did not run in the model's first pass: {', '.join(runs.idle.values())}. Where "
                "another module reads their weights, its inputs are not rounded: coverage(model, batch) tells",
                CoverageWarning,
                stacklevel=2,
            )

    counting.enter_context(quantized.register_forward_hook(end, always_call=True))
