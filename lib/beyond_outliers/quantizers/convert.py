"""Models under quantization: after training (`quantize_model`) and during it (`prepare_qat`).

Paper: arXiv 2509.23500, section 3: weights rounded once, activations as they come.
"""

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from beyond_outliers.modules import (
    UNCALLED,
    as_batches,
    copy_of,
    every_module,
    find_head,
    is_plain,
    replace_linears,
    settled_weight,
    substitute,
    take_hooks,
)
from beyond_outliers.passes import plain_settings
from beyond_outliers.quantizers.formats import QuantSpec, quantize_tensor
from beyond_outliers.quantizers.gptq import gptq_weight, round_in_order
from beyond_outliers.quantizers.hadamard import hadamard_block, hadamard_transform
from beyond_outliers.quantizers.layers import ParametrizedQATLinear, QATLinear, QuantizedLinear
from beyond_outliers.quantizers.opened import open_layers
from beyond_outliers.quantizers.operands import Rounding, along, own_products, own_rounding
from beyond_outliers.quantizers.qat import SCHEMES, AbsMaxQuantizer, make_quantizer
from beyond_outliers.quantizers.record import Quantization, record_of, with_record
from beyond_outliers.quantizers.saving import refuse_save_pretrained
from beyond_outliers.quantizers.watching import check_first_pass, watched_weights
from beyond_outliers.quantizers.weights import known_weights, path, rounding_layers

NEAREST = "rounded to nearest: GPTQ takes linear layers only"


