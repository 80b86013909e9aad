"""R_L alone against the whole decomposition, and the coverage of its interval."""

import pytest
import torch
from torch import nn

from beyond_outliers.propagation import decompose, relative_error, rounding_floor
from beyond_outliers.quantizers import QuantSpec, quantize_model
from rounded_models import ids, olmo, quantize


def test_relative_error_is_the_last_r_and_its_sample_comes_near():
    model = olmo(torch.float32)
    quantized, batches = quantize(model), [ids(20, 16), ids(12, 16, seed=1)]
    full = relative_error(model, quantized, batches)
    assert full.value == pytest.approx(decompose(model, quantized, batches, "block")["R"].iloc[-1], rel=1e-6)
    assert (full.n_sequences, full.n_tokens) == (32, 512)
    part = relative_error(model, quantized, batches, sample=8)
    assert (part.n_sequences, part.n_tokens) == (8, 128)
    assert part.low < full.value < part.high and part.high - part.low > full.high - full.low
    assert part == relative_error(model, quantized, batches, sample=8)
    assert part != relative_error(model, quantized, batches, sample=8, seed=1)
    assert relative_error(model, quantized, batches, sample=100) == full
    as_mappings = [{"ids": batch} for batch in batches]
    assert relative_error(model, quantized, as_mappings, sample=8) == part


def test_interval_formula_and_coverage():
    """Sequences of a known population: the 90 % interval holds the truth about nine times in ten."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3, bias=False)
    quantized = nn.Linear(3, 3, bias=False)
    quantized.weight.data = model.weight.data + 0.1 * torch.randn(3, 3)
    population = torch.randn(4000, 2, 3) * torch.rand(4000, 1, 1)
    with torch.no_grad():
        d = (quantized(population) - model(population)).double().square().sum((1, 2)).numpy()
        n = model(population).double().square().sum((1, 2)).numpy()
    truth, covered = d.sum() / n.sum(), 0
    for seed in range(150):
        found = relative_error(model, quantized, population, sample=40, confidence=0.9, seed=seed, reduction="global")
        covered += found.low <= truth <= found.high
    assert 0.83 <= covered / 150 <= 0.97


def test_the_floor_is_what_ties_alone_do():
    """Weights half way between two levels: each may go either way. A fifth of the way off, none does."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 4)), torch.randn(8, 32)
    model[0].weight.data = torch.randint(-7, 7, (32, 32)) + 0.5
    model[0].weight.data[:, 0] = 7.0  # the scale of every row is 1: all others lie between two levels
    spec = QuantSpec("int4", "none")
    quantized = [relative_error(model, quantize_model(model, spec), x).value]
    floor = rounding_floor(model, x, lambda moved: quantize_model(moved, spec))
    assert 0.05 * quantized[0] < floor < 2 * quantized[0]
    assert floor == rounding_floor(model, x, lambda moved: quantize_model(moved, spec))
    model[0].weight.data = model[0].weight.data.round() + 0.2
    model[0].weight.data[:, 0] = 7.0
    value = relative_error(model, quantize_model(model, spec), x).value
    assert rounding_floor(model, x, lambda moved: quantize_model(moved, spec)) < 1e-3 * value
