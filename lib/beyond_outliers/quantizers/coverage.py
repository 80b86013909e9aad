"""What of a model was rounded, and what was left alone, for which reason: one row for every weight of a matrix product.

`quantize_model` and `prepare_qat` leave the record on their result, as `model.quantization`. Without an input they go
by what layers are; with one (`example`, `calibration`, or `coverage(model, batch)`) a forward pass is watched, which
finds what no list of layers can: weights read past their layers, tables that serve as heads, parameters in products.
"""

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from beyond_outliers.modules import UNCALLED, evaluating, every_module, forward, why_not_replaced
from beyond_outliers.quantizers.formats import QuantSpec
from beyond_outliers.quantizers.layers import QATLinear, QuantizedLinear

HEAD = "head"  # the only reason that a specification itself asks for
EXPERTS = "fused experts"
OUTSIDE = "the module multiplies by a parameter of its own"
UNSEEN = "parameter outside of a layer: only a forward pass shows whether it is multiplied by; pass example="
NO_HEAD = "no head was found to round: this table may be multiplied by without a layer; pass example="


class CoverageWarning(UserWarning):
    """Weights of matrix products were left in full precision."""


@dataclass(frozen=True)
class Weight:
    """A weight of a matrix product. `rounded`: treated as the specification says, the operand that it meets as well."""

    name: str
    kind: str
    entries: int
    rounded: bool
    reason: str = ""


@dataclass
class Quantization:
    """What was done to a model: `print(model.quantization)`.

    stage: "ptq" (rounded after training), "qat" (trains through quantizers), "frozen" (a trained one, rounded once).
    never_ran: layers that got no input in the last measurement, such as idle experts.
    """

    spec: QuantSpec
    stage: str = "ptq"
    scheme: str | None = None
    weights: list[Weight] = field(default_factory=list)
    never_ran: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the entries of matrix-multiply weights that were rounded; NaN without any."""
        entries = sum(weight.entries for weight in self.weights)
        return sum(w.entries for w in self.weights if w.rounded) / entries if entries else float("nan")

    @property
    def left_alone(self) -> list[Weight]:
        """What is in full precision although the specification does not say so."""
        return [weight for weight in self.weights if not weight.rounded and weight.reason != HEAD]

    def table(self) -> pd.DataFrame:
        """One row a weight: name, kind, entries, rounded, reason. `table.attrs["share"]` is `share`."""
        columns = ["name", "kind", "entries", "rounded", "reason"]
        table = pd.DataFrame([[getattr(w, c) for c in columns] for w in self.weights], columns=columns)
        table.attrs["share"] = self.share
        return table

    def __str__(self) -> str:
        lines = [f"{self.spec.name}: {self.share:.1%} of the entries of matrix-multiply weights are rounded"]
        lines += [
            f"  left alone  {w.name} ({w.kind}, {w.entries:,} entries): {w.reason}"
            for w in self.weights
            if not w.rounded
        ]
        lines += [f"  note  {w.name}: {w.reason}" for w in self.weights if w.rounded and w.reason]
        return "\n".join(lines + [f"  never ran  {name}" for name in self.never_ran])

    def report(self, strict: bool):
        """CoverageWarning that lists what was left alone, or with `strict` a ValueError."""
        if not self.left_alone:
            return
        shown = ", ".join(f"{w.name} ({w.reason})" for w in self.left_alone[:8])
        more = f" and {len(self.left_alone) - 8} more" if len(self.left_alone) > 8 else ""
        text = (
            f"{self.share:.1%} of the matrix-multiply weight entries are rounded; left in full precision: {shown}{more}"
        )
        if strict:
            raise ValueError(f"{text}; valid: strict=False, which goes on with a warning")
        warnings.warn(text, CoverageWarning, stacklevel=3)


def coverage(quantized: nn.Module, batch=None) -> pd.DataFrame:
    """Table of `quantized.quantization`: one row a matrix-multiply weight; `attrs["share"]` is the share rounded.

    batch: an input (see `forward`); its pass through the model is watched, and the record brought up to date.
    Raises ValueError for a model that no function of this wing returned.
    """
    record = record_of(quantized)
    if batch is not None:
        rows = watched_weights(quantized, record, batch)
        record.weights = [replace(row, rounded=False) if row.reason == UNCALLED else row for row in rows]
    return record.table()


def record_of(quantized: nn.Module) -> Quantization:
    record = vars(quantized).get("quantization")
    if not isinstance(record, Quantization):
        raise ValueError(
            f"{type(quantized).__name__} has no record; valid: what quantize_model, prepare_qat, freeze_qat return"
        )
    return record


# ------------------------------------------------------------------------------------------ by what the layers are


def rounding_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that round, hidden ones too, with their names."""
    rounds = (QuantizedLinear, QATLinear)
    return {
        m: name for m, name in every_module(model).items() if isinstance(m, rounds) or hasattr(m, "operand_rounding")
    }


