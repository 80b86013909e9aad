"""Linear layers under quantization: rounded once (`QuantizedLinear`), or trained through quantizers (`QATLinear`)."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from beyond_outliers.modules import settled_weight
from beyond_outliers.quantizers.formats import QuantSpec
from beyond_outliers.quantizers.hadamard import hadamard_block, hadamard_transform
from beyond_outliers.quantizers.qat import make_quantizer


class QuantizedLinear(nn.Module):
    """y = Q(x R) (W R)_rounded^T + b: a linear layer of a weight rounded once and of inputs rounded as they come.

    rounded: (out, in), in the basis of the rotation R where `rotation` (its Hadamard block size) is not None.
    activation_quantizer: module from (..., in) to the same shape, None to leave inputs alone.
    """

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


class QATLinear(nn.Linear):
    """A linear layer that trains its full-precision `weight` (out, in) through quantizers of weight and input.

    rotation: size of the Hadamard blocks in which both are rounded, None for none; no rotation back is needed, since
    (x H)(W H)^T = x W^T. Inside `weights_held` the rounded weight is taken from `held`.
    """

    rounds_operands = True  # no plain linear layer, although it is one by class

    def __init__(self, linear: nn.Linear, spec: QuantSpec, scheme: str):
        nn.Module.__init__(self)  # takes over the parameters of `linear`, ties included, instead of making new ones
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._take_over(linear)
        self.rotation = hadamard_block(self.in_features) if scheme == "quest" or spec.rotate else None
        rotated = self._rotate(settled_weight(linear))
        self.weight_quantizer = make_quantizer(scheme, spec.weights, spec, rotated)
        self.activation_quantizer = make_quantizer(scheme, spec.activations, spec)
        if self.activation_quantizer is not None:
            self.activation_quantizer.to(rotated.device)
        self.held: tuple[Tensor, Tensor | None] | None = None

    def _take_over(self, linear: nn.Linear):
        self.weight, self.bias = linear.weight, linear.bias

    def _rotate(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else hadamard_transform(x, self.rotation)

    def rounded_weight(self) -> Tensor:
        """What the input is multiplied by, (out, in), in the rotated basis where there is a rotation."""
        weight = self._rotate(self.weight)
        return weight if self.weight_quantizer is None else self.weight_quantizer(weight, self.held)

    def hold(self):
        if self.weight_quantizer is not None:
            self.held = self.weight_quantizer.round(self._rotate(self.weight.detach()))

    def forward(self, input: Tensor) -> Tensor:
        x = self._rotate(input)
        if self.activation_quantizer is not None:
            x = self.activation_quantizer(x)
        return F.linear(x, self.rounded_weight(), self.bias)


class ParametrizedQATLinear(QATLinear):
    """A `QATLinear` whose weight, bias or both are computed by torch.nn.utils.parametrize: it trains their originals.

    The parameters keep their names. Nothing is held: the parametrization may change the weight from pass to pass.
    """

    parametrizations: nn.ModuleDict

    def _take_over(self, linear: nn.Linear):
        self.parametrizations = cast(nn.ModuleDict, linear.parametrizations)
        for name in ("weight", "bias"):
            if name not in self.parametrizations:
                self._parameters[name] = linear._parameters[
                    name
                ]  # a property of this name is in register_parameter's way

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # torch's parametrize makes a property of it as well
        return cast(Tensor, self._current("weight"))

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]  # as above; None where torch's annotation forgets it
        return self._current("bias")

    def _current(self, name: str) -> Tensor | None:
        return self.parametrizations[name]() if name in self.parametrizations else self._parameters[name]

    def hold(self):
        pass
