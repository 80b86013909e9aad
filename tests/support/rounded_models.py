"""Small models, and a stand-in for quantization that is not this project's own."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from beyond_outliers.model import Olmo2, Olmo2Config


def rounded(x, levels=7):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / levels
    return (x / scale).round() * scale


class RoundedLinear(nn.Module):
    """Stands in for a quantized linear layer: absmax rows, 4 bits, activations optional."""

    def __init__(self, linear, activations):
        super().__init__()
        self.weight = nn.Parameter(rounded(linear.weight.detach()))
        self.bias, self.activations = linear.bias, activations

    def forward(self, x):
        return F.linear(rounded(x) if self.activations else x, self.weight, self.bias)


def quantize(model, activations=True, skip=()):
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in skip:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, RoundedLinear(module, activations))
    return model


def olmo(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return Olmo2(Olmo2Config(vocab_size=200, width=16, depth=2, n_heads=2, n_kv_heads=1, **changes)).to(dtype)


def ids(*shape, seed=0):
    return torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(seed))


def squared_error(model, quantized, x, answer="logits", **options):
    """||dh||^2 / ||h||^2 over all of x, of what the models give, or of this part of it."""
    with torch.no_grad():
        h, hq = ((getattr(y, answer) if answer else y).double() for y in (model(x, **options), quantized(x, **options)))
    return float((hq - h).square().sum() / h.square().sum())
