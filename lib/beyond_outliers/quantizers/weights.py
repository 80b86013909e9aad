"""Which matrix-multiply weights a model has, by what its modules are, and which of them a conversion rounded."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from beyond_outliers.modules import COMPLEX, UNCALLED, every_module, linear_weight, why_not_replaced
from beyond_outliers.quantizers.formats import QuantSpec
from beyond_outliers.quantizers.layers import QATLinear, QuantizedLinear
from beyond_outliers.quantizers.operands import own_rounding
from beyond_outliers.quantizers.record import HEAD, Weight

EXPERTS = "fused experts"
OUTSIDE = "the module multiplies by a parameter of its own"
UNSEEN = "parameter outside of a layer: only a forward pass shows whether it is multiplied by; pass example="
NO_HEAD = "no head was found to round: this table may be multiplied by without a layer; pass example="


def rounding_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that round, hidden ones too, with their names."""
    rounds = (QuantizedLinear, QATLinear)
    return {m: name for m, name in every_module(model).items() if isinstance(m, rounds) or own_rounding(m) is not None}


def path(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def treated_weights(model: nn.Module) -> list[tuple[Weight, Tensor | None, nn.Module]]:
    """Rounded weights with their tensors (None for computed ones) and owners."""
    found: list[tuple[Weight, Tensor | None, nn.Module]] = []
    for module, name in rounding_layers(model).items():
        if (rounding := own_rounding(module)) is not None:
            for own in rounding.sums:
                tensor = getattr(module, own)
                kind = (
                    "experts" if tensor.ndim > 2 else "linear subclass" if isinstance(module, nn.Linear) else "router"
                )
                found.append((Weight(path(name, own), kind, tensor.numel(), True), tensor, module))
        elif isinstance(module, (QuantizedLinear, QATLinear)):
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
            rows.append(Weight(name, "linear", linear_weight(module).numel(), False, HEAD))
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
        if tensor.is_complex():
            yield replace(row, kind="linear" if isinstance(module, nn.Linear) else "parameter", reason=COMPLEX)
        elif not tensor.is_floating_point() or tensor.element_size() < 2:
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
        entries = cast(int, module.in_features) * cast(int, module.out_features)
        yield Weight(name, "linear", entries, False, "already quantized")


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of at least two dimensions longer than 1, parametrized ones by the largest of their originals."""
    own: dict[str, Tensor] = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    for name, parts in getattr(module, "parametrizations", {}).items():
        own[name] = max(parts.parameters(recurse=False), key=Tensor.numel, default=torch.empty(0))
    if "Linear" in type(module).__name__:  # packed weights are often buffers
        own |= {n: b for n, b in module._buffers.items() if b is not None and not b.is_floating_point()}
    own = {name: tensor for name, tensor in own.items() if not nn.parameter.is_lazy(tensor)}
    return {name: tensor for name, tensor in own.items() if sum(length > 1 for length in tensor.shape) > 1}
