"""Quantizers that train: forward staircases and gradient masks, against NumPy."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from beyond_outliers.quantizers import (
    SCHEMES,
    AbsMaxQuantizer,
    LSQQuantizer,
    QuestQuantizer,
    optimal_gaussian_scale,
    quantize_tensor,
    staircase,
)


@pytest.fixture
def rows():
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- QuEST


def test_the_optimal_gaussian_scale_is_optimal():
    assert optimal_gaussian_scale(1) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-7)  # E|x|, known in closed form
    x = norm.ppf((np.arange(400_000) + 0.5) / 400_000)

    def error(scale: float, bits: int) -> float:
        step = 2 * scale / (2**bits - 1)
        level = np.clip(np.floor(x / step) + 0.5, 0.5 - 2 ** (bits - 1), 2 ** (bits - 1) - 0.5)
        return np.mean((x - level * step) ** 2)

    for bits in range(1, 9):
        best = optimal_gaussian_scale(bits)
        assert error(best, bits) < min(error(best * 0.98, bits), error(best * 1.02, bits))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_quest_against_numpy(rows, bits):
    from scipy.linalg import hadamard

    rows[0] *= 100
    rows[1, 3] = 40.0
    matrix = hadamard(64) / 8
    rotated = rows.numpy() @ matrix
    step = 2 * optimal_gaussian_scale(bits) * np.sqrt((rotated**2).mean(-1, keepdims=True)) / (2**bits - 1)
    levels = (np.arange(2**bits) - (2**bits - 1) / 2) * step[..., None]
    nearest = np.abs(levels - rotated[..., None]).argmin(-1)
    rounded = np.take_along_axis(levels, nearest[..., None], -1)[..., 0]
    trusted = np.abs(rounded - rotated) <= step / 2 * (1 + 1e-12)

    x = rows.clone().requires_grad_()
    y = QuestQuantizer(bits)(x)
    np.testing.assert_allclose(y.detach().numpy(), rounded @ matrix, atol=1e-10)
    weights = torch.randn(6, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y * weights).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), ((weights.numpy() @ matrix) * trusted) @ matrix, atol=1e-10)
    assert 0 < (~trusted).mean() < 0.5 or bits == 8


# ------------------------------------------------------------------------------------------------- the other schemes


@pytest.mark.parametrize("format", ["int4", "mxfp4", "fp8"])
def test_ste_rounds_as_after_training_and_passes_every_gradient(rows, format):
    x = rows.clone().requires_grad_()
    y = AbsMaxQuantizer(format)(x)
    assert torch.equal(y, quantize_tensor(rows, format))
    (y * rows).sum().backward()
    assert torch.equal(x.grad, rows)


def test_lsq_by_the_papers_formulas(rows):
    """Equations 1 to 3 of arXiv 1902.08153, written out in NumPy."""
    quantizer = LSQQuantizer(4, initial=rows).double()
    assert quantizer.step.item() == pytest.approx(2 * rows.abs().mean().item() / math.sqrt(7), rel=1e-6)
    with torch.no_grad():
        quantizer.log_step -= 1.0  # a smaller step, so that both ends clip
    step = quantizer.step.item()
    x, upstream = rows.clone().requires_grad_(), rows.flip(0)
    y = quantizer(x)
    (y * upstream).sum().backward()
    v = rows.numpy() / step
    low, high = v <= -8, v >= 7
    assert low.any() and high.any()
    np.testing.assert_allclose(y.detach().numpy(), np.rint(np.clip(v, -8, 7)) * step, rtol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), np.where(low | high, 0, upstream.numpy()), rtol=1e-12)
    by_step = np.where(low, -8, np.where(high, 7, np.rint(v) - v))
    expected = (by_step * upstream.numpy()).sum() / math.sqrt(rows.numel() * 7)
    assert quantizer.log_step.grad.item() == pytest.approx(expected * step, rel=1e-9)


def test_lsq_starts_from_its_first_batch_and_only_then(rows):
    quantizer = LSQQuantizer(4)
    quantizer(rows)
    step = quantizer.step.item()
    assert step == pytest.approx(2 * rows.abs().mean().item() / math.sqrt(7), rel=1e-5)
    quantizer(100 * rows)
    assert quantizer.step.item() == step
    fresh = LSQQuantizer(4)
    fresh.load_state_dict(quantizer.state_dict())
    fresh(100 * rows)
    assert fresh.step.item() == step


# ------------------------------------------------------------------------------------------------- staircases


@pytest.mark.parametrize("scheme", SCHEMES)
def test_staircases(scheme):
    table = staircase(scheme, 2)
    x, y, gradient = (table[column].to_numpy() for column in ("x", "y", "gradient"))
    assert (np.diff(x) > 0).all() and (np.diff(y) >= 0).all()
    levels = np.unique(y.round(9))
    np.testing.assert_allclose(np.diff(levels), levels[1] - levels[0], rtol=1e-6)
    assert len(levels) == (3 if scheme == "ste" else 4) and (0 in levels) == (scheme != "quest")  # which is mid-rise
    inside = {
        "quest": np.abs(x) <= levels[-1] + (levels[1] - levels[0]) / 2,
        "ste": np.isfinite(x),
        "lsq": (x > levels[0]) & (x < levels[-1]),
    }
    assert (gradient == inside[scheme]).all()


def test_second_derivatives_pass_straight_through():
    """Of f = sum y^3 with y the rounded x: f'' = 6 y where the gradient passes, 0 where it is masked."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    for quantizer in (AbsMaxQuantizer("int4"), QuestQuantizer(4, hadamard=False)):
        y = quantizer(x)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(second, torch.where(first == 0, 0.0, 6 * y.detach()))
