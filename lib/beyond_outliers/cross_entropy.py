"""Cross-entropy of a bias-free linear head without ever holding all logits.

At small widths the loss over the vocabulary is most of a training step, and nearly all of that is memory traffic: the
full logits are written and read half a dozen times. Here a slice of tokens small enough for the cache goes from
hidden states to gradients before the next slice starts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE = 512  # tokens; measured best of 128 .. 1024 at vocabularies 512 and 2048


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed in the forward pass, where the slice's probabilities are at hand."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # (N, D), (V, D), (N,)
        n = hidden.shape[0]
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, n, SLICE):
            h, t = hidden[start : start + SLICE], targets[start : start + SLICE, None]
            z = h @ weight.T
            z -= z.amax(1, keepdim=True)
            chosen = z.gather(1, t)
            z.exp_()
            mass = z.sum(1, keepdim=True)
            total += (mass.log() - chosen).sum()
            z /= n * mass  # probabilities / n; minus the one-hot target / n it is the gradient of the logits
            z.scatter_add_(1, t, torch.full_like(chosen, -1 / n))
            torch.mm(z, weight, out=hidden_grad[start : start + SLICE])
            weight_grad.addmm_(z.T, h)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return (total / n).to(hidden.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grad, weight_grad * grad, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of logits hidden @ weight.T, as F.cross_entropy gives it, gradients included.

    hidden (..., D) and weight (V, D) floating, targets (...) int64. On CUDA, under autocast, compiled, or without
    gradients it is the plain two-step computation: there the slices would cost more than they save.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    sliced = hidden.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if sliced and not torch.compiler.is_compiling():
        return _LinearCrossEntropy.apply(hidden, weight, targets)
    return cross_entropy(F.linear(hidden, weight), targets)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """F.cross_entropy (nats) of logits (..., V) and targets (...), in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)
