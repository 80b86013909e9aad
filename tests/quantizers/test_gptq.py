"""GPTQ against enumeration, against updates that invert the Hessian anew at every column, and in whole models."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from beyond_outliers import quantizers
from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.quantizers import QuantizedLinear, QuantSpec, gptq, prepare_qat, quantize_model, quantize_tensor
from beyond_outliers.quantizers.gptq import Hessian, gptq_weight
from beyond_outliers.quantizers.hadamard import hadamard_transform
from grids import LEVELS, nearest, scale_of

NAMES = [*(f"int{bits}" for bits in range(2, 9)), "fp4", "fp8", "mxfp4", "nvfp4"]
FORMATS = [(name, "row", None) for name in NAMES]
FORMATS += [(name, "tensor", None) for name in ("int4", "fp4", "nvfp4")]
FORMATS += [(name, "block", 16) for name in ("int2", "int4", "fp8", "mxfp4")]
OTHERS = [name for name in quantizers.FORMATS if name not in (*NAMES, "none", "int4g128")]  # widths here are 64
ALL = FORMATS + [(name, "row", None) for name in OTHERS] + [("uint4", "tensor", None), ("nf4", "block", 16)]


def draw(rows=6, width=64, samples=256, seed=0, dtype=torch.float64):
    """A weight and the Hessian of correlated inputs, a few of them large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, width, generator=generator, dtype=torch.float64) @ mixing
    inputs[:, :: max(1, width // 3)] *= 5
    return weight.to(dtype), 2 / samples * inputs.T @ inputs


def loss(weight, rounded, hessian):
    """Objective of every row, float64."""
    error = (weight.double() - rounded.double()).numpy()
    return np.einsum("ri,ij,rj->r", error, hessian.double().numpy(), error)


# ------------------------------------------------------------------------------------------------- one weight


def reference(weight, hessian, format, granularity, block, damping, order):
    """Column by column, the Hessian of the columns that are still free inverted anew for each."""
    w, h = weight.numpy().copy(), hessian.numpy().copy()
    width, whole = w.shape[1], np.abs(w).max()
    size = {"mxfp4": 32, "nvfp4": 16}.get(format, block)
    h += damping * np.mean(np.diag(h)) * np.eye(width)
    columns = list(range(width))
    if order and size:
        starts = sorted(range(0, width, size), key=lambda s: -np.diag(h)[s : s + size].sum())
        columns = [c for s in starts for c in sorted(range(s, s + size), key=lambda c: -h[c, c])]
    elif order:
        columns = sorted(columns, key=lambda c: -h[c, c])
    scale = np.full(len(w), whole / max(LEVELS[format])) if granularity == "tensor" else np.abs(w).max(1) / max(
        LEVELS[format]
    )  # fmt: skip
    rounded = np.zeros_like(w)
    for position, c in enumerate(columns):
        if size and position % size == 0:
            scale = scale_of(np.abs(w[:, columns[position : position + size]]).max(1), format, whole)
        rounded[:, c] = nearest(w[:, c] / scale, LEVELS[format]) * scale
        free = columns[position:]
        inverse = np.linalg.inv(h[np.ix_(free, free)])
        w[:, free] -= np.outer((w[:, c] - rounded[:, c]) / inverse[0, 0], inverse[0])
    return rounded


@pytest.mark.parametrize("order", ["activation", None])
@pytest.mark.parametrize("format, granularity, block", FORMATS)
def test_equals_inverting_the_hessian_anew_at_every_column(format, granularity, block, order):
    weight, hessian = draw()
    found = gptq_weight(weight, hessian, format, granularity, block, damping=0.02, order=order).numpy()
    expected = reference(weight, hessian, format, granularity, block, 0.02, order)
    plain = quantize_tensor(weight, format, granularity, block)
    better = loss(weight, torch.from_numpy(expected), hessian) < loss(weight, plain, hessian)
    assert better.mean() >= 0.5
    np.testing.assert_allclose(found, np.where(better[:, None], expected, plain), atol=1e-10)


@pytest.mark.parametrize("format, size", [("int4", None), ("mxfp4", 32), ("nvfp4", 16)])
def test_wide_updates_in_pieces_change_nothing(monkeypatch, format, size):
    weight, hessian = draw(4, 320, 640)
    found = []
    for lazy in (1, 48, 128, 1000):
        monkeypatch.setattr(gptq, "LAZY", lazy)
        found.append(gptq_weight(weight, hessian, format))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format, granularity, block", ALL)
def test_without_correlations_it_is_rounding_to_nearest(format, granularity, block, dtype):
    weight, _ = draw(dtype=dtype)
    plain = quantize_tensor(weight, format, granularity, block)
    identity = torch.eye(64, dtype=torch.float64)
    for diagonal in (identity, torch.linspace(0.1, 7, 64, dtype=torch.float64).diag()):
        assert torch.equal(gptq_weight(weight, diagonal, format, granularity, block), plain)


def hostile(kind, width=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, width, generator=generator, dtype=torch.float64)
    if kind == "one sample":
        x = x[:1]
    elif kind == "nearly singular":
        x = x @ torch.logspace(0, -9, width, dtype=torch.float64).diag() @ torch.linalg.qr(x[:width])[0]
    elif kind == "outlier":
        x[:, 3] *= 1e4
    elif kind == "dead":
        x[:, 5::3] = 0
    elif kind == "all dead":
        x = x * 0
    elif kind == "shared offset":
        x = 0.01 * x + 1
    elif kind == "alternating":
        x = x[:, :1] * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(width // 2) + 0.1 * x
    return 2 / len(x) * x.T @ x


HOSTILE = ["one sample", "nearly singular", "outlier", "dead", "all dead", "shared offset", "alternating"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HOSTILE)
def test_no_row_is_ever_worse_than_rounding_to_nearest(kind, dtype):
    hessian = hostile(kind)
    for (format, granularity, block), order in itertools.product(ALL, ["activation", None]):
        weight = draw(16, seed=3, dtype=dtype)[0] * torch.logspace(-3, 1, 16)[:, None].to(dtype)
        found = gptq_weight(weight, hessian, format, granularity, block, order=order)
        assert found.dtype == dtype and found.shape == weight.shape and found.isfinite().all()
        plain = quantize_tensor(weight, format, granularity, block)
        reached, bound = loss(weight, found, hessian), loss(weight, plain, hessian)
        error = (weight - plain).double().numpy()
        noise = 1e-13 * (np.abs(error) @ np.abs(hessian.numpy()) * np.abs(error)).sum(1)  # of the sums themselves
        assert (reached <= bound + noise).all(), (format, granularity, order)


def test_dead_columns_are_rounded_to_nearest_and_change_nothing_for_the_others():
    weight, _ = draw()
    hessian, alive = hostile("dead"), torch.ones(64, dtype=torch.bool)
    alive[5::3] = False
    weight[:, ~alive] /= 100  # so that the scales are set by others
    found = gptq_weight(weight, hessian, "int4", damping=0.5)
    without = gptq_weight(weight[:, alive], hessian[alive][:, alive], "int4", damping=0.5)
    torch.testing.assert_close(found[:, alive], without)
    assert torch.equal(found[:, ~alive], quantize_tensor(weight, "int4")[:, ~alive])
    assert not torch.equal(without, quantize_tensor(weight[:, alive], "int4"))


def test_hessian_of_batches():
    x, found = torch.randn(30, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64), Hessian()
    for piece in x.split([1, 20, 9]):
        found.add(piece[None])
    np.testing.assert_allclose(found.value(), 2 / 30 * x.numpy().T @ x.numpy(), atol=1e-12)
    half = Hessian()
    half.add(torch.full((3, 2), 1000.0, dtype=torch.float16))
    assert torch.equal(half.value(), torch.full((2, 2), 2e6, dtype=torch.float64))  # no overflow at 65504


W, H = draw()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gptq_weight(W, H, "none"), ["none", "int8"]),
        (lambda: gptq_weight(W, H, "int4", order="random"), ["random", "activation", "None"]),
        (lambda: gptq_weight(W, H, "int4", damping=-0.1), ["-0.1"]),
        (lambda: gptq_weight(W, H[:8, :8], "int4"), ["(8, 8)", "(64, 64)"]),
        (lambda: gptq_weight(W, H * float("nan"), "int4"), ["NaN"]),
        (lambda: gptq_weight(W / 0, H, "int4"), ["infinity"]),
        (lambda: gptq_weight(W, hostile("one sample"), "int4", damping=0.0), ["positive definite", "damping 0.0"]),
        (lambda: QuantSpec(method="awq"), ["awq", "rtn, gptq"]),
        (lambda: QuantSpec("none", "int4", method="gptq"), ["gptq", "none"]),
        (lambda: prepare_qat(nn.Linear(8, 8), QuantSpec(method="gptq")), ["gptq", "rtn"]),
        (lambda: quantize_model(nn.Linear(8, 8), QuantSpec(method="gptq")), ["gptq", "without calibration"]),
        (lambda: quantize_model(nn.Linear(8, 8), QuantSpec(), torch.ones(2, 8)), ["rtn", "with calibration"]),
        (lambda: quantize_model(nn.Linear(8, 8), QuantSpec(method="gptq"), []), ["no batch"]),
        (lambda: quantize_model(Tree(), QuantSpec(method="gptq"), torch.ones(2, 8)), ["never ran", "unused.0"]),
        (
            lambda: quantize_model(nn.Sequential(nn.Linear(8, 8)), QuantSpec(method="gptq"), torch.ones(2, 8) / 0),
            ["'0'"],
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, words):
    with pytest.raises(ValueError) as refusal:
        call()
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


# ------------------------------------------------------------------------------------------------- models


class Tree(nn.Module):
    """A layer that runs twice a pass, one that runs for some batches only, one that never does."""

    def __init__(self):
        super().__init__()
        self.shared, self.sometimes, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        self.unused = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x):
        x = self.shared(self.shared(x).relu()) if len(x) != 3 else self.sometimes(x)
        return self.last(x)


@pytest.fixture
def tree():
    torch.manual_seed(0)
    tree = Tree().double()
    tree.unused = None
    return tree


IDS = torch.randint(0, 48, (16, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Olmo2(Olmo2Config(vocab_size=48, width=32, depth=2, n_heads=2)).double()


SPECS = [
    QuantSpec(method="gptq"),
    QuantSpec("int3", "none", method="gptq"),
    QuantSpec("mxfp4", "mxfp4", method="gptq"),
    QuantSpec("nvfp4", "fp8", rotate=True, method="gptq"),
    QuantSpec("int4", "int4", "block", block=16, method="gptq"),
    QuantSpec(rotate=True, head=True, method="gptq"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_layer_is_gptq_on_what_reaches_it_in_the_quantized_model(model, spec):
    quantized = quantize_model(model, spec, calibration=IDS)
    inputs = {}
    layers = {name: module for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 12 + spec.head
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        quantized(IDS)
    for name, layer in layers.items():
        x, weight = inputs[name].flatten(0, -2), model.get_submodule(name).weight.detach()
        if spec.rotate:
            x, weight = hadamard_transform(x), hadamard_transform(weight)
        x = quantize_tensor(x, spec.activations, spec.granularity, spec.block)
        expected = gptq_weight(weight, 2 / len(x) * x.T @ x, spec.weights, spec.granularity, spec.block)
        torch.testing.assert_close(layer.rounded, expected, atol=1e-10, rtol=0)
        plain = quantize_tensor(weight, spec.weights, spec.granularity, spec.block)
        assert not torch.equal(layer.rounded, plain)


def test_how_the_inputs_are_batched_does_not_matter(model):
    whole = quantize_model(model, SPECS[0], calibration=IDS)
    parts = quantize_model(model, SPECS[0], calibration=iter(IDS.split([1, 12, 3])))
    for (name, a), (_, b) in zip(whole.named_buffers(), parts.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0, msg=name)


def test_the_model_and_a_tied_embedding_stay_as_they_are(model):
    before = copy.deepcopy(model.train())
    quantized = quantize_model(model, SPECS[-1], calibration=IDS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert model.head.weight is model.embedding.weight and isinstance(quantized.head, QuantizedLinear)
    assert torch.equal(quantized.embedding.weight, before.embedding.weight)
    assert quantized.training and all(module.training for module in quantized.modules())
    assert not any(module._forward_pre_hooks for module in quantized.modules())
    assert all(not tensor.requires_grad for tensor in quantized.buffers())


def expected(layer, inputs):
    x = torch.cat(inputs).detach()
    return gptq_weight(layer.weight.detach(), 2 / len(x) * x.T @ x, "int2")


@pytest.mark.parametrize("sizes", [[40], [20, 30], [20, 3, 3, 30], [3, 3, 20]])
def test_a_layer_that_runs_twice_or_not_in_every_batch(tree, sizes):
    batches = [torch.randn(n, 8, dtype=torch.float64) for n in sizes]
    long, short = [[x for x in batches if (len(x) == 3) == is_short] for is_short in (False, True)]
    if not short:
        tree.sometimes = None
    quantized = quantize_model(tree, QuantSpec("int2", "none", method="gptq"), calibration=batches)

    shared = expected(tree.shared, [*long, *(tree.shared(x).relu() for x in long)])  # before the layer is rounded
    torch.testing.assert_close(quantized.shared.rounded, shared)
    if short:
        torch.testing.assert_close(quantized.sometimes.rounded, expected(tree.sometimes, short))
    reaching = [quantized.shared(quantized.shared(x).relu()) for x in long]
    reaching += [quantized.sometimes(x) for x in short]
    torch.testing.assert_close(quantized.last.rounded, expected(tree.last, reaching))


def test_a_mapping_and_tuples_are_inputs(tree):
    x = torch.randn(3, 8, dtype=torch.float64)
    tree.shared = None
    quantized = [
        quantize_model(tree, QuantSpec("int2", "int8", method="gptq"), calibration=calibration)
        for calibration in (x, {"x": x}, [(x,)])
    ]
    assert torch.equal(quantized[0](x), quantized[1](x)) and torch.equal(quantized[0](x), quantized[2](x))


class Padded(nn.Module):
    """Layers over (B, T, width), (B T, width) and (B, width), and one over as many rows as it is told."""

    def __init__(self):
        super().__init__()
        self.up, self.flat, self.pooler, self.expert = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, attention_mask, some=5):
        y = self.flat(self.up(x).flatten(0, 1))
        return self.pooler(y.view_as(x)[:, 0]), self.expert(y[:some])


def test_padding_is_not_calibrated_on():
    torch.manual_seed(0)
    model, spec = Padded().double(), QuantSpec("int2", "none", method="gptq")
    x, lengths = torch.randn(3, 6, 8, dtype=torch.float64), (2, 4, 6)
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    with pytest.warns(UserWarning, match=r"padding is in the calibration of expert:"):
        padded = quantize_model(model, spec, {"x": x, "attention_mask": mask})
    alone = [{"x": x[i : i + 1, :n], "attention_mask": mask[i : i + 1, :n]} for i, n in enumerate(lengths)]
    texts, everything = (
        quantize_model(model, spec, batches) for batches in (alone, {"x": x, "attention_mask": mask**0})
    )
    for name in ("up", "flat", "pooler"):
        found, wanted, other = (m.get_submodule(name).rounded for m in (padded, texts, everything))
        assert torch.equal(found, wanted) and (name == "pooler" or not torch.equal(found, other))
