"""Cross-entropy of a bias-free linear head without ever holding all logits.

At small widths the loss over the vocabulary is most of a training step, and nearly all of that is memory traffic: the
full logits are written and read half a dozen times. Here a slice of tokens small enough for the cache goes from
hidden states to gradients before the next slice starts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE = 512  # tokens; measured best of 128 .. 1024 at vocabularies 512 and 2048


IGNORED = -100  # a target that does not count, as in F.cross_entropy


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed in the forward pass, where the slice's probabilities are at hand.

    Whatever the dtype that comes in, slices and sums are at least float32: half precision has no numbers for 1 / n.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # (N, D), (V, D), (N,)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        w = weight.to(wide)
        hidden_grad, weight_grad = torch.empty_like(hidden, dtype=wide), torch.zeros_like(w)
        total = hidden.new_zeros((), dtype=torch.float64)
        n = len(targets)
        for start in range(0, len(targets), SLICE):
            h, t = hidden[start : start + SLICE].to(wide), targets[start : start + SLICE, None]
            z = h @ w.T
            z -= z.amax(1, keepdim=True)
            chosen = z.gather(1, t)
            z.exp_()
            mass = z.sum(1, keepdim=True)
            total += (mass.log() - chosen).sum()
            z /= n * mass  # probabilities / n; minus the one-hot target / n it is the gradient of the logits
            z.scatter_add_(1, t, torch.full_like(chosen, -1 / n))
            torch.mm(z, w, out=hidden_grad[start : start + SLICE])
            weight_grad.addmm_(z.T, h)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = hidden.dtype, weight.dtype
        return (total / n).to(wide)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled():  # under create_graph; once_differentiable would not notice a gradient of constants
            raise RuntimeError(
                "linear_cross_entropy has no second derivative (create_graph=True): its gradients were computed in the "
                "forward pass; valid: cross_entropy(F.linear(hidden, weight), targets)"
            )
        return *((saved * grad).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)), None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of logits hidden @ weight.T, as F.cross_entropy gives it, gradients included.

    hidden (..., D) and weight (V, D) floating, targets (...) int64. The loss is float32, or float64 of float64: half
    precision is widened inside. Targets of -100 do not count (all of them: NaN); others outside of 0 .. V - 1 are a
    ValueError that names the first. On CUDA, under autocast, compiled, or without gradients it is the plain two-step
    computation: there the slices would cost more than they save. So it is inside transforms of torch.func, and where
    some targets do not count. A second derivative of the sliced one is a RuntimeError.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    check_targets(targets, len(weight))
    sliced = hidden.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if sliced and not _is_traced() and bool((targets != IGNORED).all()):
        return _LinearCrossEntropy.apply(hidden, weight, targets)
    return cross_entropy(F.linear(hidden, weight), targets)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """F.cross_entropy (nats) of logits (..., V) and targets (...), in float32 at least; targets as above."""
    check_targets(targets, logits.shape[-1])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


def _is_traced() -> bool:
    """Whether a compiler or a transform of torch.func (grad, vmap, ...) is running."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def check_targets(targets: Tensor, entries: int):
    """ValueError naming the first target that is neither in 0 .. entries - 1 nor -100 (ignored).

    On CUDA, while compiling and inside transforms of torch.func nothing is looked at: a device would have to be waited
    for, whose kernel asserts the same, and a transform has no values to look at.
    """
    if _is_traced() or targets.device.type != "cpu" or not targets.numel():
        return
    outside = (targets != IGNORED) & ((targets < 0) | (targets >= entries))
    if bool(outside.any()):
        raise ValueError(f"target {int(targets[outside][0])}; valid: 0 to {entries - 1}, or {IGNORED} to leave it out")
