"""Quantization-aware training: quantizers that round forward and let a gradient through backward.

quest  QuEST, arXiv 2502.05003: Hadamard rotation, the grid of least squared error for a Gaussian of the row's RMS,
       gradients only where rounding moved an entry by at most half a step (the "trust" mask)
ste    straight-through AbsMax on any format of `formats`: every gradient passes, arXiv 1308.3432
lsq    learned step sizes, arXiv 1902.08153: gradients pass inside the grid, the step has a gradient of its own
"""

import math
import re
from functools import lru_cache

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond_outliers.config.parsing import choose
from beyond_outliers.config.run import SCHEMES
from beyond_outliers.passes import keeps_tensors
from beyond_outliers.quantizers.formats import quantize_tensor
from beyond_outliers.quantizers.hadamard import hadamard_block, hadamard_transform
from beyond_outliers.quantizers.spec import QuantSpec


@lru_cache
def optimal_gaussian_scale(bits: int) -> float:
    """Largest level c of the grid of 2^bits evenly spaced levels from -c to c that rounds N(0, 1) with least error.

    E (x - q(x))^2 = 1 + E q^2 - 2 E x q, interval by interval in closed form. At 4 bits it is 2.51400
    (the reference implementation has 2.51393; the error there is larger by less than 1e-9).
    """
    import numpy as np
    from scipy.optimize import minimize_scalar
    from scipy.stats import norm

    unit = np.linspace(-1, 1, 2**bits)
    edges = np.concatenate([[-np.inf], (unit[1:] + unit[:-1]) / 2, [np.inf]])

    def error(c: float) -> float:
        mass, moment = np.diff(norm.cdf(c * edges)), -np.diff(norm.pdf(c * edges))
        return 1 + np.sum((c * unit) ** 2 * mass) - 2 * np.sum(c * unit * moment)

    return float(minimize_scalar(error, bounds=(0.1, 8.0), method="bounded", options={"xatol": 1e-10}).x)


class _StraightThrough(torch.autograd.Function):
    """Forward the rounded tensor in place of x; backward the gradient times `mask` (uint8), or all of it."""

    generate_vmap_rule = True  # with `setup_context`, what torch.func asks for; a jvp would be in the compiler's way

    @staticmethod
    def forward(x: Tensor, rounded: Tensor, mask: Tensor | None) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad: Tensor):
        (mask,) = ctx.saved_tensors
        return (grad if mask is None else grad * mask), None, None


