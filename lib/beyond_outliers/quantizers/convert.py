"""Models under quantization: after training (`quantize_model`) and during it (`prepare_qat`).

Paper: arXiv 2509.23500, section 3: weights rounded once, activations as they come.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from beyond_outliers.modules import replace_linears
from beyond_outliers.quantizers.formats import QuantSpec, quantize_tensor
from beyond_outliers.quantizers.gptq import gptq_weight, round_in_order
from beyond_outliers.quantizers.hadamard import hadamard_block, hadamard_transform
from beyond_outliers.quantizers.layers import QATLinear, QuantizedLinear
from beyond_outliers.quantizers.trainable import SCHEMES, AbsMaxQuantizer


def _converted(model: nn.Module, spec: QuantSpec, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy of a full-precision model, its linear layers replaced; ValueError for one that is quantized already."""
    if any(isinstance(module, (QuantizedLinear, QATLinear)) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is quantized already; valid: a full-precision model")
    return replace_linears(model, spec.head, make)


def quantize_model(model: nn.Module, spec: QuantSpec, calibration=None) -> nn.Module:
    """Post-training quantization: a copy of `model` whose linear layers are `QuantizedLinear`; `model` stays as it is.

    Works on any tree of nn.Linear. With `spec.head` the head is rounded too; where it is tied, the copy's embedding
    keeps the unrounded table. With `spec.rotate` every layer rounds in its rotated basis.

    With method "gptq" weights are rounded one layer after the other, in the order in which they run, each against the
    inputs that it gets from the rounded layers before it, rotated and rounded as at inference (see `gptq`).
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

    def make(linear: nn.Linear) -> QuantizedLinear:
        spec.check_width(linear.in_features)
        rotation = hadamard_block(linear.in_features) if spec.rotate else None
        weight = linear.weight.detach()
        weight = weight if rotation is None else hadamard_transform(weight, rotation)
        if calibration is None:
            weight = quantize_tensor(weight, spec.weights, spec.granularity, spec.block)
        rounds = AbsMaxQuantizer(spec.activations, spec.granularity, spec.block)
        return QuantizedLinear(weight, linear.bias, None if spec.activations == "none" else rounds, rotation)

    def round_layer(layer: QuantizedLinear, hessian: Tensor):
        layer.rounded.copy_(gptq_weight(layer.rounded, hessian, spec.weights, spec.granularity, spec.block))

    quantized = _converted(model, spec, make)
    if calibration is not None:
        modules = quantized.named_modules()
        layers: dict[nn.Module, str] = {m: name for name, m in modules if isinstance(m, QuantizedLinear)}
        round_in_order(quantized, layers, calibration, round_layer)
    return quantized


def prepare_qat(model: nn.Module, spec: QuantSpec, scheme: str = "quest") -> nn.Module:
    """A copy of `model` whose linear layers are `QATLinear` and train through `scheme`'s quantizers (see `qat`).

    Weights are parameters of the same names as in `model`, so that a state_dict of one loads into the other (LSQ adds
    vectors named log_step); a tied head stays tied, and without `spec.head` stays in full precision. LSQ's activation
    steps start from the first batch: run one forward pass before compiling or building an optimizer state.
    Raises ValueError for an unknown scheme, for grids or granularities that it does not have, and as `quantize_model`.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; valid: {', '.join(SCHEMES)}")
    if spec.method != "rtn":
        raise ValueError(f"training rounds weights anew at every step, not by method {spec.method!r}; valid: 'rtn'")

    def make(linear: nn.Linear) -> QATLinear:
        spec.check_width(linear.in_features)
        return QATLinear(linear, spec, scheme)

    return _converted(model, spec, make)


@contextmanager
def weights_held(model: nn.Module) -> Iterator[None]:
    """Rounds the weights of a `prepare_qat` model once for all forward passes inside: the micro-batches of one step.

    Gradients reach the weights in every pass, through the same trust mask. Outside, every forward pass rounds anew, so
    that nothing can go stale. Raises RuntimeError at the end if a weight was changed inside (step the optimizer after).
    """
    layers = [module for module in model.modules() if isinstance(module, QATLinear)]
    versions = [layer.weight._version for layer in layers]
    try:
        for layer in layers:
            layer.hold()
        yield
    finally:
        for layer in layers:
            layer.held = None
    if versions != [layer.weight._version for layer in layers]:
        raise RuntimeError("weights changed while their rounded values were held: step the optimizer outside")


@torch.no_grad()
def freeze_qat(model: nn.Module) -> nn.Module:
    """A copy of a `prepare_qat` model for inference and measurement: `QuantizedLinear` layers, weights rounded once."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, QATLinear):
            frozen = QuantizedLinear(layer.rounded_weight(), layer.bias, layer.activation_quantizer, layer.rotation)
            if not name:
                return frozen.train(layer.training)
            model.set_submodule(name, frozen.train(layer.training))
    return model
