"""Which layers of a model that is not ours are linear layers, and which of these can be replaced."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMPLEX = "complex numbers"
UNCALLED = "parent reads .weight without calling the layer"
QUANTIZED = "already quantized"
OWN_FORWARD = "subclass with its own forward"


def overrides_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether `module`'s forward is another than `base`'s: a subclass's, or one set on the module itself."""
    return type(module).forward is not base.forward or "forward" in vars(module)


@torch.no_grad()
def computes_linear(linear: nn.Linear) -> bool:
    """Whether calling `linear` is x W^T + b and no more: its class inherits nn.Linear's forward, or gives the same.

    A forward of its own is tried on a few rows, in both modes, and only for layers that hold weight and bias alone.
    """
    if not overrides_forward(linear, nn.Linear):
        return True
    if linear.state_dict().keys() - {"weight", "bias"} or linear.weight.device.type == "meta":
        return False
    training, weight = linear.training, linear.weight
    rows = torch.arange(2 * 2 * linear.in_features, dtype=torch.float32, device=weight.device).add(1).sin()
    rows = (rows.reshape(2, 2, -1) * torch.tensor([[[1], [100]]], device=weight.device)).to(weight.dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            for linear.training in (True, False):
                expected, y = F.linear(rows, weight, linear.bias), linear.forward(rows.clone())
                torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    except Exception:  # it gives something else, or asks of its input what these rows are not
        return False
    finally:
        linear.training = training
    return True


def why_not_replaced(module: nn.Module) -> str | None:
    """None for a layer that conversion can replace; otherwise why not, "" for what is no linear layer."""
    if not isinstance(module, nn.Linear) or getattr(module, "rounds_operands", False):
        return ""
    if isinstance(module._parameters.get("weight"), nn.parameter.UninitializedParameter):
        raise ValueError(f"{type(module).__name__} has no weight yet; valid: a model that ran once")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return UNCALLED  # the projection of torch's attention
    stored = module._parameters.get("weight", module._buffers.get("weight"))
    if stored is None:
        if not nn.utils.parametrize.is_parametrized(module, "weight"):
            return "weight computed by a hook"
    elif stored.is_complex():
        return COMPLEX
    elif not stored.is_floating_point() or stored.element_size() < 2 or type(stored.data) is not Tensor:
        return QUANTIZED
    return None if computes_linear(module) else OWN_FORWARD


def is_plain(module: nn.Module) -> bool:
    """Whether a module is of torch or of this project: none of these reads a layer's weight without calling it."""
    return type(module).__module__.startswith(("torch.nn.", "beyond_outliers."))
