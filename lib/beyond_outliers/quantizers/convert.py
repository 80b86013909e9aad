"""Models under quantization: after training (`quantize_model`) and during it (`prepare_qat`).

Paper: arXiv 2509.23500, section 3: weights rounded once, activations as they come. Models of nn.Linear, embeddings,
norms and this project's blocks are converted here, all others by `anymodel.convert`.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from beyond_outliers.config.parsing import choose
from beyond_outliers.modules import as_batches, check_registered, find_head, substitute
from beyond_outliers.passes import plain_settings
from beyond_outliers.quantizers.formats import quantize_tensor
from beyond_outliers.quantizers.gptq import gptq_weight, round_in_order
from beyond_outliers.quantizers.hadamard import hadamard_block, hadamard_transform
from beyond_outliers.quantizers.qat import SCHEMES, AbsMaxQuantizer, QATLinear
from beyond_outliers.quantizers.record import HEAD, Quantization, Weight, record_of, rounding_layers
from beyond_outliers.quantizers.spec import QuantSpec


class QuantizedLinear(nn.Module):
    """y = Q(x R) (W R)_rounded^T + b: a linear layer of a weight rounded once and of inputs rounded as they come.

    rounded: (out, in), in the basis of the rotation R where `rotation` (its Hadamard block size) is not None.
    activation_quantizer: module from (..., in) to the same shape, None to leave inputs alone.
    """

    rounds_operands = True
    rounded: Tensor
    bias: Tensor | None

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

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's name of it, which callers may use
        return F.linear(self.operand(input), self.rounded, self.bias)


# ------------------------------------------------------------------------------------------------------- conversion

_SIMPLE = (nn.Linear, nn.Embedding, nn.Sequential, nn.ModuleList, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity)
_SIMPLE += (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh)  # type: ignore[assignment]  # a longer tuple of the same


def _is_simple(model: nn.Module) -> bool:
    """Whether layers are called, and weights are in them: nothing that `anymodel` would have to find out."""
    ours = "beyond_outliers.model."
    return all(
        (type(module) in _SIMPLE or type(module).__module__.startswith(ours))
        and "forward" not in vars(module)
        and not (type(module) is nn.Linear and "weight" not in module._parameters)
        for module in model.modules()
    ) and all(type(p.data) is Tensor and p.is_floating_point() and p.element_size() > 1 for p in model.parameters())


def activation_quantizer(spec: QuantSpec) -> AbsMaxQuantizer | None:
    return None if spec.activations == "none" else AbsMaxQuantizer(spec.activations, spec.granularity, spec.block)


def converted_linear(linear: nn.Linear, record: Quantization, round_weights: bool) -> nn.Module:
    """What stands for a linear layer; its weight stays as it is unless `round_weights`."""
    spec = record.spec
    spec.check_width(linear.in_features)
    if record.scheme is not None:
        return QATLinear(linear, spec, record.scheme)
    rotation = hadamard_block(linear.in_features) if spec.rotate else None
    weight = linear.weight.detach()
    weight = weight if rotation is None else hadamard_transform(weight, rotation)
    if round_weights:
        weight = quantize_tensor(weight, spec.weights, spec.granularity, spec.block)
    return QuantizedLinear(weight, linear.bias, activation_quantizer(spec), rotation)


def converted(
    model: nn.Module, record: Quantization, round_weights: bool = True, example=None, past: Collection[str] = ()
) -> nn.Module:
    """A copy of a full-precision model with `record` on it, its linear layers rounded or, with a scheme, trainable.

    past: names of weights to leave alone because they are read past their layers.
    """
    if rounding_layers(model):
        raise ValueError(f"{type(model).__name__} is quantized already; valid: a full-precision model")
    check_registered(model)
    head = find_head(model)
    if past or not _is_simple(model) or (record.spec.head and head is None):
        from beyond_outliers.anymodel.convert import converted as of_any_model

        return of_any_model(model, record, round_weights, example, past)
    copied = copy.deepcopy(model)
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in copied.named_modules():
        if isinstance(layer, nn.Linear):
            rounded = name != head or record.spec.head
            record.weights.append(Weight(name, "linear", layer.weight.numel(), rounded, "" if rounded else HEAD))
            if rounded:
                try:
                    made[layer] = converted_linear(layer, record, round_weights).train(layer.training)
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error
    if not made:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantize beside its head")
    copied = substitute(copied, made)
    vars(copied)["quantization"] = record
    return copied


@plain_settings()
def quantize_model(
    model: nn.Module, spec: QuantSpec, calibration=None, strict: bool = False, example=None
) -> nn.Module:
    """Post-training quantization: a copy of `model` whose linear layers are `QuantizedLinear`; `model` stays as it is.

    Works on any tree of modules. Rounded are nn.Linear (with hooks, parametrizations too), GPT-2's
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
    quantized = converted(model, Quantization(spec), batches is None, example)
    if batches is not None:

        def round_layer(layer: QuantizedLinear, hessian: Tensor):
            layer.rounded.copy_(gptq_weight(layer.rounded, hessian, spec.weights, spec.granularity, spec.block))

        layers: dict[nn.Module, str] = {
            layer: name for layer, name in rounding_layers(quantized).items() if isinstance(layer, QuantizedLinear)
        }
        round_in_order(quantized, layers, batches, round_layer)
    record_of(quantized).report(strict)
    return quantized


