"""Conversion of models that are not ours: hidden and parametrized layers, attention, experts, weights read past."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from beyond_outliers.anymodel.coverage import first_pass, known_weights, path, watched_weights
from beyond_outliers.anymodel.linears import UNCALLED, is_plain, why_not_replaced
from beyond_outliers.anymodel.open import open_layers
from beyond_outliers.anymodel.operands import Rounding, products_of
from beyond_outliers.anymodel.save import refuse_save_pretrained
from beyond_outliers.modules import copy_of, find_head, module_names, substitute
from beyond_outliers.quantizers.convert import converted_linear
from beyond_outliers.quantizers.hadamard import hadamard_transform
from beyond_outliers.quantizers.qat import make_quantizer
from beyond_outliers.quantizers.record import Quantization, rounding_layers


def converted(
    model: nn.Module, record: Quantization, round_weights: bool = True, example=None, past: Collection[str] = ()
) -> nn.Module:
    """`quantizers.convert.converted` of any model.

    past: names of weights to leave alone because they are read past their layers; those that the pass of `example`
    shows are added, and the model is converted anew.
    """
    copied = open_layers(copy_of(model))
    head = find_head(copied)
    made: dict[nn.Module, nn.Module] = {}
    kept = None if head is None or record.spec.head else copied.get_submodule(head)
    for module, name in module_names(copied).items():
        if module is kept or name in past:
            continue
        try:
            if isinstance(module, nn.Linear) and why_not_replaced(module) is None:
                if record.scheme is not None and nn.utils.parametrize.is_parametrized(module):
                    raise ValueError("parametrized weights train through no quantizer; valid: no parametrizations")
                training = module.training
                made[module] = converted_linear(module.eval(), record, round_weights).train(training)
                continue
            sums = None if record.scheme == "lsq" else products_of(module)
            if sums and not any(path(name, attribute) in past for attribute in sums):
                _round_products(module, sums, record)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    copied = substitute(copied, made)
    if not rounding_layers(copied):
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantize beside its head")
    record.weights = known_weights(copied, head, record.spec, past)
    if example is not None:
        record.weights = watched_weights(copied, record, example)
        if read := [w.name for w in record.weights if w.reason == UNCALLED and w.rounded]:
            return converted(model, record, round_weights, example, [*past, *read])
    elif record.spec.activations != "none" and not all(map(is_plain, copied.modules())):
        record.first_pass = True
        copied.register_forward_pre_hook(first_pass)
    if record.stage == "ptq":  # what trains keeps the names of the model: its files load
        refuse_save_pretrained(copied)
    vars(copied)["quantization"] = record
    return copied


# ------------------------------------------------------------------------------------------- products with own weights


def _round_products(module: nn.Module, sums: dict[str, int], record: Quantization):
    """Makes a module that multiplies by weights of its own round these, after training once, and their operands."""
    spec, scheme = record.spec, record.scheme or "ste"
    for name, dim in sums.items():
        spec.check_width(module.get_parameter(name).shape[dim])
    parts: list[nn.Module | None] = [make_quantizer(scheme, form, spec) for form in (spec.activations, spec.weights)]
    if spec.rotate or scheme == "quest":
        parts = [nn.Sequential(Rotation(), nn.Identity() if part is None else part) for part in parts]
    operand, weight = parts
    rounding = Rounding(sums, operand, None if weight is None else EachMatrix(weight))
    rounding.attach(module)
    if record.scheme is None:
        rounding.freeze(module)


class Rotation(nn.Module):
    """Block Hadamard rotation of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return hadamard_transform(x)


class EachMatrix(nn.Module):
    """`inner` of every matrix of (..., out, in) by itself: a scale of a tensor is that of one expert."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(matrix) for matrix in x.reshape(-1, *x.shape[-2:])]).view(x.shape)