def _converted(
    model: nn.Module,
    record: Quantization,
    make: Callable,
    treat: Callable | None,
    example=None,
    past: Collection[str] = (),
) -> nn.Module:
    """A copy of a full-precision model with `record` on it.

    make(linear) gives what stands for a linear layer; treat(module, sums) rounds in place a module that multiplies by
    weights of its own (see `operands`), None where that cannot be. past: names of weights to leave alone because they
    are read past their layers; those that the pass of `example` shows are added, and the model is converted anew.
    """
    if rounding_layers(model) or any(getattr(module, "rounds_operands", False) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is quantized already; valid: a full-precision model")
    copied = open_layers(copy_of(model))
    head = find_head(copied)
    kept = {module for module, name in every_module(copied).items() if name in past}
    kept |= set() if head is None or record.spec.head else {copied.get_submodule(head)}
    copied = replace_linears(copied, kept, make)
    for module, name in every_module(copied).items():
        if module in kept or treat is None or isinstance(module, (QuantizedLinear, QATLinear)):
            continue
        sums = own_products(module)
        try:
            if sums and not any(path(name, own) in past for own in sums):
                treat(module, sums)
        except ValueError as error:
            raise ValueError(f"module {name!r}: {error}") from error
    if not rounding_layers(copied):
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantize beside its head")
    record.weights = known_weights(copied, head, record.spec, past)
    if example is not None:
        record.weights = watched_weights(copied, record, example)
        found = [w.name for w in record.weights if w.reason == UNCALLED and w.rounded]
        if found:
            return _converted(model, record, make, treat, example, [*past, *found])
    elif record.spec.activations != "none" and not all(map(is_plain, every_module(copied))):
        check_first_pass(copied)
    return with_record(copied, record)


@plain_settings()
def quantize_model(
    model: nn.Module, spec: QuantSpec, calibration=None, strict: bool = False, example=None
) -> nn.Module:
    """Post-training quantization: a copy of `model` whose linear layers are `QuantizedLinear`; `model` stays as it is.

    Works on any tree of modules. Rounded are nn.Linear (with hooks, parametrizations and in Python lists too), GPT-2's
    Conv1D, torch's MultiheadAttention, and the fused experts and routers of `transformers`. With `spec.head` the head
    is rounded too; where it is tied, the copy's embedding keeps the unrounded table. With `spec.rotate` every layer
    rounds in its rotated basis.

    What was rounded and what was not stands in the copy's `quantization` (see `coverage`). Matrix-multiply weights that
    were left alone, other than the head that `spec` leaves alone, are named in a `CoverageWarning`; with `strict` they
    are a ValueError. example: an input as `propagation.decompose` takes them; its pass is watched for products with
    weights that no layer shows (calibration's first batch by default).

    With method "gptq" weights are rounded one layer after the other, in the order in which they run, each against the
    inputs that it gets from the rounded layers before it, rotated and rounded as at inference (see `gptq`); experts
    and routers are rounded to nearest.
    calibration: these inputs' source, an iterable of inputs as `propagation.decompose` takes them, or one tensor or
    mapping. One large batch is quickest (about the cost of a few passes over it); many take less memory and one pass
    up to each layer.

    Raises ValueError naming the layer whose width the spec's blocks do not divide, or that never ran in calibration;
    for a model that is quantized already, and for one without linear layers; for a calibration that the method has no
    use for, or a missing one.
    """
    if (spec.method == "gptq") != (calibration is not None):
        given = "without" if calibration is None else "with"
        raise ValueError(f"method {spec.method!r} {given} calibration; valid: 'gptq' with it, 'rtn' without")
    batches = None if calibration is None else list(as_batches(calibration))
    example = next(iter(batches or ()), None) if example is None else example
    quantized = rounded_structure(model, spec, batches is None, example)
    record = record_of(quantized)
    if batches is not None:
        _round_by_gptq(quantized, spec, batches)
        record.weights = [
            w if w.kind == "linear" or not w.rounded else replace(w, reason=NEAREST) for w in record.weights
        ]
    record.report(strict)
    return quantized


def rounded_structure(
    model: nn.Module, spec: QuantSpec, round_weights: bool = True, example=None, past: Collection[str] = ()
) -> nn.Module:
    """`quantize_model` without its reports; linear layers keep their weights as they are unless `round_weights`."""

    def operand() -> nn.Module | None:
        return None if spec.activations == "none" else AbsMaxQuantizer(spec.activations, spec.granularity, spec.block)

    def make(linear: nn.Linear) -> QuantizedLinear:
        spec.check_width(linear.in_features)
        rotation = hadamard_block(linear.in_features) if spec.rotate else None
        weight = settled_weight(linear)
        weight = weight if rotation is None else hadamard_transform(weight, rotation)
        if round_weights:
            weight = quantize_tensor(weight, spec.weights, spec.granularity, spec.block)
        return QuantizedLinear(weight, linear.bias, operand(), rotation)

    def treat(module: nn.Module, sums: dict[str, int]):
        for name, dim in sums.items():
            weight = module.get_parameter(name).detach()
            spec.check_width(weight.shape[dim])
            _as_buffer(module, name, along(lambda w: _round_matrices(w, spec), weight, dim))
        _attach(module, Rounding(sums, _rotated(operand(), spec.rotate)))

    return refuse_save_pretrained(_converted(model, Quantization(spec), make, treat, example, past))


def _round_by_gptq(quantized: nn.Module, spec: QuantSpec, batches: list):
    def round_layer(layer: QuantizedLinear, hessian: Tensor):
        layer.rounded.copy_(gptq_weight(layer.rounded, hessian, spec.weights, spec.granularity, spec.block))

    rounding = rounding_layers(quantized).items()
    layers: dict[nn.Module, str] = {layer: name for layer, name in rounding if isinstance(layer, QuantizedLinear)}
    round_in_order(quantized, layers, batches, round_layer)


class Rotation(nn.Module):
    """Block Hadamard rotation of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return hadamard_transform(x)


def _rotated(quantizer: nn.Module | None, rotate: bool) -> nn.Module | None:
    if not rotate:
        return quantizer
    return Rotation() if quantizer is None else nn.Sequential(Rotation(), quantizer)


def _round_matrices(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Rounds (..., out, in), every matrix as a tensor of its own."""
    weight = hadamard_transform(weight) if spec.rotate else weight
    matrices = weight.reshape(-1, *weight.shape[-2:])
    rounded = [quantize_tensor(matrix, spec.weights, spec.granularity, spec.block) for matrix in matrices]
    return torch.stack(rounded).view(weight.shape)


def _as_buffer(module: nn.Module, name: str, value: Tensor):
    del module._parameters[name]
    module.register_buffer(name, value.detach().contiguous().clone())


def _attach(module: nn.Module, rounding: Rounding):
    module.operand_rounding = rounding  # where `own_rounding` finds it
    rounding.attach(module)


@plain_settings()
def prepare_qat(
    model: nn.Module, spec: QuantSpec, scheme: str = "quest", strict: bool = False, example=None
) -> nn.Module:
    """A copy of `model` whose linear layers are `QATLinear` and train through `scheme`'s quantizers (see `qat`).

    Weights are parameters of the same names as in `model`, so that a state_dict of one loads into the other (LSQ adds
    vectors named log_step; Conv1D's are transposed, MultiheadAttention's load but are not handed back); parametrized
    layers train what they are computed from. A tied head stays tied, and without `spec.head` stays in full precision.
    LSQ's activation steps start from the first batch: run one forward pass before compiling or building an optimizer
    state. LSQ leaves fused experts and routers alone: it has one step a layer.
    strict, example, and what is reported of the weights left alone: as in `quantize_model`.
    Raises ValueError for an unknown scheme, formats or granularities that it does not have, and as `quantize_model`.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; valid: {', '.join(SCHEMES)}")
    if spec.method != "rtn":
        raise ValueError(f"training rounds weights anew at every step, not by method {spec.method!r}; valid: 'rtn'")
    prepared = trainable_structure(model, spec, scheme, example)
    record_of(prepared).report(strict)
    return prepared


def trainable_structure(
    model: nn.Module, spec: QuantSpec, scheme: str, example=None, past: Collection[str] = ()
) -> nn.Module:
    """`prepare_qat` without its reports."""
    rotate = scheme == "quest" or spec.rotate

    def make(linear: nn.Linear) -> QATLinear:
        spec.check_width(linear.in_features)
        parametrized = nn.utils.parametrize.is_parametrized(linear)
        return (ParametrizedQATLinear if parametrized else QATLinear)(linear, spec, scheme)

    def treat(module: nn.Module, sums: dict[str, int]):
        for name, dim in sums.items():
            spec.check_width(module.get_parameter(name).shape[dim])
        parts = (make_quantizer(scheme, format, spec) for format in (spec.activations, spec.weights))
        _attach(module, Rounding(sums, *(_rotated(part, rotate) for part in parts)))

    record = Quantization(spec, "qat", scheme)
    return _converted(model, record, make, None if scheme == "lsq" else treat, example, past)


@contextmanager
def weights_held(model: nn.Module) -> Iterator[None]:
    """Rounds the weights of a `prepare_qat` model once for all forward passes inside: the micro-batches of one step.

    Gradients reach the weights in every pass, through the same trust mask. Outside, every forward pass rounds anew, so
    that nothing can go stale. Raises RuntimeError at the end if a weight was changed inside (step the optimizer after).
    """
    layers = [module for module in every_module(model) if isinstance(module, QATLinear)]
    weights = [parameter for layer in layers for parameter in layer.parameters()]
    versions = [weight._version for weight in weights]
    try:
        for layer in layers:
            layer.hold()
        yield
    finally:
        for layer in layers:
            layer.held = None
    if versions != [weight._version for weight in weights]:
        raise RuntimeError("weights changed while their rounded values were held: step the optimizer outside")


@plain_settings()
def freeze_qat(model: nn.Module) -> nn.Module:
    """A copy of a `prepare_qat` model for inference and measurement: `QuantizedLinear` layers, weights rounded once."""
    model = copy.deepcopy(model)
    made: dict[nn.Module, nn.Module] = {}
    for module in rounding_layers(model):
        training = module.training
        if isinstance(module, QATLinear):
            module.eval()
            frozen = QuantizedLinear(module.rounded_weight(), module.bias, module.activation_quantizer, module.rotation)
            made[module] = frozen.train(training)
            take_hooks(module, made[module])
        elif (rounding := own_rounding(module)) is not None and rounding.weight is not None:
            for name, dim in rounding.sums.items():
                _as_buffer(module, name, along(rounding.weight, module.get_parameter(name), dim))
            rounding.weight = None
    record = vars(model).get("quantization")
    model = substitute(model, made)
    if record is not None:
        record.stage = "frozen"
        model = with_record(model, record)
    return refuse_save_pretrained(model)