@plain_settings()
def prepare_qat(
    model: nn.Module, spec: QuantSpec, scheme: str = "quest", strict: bool = False, example=None
) -> nn.Module:
    """A copy of `model` whose linear layers are `QATLinear` and train through `scheme`'s quantizers (see `qat`).

    Weights are parameters of the same names as in `model`, so that a state_dict of one loads into the other (LSQ adds
    vectors named log_step; Conv1D's are transposed, MultiheadAttention's split into its projections). A tied head stays
    tied, and without `spec.head` stays in full precision.
    LSQ's activation steps start from the first batch: run one forward pass before compiling or building an optimizer
    state. LSQ leaves fused experts and routers alone: it has one step a layer.
    strict, example, and what is reported of the weights left alone: as in `quantize_model`.
    Raises ValueError for an unknown scheme, formats or granularities that it does not have, parametrized layers, and as
    `quantize_model`.
    """
    choose("scheme", scheme, SCHEMES)
    if spec.method != "rtn":
        raise ValueError(f"training rounds weights anew at every step, not by method {spec.method!r}; valid: 'rtn'")
    prepared = converted(model, Quantization(spec, "qat", scheme), example=example)
    record_of(prepared).report(strict)
    return prepared


@contextmanager
def weights_held(model: nn.Module) -> Iterator[None]:
    """Rounds the weights of a `prepare_qat` model once for all forward passes inside: the micro-batches of one step.

    Gradients reach the weights in every pass, through the same trust mask. Outside, every forward pass rounds anew, so
    that nothing can go stale. Raises RuntimeError at the end if a weight was changed inside (step the optimizer after).
    """
    layers = [module for module in model.modules() if isinstance(module, QATLinear)]
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
        if isinstance(module, QATLinear):
            training = module.training
            weight, bias = module.eval().rounded_weight(), module.bias
            made[module] = QuantizedLinear(weight, bias, module.activation_quantizer, module.rotation).train(training)
        elif not isinstance(module, QuantizedLinear):
            module.operand_rounding.freeze(module)  # type: ignore[operator,union-attr]  # a module of `anymodel`
    record: Quantization | None = vars(model).get("quantization")
    model = substitute(model, made)
    if record is not None:
        record.stage = "frozen"
        vars(model)["quantization"] = record
    if any(hasattr(module, "save_pretrained") for module in model.modules()):
        from beyond_outliers.anymodel.save import refuse_save_pretrained

        refuse_save_pretrained(model)
    return model
