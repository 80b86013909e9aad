"""What of a model was rounded, and what was left alone, for which reason: one row for every weight of a matrix product.

`quantize_model` and `prepare_qat` leave the record on their result, as `model.quantization`. Without an input they go
by what layers are; with one (`example`, `calibration`, or `coverage(model, batch)`) a forward pass is watched, which
finds what no list of layers can: weights read past their layers, tables that serve as heads, parameters in products.
"""

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor, nn

from beyond_outliers.modules import UNCALLED, every_module, why_not_replaced
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


def treated_weights(model: nn.Module) -> list[tuple[Weight, Tensor, nn.Module]]:
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
    rows = [weight for weight, _, _ in treated_weights(model)]
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
