"""The sliced loss: half precision, targets that do not count, second derivatives; against float64 and PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from beyond_outliers.model.loss import SLICE, cross_entropy, linear_cross_entropy


def operands(n: int, width: int, entries: int, dtype: torch.dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, width).to(dtype), (torch.randn(entries, width) * 0.2).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(entries, (n,))


def exact(hidden, weight, targets):
    """Loss and gradients in float64, of the operands as they are."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(h @ w.T, targets)
    return loss.item(), *torch.autograd.grad(loss, (h, w))


def test_linear_cross_entropy_survives_huge_logits():
    hidden = torch.tensor([[1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2e4 and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1500, 32, 700), (40_000, 8, 32), (4, 8, 70_000)])
def test_half_precision_is_only_that_of_what_comes_in_and_goes_out(shape, dtype):
    """Float16 has no number for the 1 / n of many tokens, bfloat16 none for a loss to three digits."""
    hidden, weight, targets = operands(*shape, dtype)
    loss, hidden_grad, weight_grad = exact(hidden, weight, targets)
    ours = linear_cross_entropy(hidden, weight, targets)
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(loss, rel=2e-5)
    scale = 2.0**14  # a gradient in float16 needs one, as from a GradScaler: its smallest number is 6e-8
    (ours * scale).backward()
    for found, expected in ((hidden.grad, hidden_grad), (weight.grad, weight_grad)):
        assert found.dtype == dtype
        assert float((found.double() / scale - expected).norm() / expected.norm()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("n", [5, 2 * SLICE + 3])
def test_targets_of_minus_100_do_not_count(n):
    hidden, weight, targets = operands(n, 6, 11, torch.float64)
    targets[::3] = -100
    targets[: min(n - 1, SLICE)] = -100  # a whole slice of them
    loss, hidden_grad, weight_grad = exact(hidden, weight, targets)
    ours = linear_cross_entropy(hidden, weight, targets)
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(hidden.grad, hidden_grad)
    torch.testing.assert_close(weight.grad, weight_grad)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets).item() == pytest.approx(loss, rel=1e-12)
        assert torch.isnan(linear_cross_entropy(hidden, weight, torch.full_like(targets, -100)))
    assert torch.isnan(linear_cross_entropy(hidden, weight, torch.full_like(targets, -100)))


@pytest.mark.parametrize("bad", [-1, 11, -101, 4096])
def test_a_target_outside_of_the_vocabulary_is_named(bad):
    hidden, weight, targets = operands(7, 6, 11, torch.float32)
    targets[4] = bad
    message = rf"target {bad}; valid: 0 to 10, or -100"
    for loss in (
        lambda: linear_cross_entropy(hidden, weight, targets),
        lambda: cross_entropy(hidden @ weight.T, targets),
    ):
        with pytest.raises(ValueError, match=message):
            loss()
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            loss()


def test_a_second_derivative_is_refused():
    hidden, weight, targets = operands(7, 6, 11, torch.float64)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden, create_graph=True)
    plain = cross_entropy(F.linear(hidden, weight), targets)  # what the message names has one
    (gradient,) = torch.autograd.grad(plain, hidden, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), weight)[0].norm() > 0