def path(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _treated(model: nn.Module) -> list[tuple[Weight, Tensor, nn.Module]]:
    """Rounded weights with their tensors and owners."""
    found = []
    for module, name in rounding_layers(model).items():
        if hasattr(module, "operand_rounding"):
            for own in module.operand_rounding.sums:
                tensor = getattr(module, own)
                kind = (
                    "experts" if tensor.ndim > 2 else "linear subclass" if isinstance(module, nn.Linear) else "router"
                )
                found.append((Weight(path(name, own), kind, tensor.numel(), True), tensor, module))
        else:
            tensor = module.rounded if isinstance(module, QuantizedLinear) else module._parameters.get("weight")
            entries = module.in_features * module.out_features
            found.append((Weight(name, "linear", entries, True), tensor, module))
    return found


def known_weights(model: nn.Module, head: str | None, spec: QuantSpec, past: Collection[str] = ()) -> list[Weight]:
    """Rows of a converted model, in the order of its modules, by what these are.

    head: the name of its head. past: names of weights that are known to be read past their layers.
    """
    rows = [weight for weight, _, _ in _treated(model)]
    handled, kept = rounding_layers(model), None if head is None or spec.head else model.get_submodule(head)
    modules = every_module(model)
    for module, name in modules.items():
        if module is kept:
            rows.append(Weight(name, "linear", module.weight.numel(), False, HEAD))
        elif module not in handled:
            rows += (replace(row, reason=UNCALLED) if row.name in past else row for row in _left_alone(module, name))
    if spec.head and head is None:
        tables = [(m, n) for m, n in modules.items() if isinstance(m, nn.Embedding)]
        rows += [Weight(path(n, "weight"), "embedding", m.weight.numel(), False, NO_HEAD) for m, n in tables[:1]]
    order = {name: i for i, name in enumerate(modules.values())}
    return sorted(rows, key=lambda row: order.get(row.name, order.get(row.name.rpartition(".")[0], len(order))))


_QUIET = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_KNOWN = {
    nn.modules.conv._ConvNd: ("convolution", "convolution"),
    nn.RNNBase: ("recurrent", "recurrent layer"),
    nn.RNNCellBase: ("recurrent", "recurrent layer"),
    nn.Bilinear: ("bilinear", "bilinear layer"),
    nn.MultiheadAttention: ("attention", UNCALLED),
}


def _left_alone(module: nn.Module, name: str) -> Iterator[Weight]:
    """Rows for the matrices that a module which does not round holds itself."""
    if isinstance(module, (*_QUIET, nn.utils.parametrize.ParametrizationList)):
        return
    for own, tensor in _matrices(module).items():
        row = Weight(name if own == "weight" else path(name, own), "parameter", tensor.numel(), False, UNSEEN)
        known = next((value for kind, value in _KNOWN.items() if isinstance(module, kind)), None)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            yield replace(row, kind="linear", reason="already quantized")
        elif isinstance(module, nn.Linear):
            reason = why_not_replaced(module) or "subclass with its own forward"
            yield replace(
                row, kind="linear", reason=reason if own.startswith("weight") else "subclass with its own forward"
            )
        elif known:
            yield replace(row, kind=known[0], reason=known[1])
        elif tensor.ndim == 3 and "expert" in (name + type(module).__name__).lower() and "bias" not in own:
            yield replace(row, kind="experts", reason=EXPERTS)
        elif "bias" not in own:
            yield row
    if type(module).__module__.startswith("torch.ao.nn") and hasattr(module, "in_features"):
        yield Weight(name, "linear", module.in_features * module.out_features, False, "already quantized")


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of at least two dimensions longer than 1, parametrized ones by the largest of their originals."""
    own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    for name, parts in getattr(module, "parametrizations", {}).items():
        own[name] = max(parts.parameters(recurse=False), key=Tensor.numel, default=torch.empty(0))
    if "Linear" in type(module).__name__:  # packed weights are often buffers
        own |= {n: b for n, b in module._buffers.items() if b is not None and not b.is_floating_point()}
    lazy = nn.parameter.UninitializedTensorMixin
    own = {name: tensor for name, tensor in own.items() if not isinstance(tensor, lazy)}
    return {name: tensor for name, tensor in own.items() if sum(length > 1 for length in tensor.shape) > 1}


# ------------------------------------------------------------------------------------------- by a watched forward pass

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
        inputs = _floats(args, kwargs)
        active = any(x in self.activations for x in inputs)
        operands = _floats(args[1:] if operator in _SUMS else args, kwargs)
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
        for x in _floats(output):
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
        for x in _floats(batch):
            self.activations[x] = True
        try:
            with evaluating(model), self:
                forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return self


def _floats(*values) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found += [value] if value.is_floating_point() else []
        elif isinstance(value, (tuple, list)):
            found += _floats(*value)
        elif isinstance(value, Mapping):
            found += _floats(*value.values())
    return found


def watched_weights(model: nn.Module, record: Quantization, batch) -> list[Weight]:
    """The record's rows, corrected by what one forward pass shows.

    A row of reason `UNCALLED` that is rounded: the layer rounds, and others read its weight without its inputs.
    """
    treated = _treated(model)
    names = {id(tensor): weight.name for weight, tensor, _ in treated if tensor is not None}
    candidates = {id(tensor): tensor for _, tensor, _ in treated if tensor is not None}
    tables = set()
    owner = {}
    for module, name in every_module(model).items():
        for own, tensor in _candidates(module).items():
            if id(tensor) not in names:
                names[id(tensor)] = (
                    name if own == "weight" and not isinstance(module, nn.Embedding) else path(name, own)
                )
                candidates[id(tensor)] = tensor
                owner[names[id(tensor)]] = module
            if isinstance(module, nn.Embedding):
                tables.add(id(tensor))
    seen = _Products(model, list(candidates.values())).run(model, batch)
    used = {names[i]: (i, uses) for i, uses in seen.uses.items()}
    rows = []
    for row in record.weights:
        _, uses = used.pop(row.name, (None, set()))
        past = row.rounded and record.spec.activations != "none" and any(not owned for _, owned in uses)
        if past:
            rows.append(replace(row, reason=UNCALLED))
        elif row.reason == NO_HEAD:
            rows += [replace(row, reason=UNCALLED)] if uses else []
        elif row.reason == UNSEEN:
            if uses:
                convolved = any("convolution" in operator for operator, _ in uses)
                rows.append(replace(row, reason="convolution" if convolved else OUTSIDE))
            elif owner.get(row.name) not in seen.ran:
                rows.append(row)
        else:
            rows.append(row)
    known = {
        id(m.weight) for m, n in every_module(model).items() if any(r.name == n and r.reason == HEAD for r in rows)
    }
    for name, (i, _) in used.items():
        if i in known:
            continue
        is_table = i in tables
        reason = (UNCALLED if record.spec.head else HEAD) if is_table else OUTSIDE
        rows.append(Weight(name, "embedding" if is_table else "parameter", candidates[i].numel(), False, reason))
    return rows


def _candidates(module: nn.Module) -> dict[str, Tensor]:
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return {}
    return {n: p for n, p in module._parameters.items() if p is not None and p.is_floating_point() and p.ndim > 1}


# --------------------------------------------------------------------------------------------- which layers ran


class Runs:
    """Counts the runs of the layers that round, while a measurement goes on.

    `check(batch)`, once it is over: layers that never ran are put into the record as such; if one pass of `batch` shows
    that some module reads such a layer's weight without calling it, that is a ValueError: its inputs were not rounded.
    """

    def __init__(self, quantized: nn.Module):
        self.model, self.layers, self.counts = quantized, rounding_layers(quantized), Counter()

    @contextmanager
    def counted(self) -> Iterator["Runs"]:
        handles = [
            layer.register_forward_pre_hook(lambda layer, _: self.counts.update([layer])) for layer in self.layers
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def check(self, batch):
        idle = {layer: name for layer, name in self.layers.items() if not self.counts[layer]}
        record = vars(self.model).get("quantization")
        if record is not None:
            record.never_ran = list(idle.values())
        if not idle:
            return
        treated = [(w, t) for w, t, owner in _treated(self.model) if owner in idle and t is not None]
        uses = _Products(self.model, [tensor for _, tensor in treated]).run(self.model, batch).uses
        read = [weight.name for weight, tensor in treated if id(tensor) in uses]
        if read and record is not None and record.spec.activations != "none":
            raise ValueError(
                f"layers that were replaced but never ran, whose weights another module reads: {', '.join(read)}"
            )
        warnings.warn(
            f"layers that never ran in this measurement: {', '.join(idle.values())}", CoverageWarning, stacklevel=3
        )
