"""Models under quantization: after training (`quantize_model`) and during it (`prepare_qat`).

The grids live in `grids`, the rotation in `hadamard`, GPTQ in `gptq`, the trainable quantizers in `qat`; every public
name of theirs can be imported from here. Paper: arXiv 2509.23500, section 3: weights rounded once, activations as they
come.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond_outliers.gptq import gptq_weight as gptq_weight
from beyond_outliers.gptq import round_in_order
from beyond_outliers.grids import GRIDS as GRIDS
from beyond_outliers.grids import QuantSpec
from beyond_outliers.grids import quantize_tensor as quantize_tensor
from beyond_outliers.hadamard import hadamard_block
from beyond_outliers.hadamard import hadamard_transform as hadamard_transform
from beyond_outliers.qat import SCHEMES, AbsMaxQuantizer, QATLinear
from beyond_outliers.qat import LSQQuantizer as LSQQuantizer
from beyond_outliers.qat import QuestQuantizer as QuestQuantizer
from beyond_outliers.qat import optimal_gaussian_scale as optimal_gaussian_scale
from beyond_outliers.qat import staircase as staircase


class QuantizedLinear(nn.Module):
    """y = Q(x R) (W R)_rounded^T + b: a linear layer of a weight rounded once and of inputs rounded as they come.

    rounded: (out, in), in the basis of the rotation R where `rotation` (its Hadamard block size) is not None.
    activation_quantizer: module from (..., in) to the same shape, None to leave inputs alone.
    """

    def __init__(
        self, rounded: Tensor, bias: Tensor | None, activation_quantizer: nn.Module | None, rotation: int | None
    ):
        super().__init__()
        self.out_features, self.in_features = rounded.shape
        self.rotation, self.activation_quantizer = rotation, activation_quantizer
        self.register_buffer("rounded", rounded.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, rotation={self.rotation}"

    @property
    def weight(self) -> Tensor:
        """The weight that acts on unrotated inputs, W + E of shape (out, in)."""
        return self.rounded if self.rotation is None else hadamard_transform(self.rounded, self.rotation)

    def operand(self, x: Tensor) -> Tensor:
        """What the rounded weight multiplies: the input (..., in), rotated and rounded."""
        if self.rotation is not None:
            x = hadamard_transform(x, self.rotation)
        return x if self.activation_quantizer is None else self.activation_quantizer(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.operand(x), self.rounded, self.bias)


def find_head(model: nn.Module) -> str | None:
    """Name of the output head: the linear layer that shares an embedding's weight, else the last one named head or
    lm_head; None without either."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    tied = [name for name, module in linears if id(module.weight) in tables]
    named = [name for name, _ in linears if name.rpartition(".")[2] in ("head", "lm_head")]
    return (tied or named[-1:] or [None])[0]


def _replace_linears(model: nn.Module, head: bool, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A deep copy of `model`, every linear layer replaced in place of its name; the head only where asked for."""
    if any(isinstance(module, (QuantizedLinear, QATLinear)) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is quantized already; valid: a full-precision model")
    model = copy.deepcopy(model)
    kept = None if head else find_head(model)
    made: dict[nn.Module, nn.Module] = {}  # a layer that is used under two names stays one layer
    for name, module in list(model.named_modules(remove_duplicate=False)):
        # torch's attention reads its out_proj's weight without calling it: activations could not be rounded there
        if not isinstance(module, nn.Linear) or type(module).__name__ == "NonDynamicallyQuantizableLinear":
            continue
        if name == kept or (kept and module is model.get_submodule(kept)):
            continue
        if module not in made:
            try:
                made[module] = make(module).train(module.training)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        if not name:
            return made[module]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[module])
    if not made:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantize beside its head")
    return model


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

    quantized = _replace_linears(model, spec.head, make)
    if calibration is not None:
        layers = {module: name for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
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

    return _replace_linears(model, spec.head, make)


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
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, frozen.train(layer.training))
    return model