class QuestQuantizer(nn.Module):
    """`QuestQuantizer(bits, hadamard=True)(x)`: x (..., width) rotated, rounded row by row, and rotated back.

    The grid is mid-rise (no zero): 2^bits levels at odd multiples of half a step, step = 2 c rms(row) / (2^bits - 1)
    with c the optimal Gaussian scale; a row of zeros stays zero. An entry is trusted, and its gradient kept, where
    rounding moved it by at most half a step: everywhere inside the grid and half a step beyond its ends. No gradient
    goes through the RMS. Without `hadamard` the rotations are left out: inside a linear layer the product of two
    rotated operands needs none back. Raises ValueError for bits outside 1 .. 8.
    """

    def __init__(self, bits: int = 4, hadamard: bool = True):
        super().__init__()
        choose("number of bits", bits, BITS)
        self.bits, self.hadamard = bits, hadamard
        self.step_over_rms = 2 * optimal_gaussian_scale(bits) / (2**bits - 1)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, hadamard={self.hadamard}"

    @torch.no_grad()
    def round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rounded x, in the basis that it comes in, and the trust mask (uint8, 1 where trusted)."""
        wide = x if x.dtype == torch.float64 else x.float()
        step = wide.square().mean(-1, keepdim=True).sqrt() * self.step_over_rms
        scaled = wide * torch.where(step == 0, 0.0, 1 / step)
        half = 2.0 ** (self.bits - 1)
        rounded = scaled.floor().add_(0.5).clamp(0.5 - half, half - 0.5).mul_(step)
        trusted = scaled.abs_() <= half
        if torch.compiler.is_compiling():  # by way of floats: on CPUs booleans alone took ten times as long as the rest
            return rounded.to(x.dtype), trusted.to(wide.dtype).to(torch.uint8)
        return rounded.to(x.dtype), trusted.view(torch.uint8)

    def forward(self, x: Tensor, held: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """`held`: what `round` gave for this x before, to be used again."""
        rotated = hadamard_transform(x) if self.hadamard else x
        rounded = _StraightThrough.apply(rotated, *(held or self.round(rotated)))
        return hadamard_transform(rounded) if self.hadamard else rounded


class AbsMaxQuantizer(nn.Module):
    """`quantize_tensor` with a gradient: straight through, everywhere."""

    def __init__(self, format: str = "int4", granularity: str = "row", block: int | None = None):
        super().__init__()
        self.format, self.granularity, self.block = format, granularity, block

    def extra_repr(self) -> str:
        return f"{self.format!r}, {self.granularity!r}" + (f", block={self.block}" if self.block else "")

    @torch.no_grad()
    def round(self, x: Tensor) -> tuple[Tensor, None]:
        return quantize_tensor(x, self.format, self.granularity, self.block), None

    def forward(self, x: Tensor, held: tuple[Tensor, None] | None = None) -> Tensor:
        return _StraightThrough.apply(x, *(held or self.round(x)))


class LSQQuantizer(nn.Module):
    """Levels -2^(bits-1) .. 2^(bits-1) - 1 times one learned step a tensor, as published (one a layer).

    The step starts at 2 mean|x| / sqrt(2^(bits-1) - 1) of the first tensor seen, and its gradient is scaled by
    1 / sqrt(n (2^(bits-1) - 1)), n the entries of a weight or the features of an activation. It is kept as its
    logarithm, which stays positive and moves by a share of itself at every learning rate (weights' steps are about
    0.01: a vector's learning rate of 3e-3 would overshoot them at once); this differs from the paper.
    """

    def __init__(self, bits: int = 4, initial: Tensor | None = None):
        super().__init__()
        choose("number of bits", bits, BITS[1:])
        self.bits, self.lowest, self.highest = bits, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
        self.is_weight, device = initial is not None, "cpu" if initial is None else initial.device
        self.log_step = nn.Parameter(torch.full((1,), torch.nan, dtype=torch.float32, device=device))
        self.started = False
        self.register_load_state_dict_post_hook(_notice_step)
        if initial is not None:
            self._start(initial)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    @property
    def step(self) -> Tensor:
        return self.log_step.exp()

    @torch.no_grad()
    def _start(self, x: Tensor):
        if not keeps_tensors() or not isinstance(self.log_step, nn.Parameter):
            raise RuntimeError(
                "LSQ's step of the activations starts from the first batch, which a traced or functional program has "
                "not got; valid: one forward pass before torch.export, torch.func or fake tensors"
            )
        mean = x.abs().mean(dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        # in place: the parameter stays what optimizers and graphs hold, and no inference tensor gets into it
        self.log_step.copy_((2 * mean / math.sqrt(self.highest)).log().reshape(1))
        self.started = True

    def forward(self, x: Tensor, held: None = None) -> Tensor:
        if not self.started:
            self._start(x)
        entries = x.numel() if self.is_weight else x.shape[-1]
        share = 1 / math.sqrt(entries * self.highest)
        wide = x if x.dtype == torch.float64 else x.float()  # a small step is 0 in half precision
        step = self.step.to(wide.dtype)
        step = step.detach() + share * (step - step.detach())  # the value of the step, `share` of its gradient
        inside = (wide / step).clamp(self.lowest, self.highest)
        return ((inside + (inside.round() - inside).detach()) * step).to(x.dtype)

    def round(self, x: Tensor) -> None:
        """Nothing to hold: the step's own gradient needs the unrounded entries."""


def _notice_step(quantizer: LSQQuantizer, _keys):
    quantizer.started = not bool(quantizer.log_step.isnan())


BITS = tuple(range(1, 9))
Quantizer = QuestQuantizer | AbsMaxQuantizer | LSQQuantizer


def make_quantizer(scheme: str, format: str, spec: QuantSpec, weight: Tensor | None = None) -> Quantizer | None:
    """Quantizer of a layer's `weight` (given) or activations on `format`, None for "none"; the caller rotates."""
    choose("scheme", scheme, SCHEMES)
    if format == "none":
        return None
    if scheme == "ste":
        return AbsMaxQuantizer(format, spec.granularity, spec.block)
    if re.fullmatch(r"int\d", format) is None:
        raise ValueError(f"scheme {scheme!r} cannot train on the format {format!r}; valid: int2 .. int8, none")
    if spec.granularity != "row":
        raise ValueError(f"scheme {scheme!r} sets its own granularity; valid: 'row', not {spec.granularity!r}")
    bits = int(format.removeprefix("int"))
    return QuestQuantizer(bits, hadamard=False) if scheme == "quest" else LSQQuantizer(bits, weight)


# --------------------------------------------------------------------------------------------------------- a layer


class QATLinear(nn.Linear):
    """A linear layer that trains its full-precision `weight` (out, in) through quantizers of weight and input.

    rotation: size of the Hadamard blocks in which both are rounded, None for none; no rotation back is needed, since
    (x H)(W H)^T = x W^T. Inside `weights_held` the rounded weight is taken from `held`.
    """

    rounds_operands = True  # no plain linear layer, although it is one by class

    def __init__(self, linear: nn.Linear, spec: QuantSpec, scheme: str):
        nn.Module.__init__(self)  # takes over the parameters of `linear`, ties included, instead of making new ones
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rotation = hadamard_block(self.in_features) if scheme == "quest" or spec.rotate else None
        rotated = self._rotate(self.weight.detach())
        self.weight_quantizer = make_quantizer(scheme, spec.weights, spec, rotated)
        self.activation_quantizer = make_quantizer(scheme, spec.activations, spec)
        if self.activation_quantizer is not None:
            self.activation_quantizer.to(rotated.device)
        self.held: tuple[Tensor, Tensor | None] | None = None

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


# ------------------------------------------------------------------------------------------------------- a picture


def staircase(scheme: str, bits: int = 4, n: int = 4001) -> pd.DataFrame:
    """Forward value and gradient of a scheme's quantizer on one row: the `n` standard normal quantiles, in order.

    Columns x, y (the rounded x) and gradient (dy/dx as training sees it, 0 where masked); QuEST in its rotated basis.
    """
    from scipy.stats import norm

    row = torch.from_numpy(norm.ppf((torch.arange(n, dtype=torch.float64).numpy() + 0.5) / n)).requires_grad_()
    quantizer = make_quantizer(scheme, f"int{bits}", QuantSpec())
    assert quantizer is not None, "integer formats have one"
    y = quantizer.double()(row)
    (gradient,) = torch.autograd.grad(y.sum(), row)
    return pd.DataFrame({"x": row.detach().numpy(), "y": y.detach().numpy(), "gradient": gradient.numpy()})
