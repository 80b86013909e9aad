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


@pytest.mark.parametrize("bits, width", [(2, 5), (2, 7), (3, 4), (3, 5)])
def test_between_the_optimum_and_rounding_to_nearest(bits, width):
    top = 2 ** (bits - 1) - 1
    grid = np.array(list(itertools.product(range(-top, top + 1), repeat=width)), dtype=float)  # every choice there is
    excess = {"gptq": 0.0, "rtn": 0.0}
    for seed in range(20):
        weight, hessian = draw(2, width, 16, seed)
        found = gptq_weight(weight, hessian, f"int{bits}")
        scale = weight.abs().amax(1, keepdim=True) / top
        np.testing.assert_allclose(found / scale, np.rint(found / scale), atol=1e-12)
        losses = {"gptq": loss(weight, found, hessian)}
        losses["rtn"] = loss(weight, quantize_tensor(weight, f"int{bits}"), hessian)
        for row in range(2):
            errors = weight[row].numpy() - grid * scale[row].item()
            optimum = np.einsum("ci,ij,cj->c", errors, hessian.numpy(), errors).min()
            assert optimum <= losses["gptq"][row] * (1 + 1e-9) <= losses["rtn"][row] * (1 + 2e-9)
            for name in excess:
                excess[name] += losses[name][row] / optimum - 1
    assert excess["gptq"] < 0.5 * excess["rtn"]  # of the way from the optimum to rounding, more than half is gone


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
    size = quantizers.FORMATS[format].block or block
    scales = gptq._Scales(weight, format, granularity, size)
    identity = torch.eye(64, dtype=torch.float64)
    assert torch.equal(gptq._compensate(weight, identity, scales), plain)  # bit by bit, before any fallback
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


def test_the_fallback_is_needed():
    worse = 0
    for seed in range(20):
        weight, hessian = draw(32, 8, 6, seed)
        factor = gptq._inverse_factor(hessian, 0.01)
        rounded = gptq._compensate(weight, factor, gptq._Scales(weight, "int2", "row", None))
        plain = quantize_tensor(weight, "int2")
        rows = loss(weight, rounded, hessian) > loss(weight, plain, hessian)
        worse += rows.sum()
        found = gptq_weight(weight, hessian, "int2", order=None)
        np.testing.assert_array_equal(found, np.where(rows[:, None], plain, rounded))
    assert worse > 0


def test_dead_columns_are_rounded_to_nearest():
    weight, _ = draw()
    found = gptq_weight(weight, hostile("dead"), "int4")
    plain = quantize_tensor(weight, "int4")
    assert torch.equal(found[:, 5::3], plain[:, 5::3]) and not torch.equal(found, plain)


def test_dead_columns_change_nothing_for_the_others():
    weight, _ = draw()
    hessian, alive = hostile("dead"), torch.ones(64, dtype=torch.bool)
    alive[5::3] = False
    weight[:, ~alive] /= 100  # so that the scales are set by others
    found = gptq_weight(weight, hessian, "int4", damping=0.5)
    without = gptq_weight(weight[:, alive], hessian[alive][:, alive], "int4", damping=0.5)
    torch.testing.assert_close(found[:, alive], without)
    assert not torch.equal(without, quantize_tensor(weight[:, alive], "int4"))


def test_the_factor_is_that_of_the_inverse():
    _, hessian = draw()
    factor = gptq._inverse_factor(hessian, 0.1)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped))


def test_the_scale_of_the_hessian_does_not_matter():
    weight, hessian = draw()
    for factor in (2.0**-30, 2.0**30):
        assert torch.equal(gptq_weight(weight, factor * hessian, "int3"), gptq_weight(weight, hessian, "int3"))


def test_hessian_of_batches():
    x = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, parts = Hessian(), Hessian()
    whole.add(x)
    for piece in x.reshape(30, 7).split([1, 20, 9]):
        parts.add(piece)
    rows = x.reshape(30, 7).numpy()
    np.testing.assert_allclose(whole.value(), 2 / 30 * rows.T @ rows, atol=1e-12)
    torch.testing.assert_close(parts.value(), whole.value())
    half = Hessian()
    half.add(torch.full((3, 2), 1000.0, dtype=torch.float16))
    assert torch.equal(half.value(), torch.full((2, 2), 2e6, dtype=torch.float64))  # no overflow at 65504


W, H = draw()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gptq_weight(W, H, "int9"), ["int9", "int8", "mxfp4"]),
        (lambda: gptq_weight(W, H, "none"), ["none", "int8"]),
        (lambda: gptq_weight(W, H, "int4", "column"), ["column", "row"]),
        (lambda: gptq_weight(W, H, "int4", "block", 24), ["24", "64", "32"]),
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


@pytest.fixture(scope="module")
def text():
    """(96, 33) tokens of a random chain in which two tokens determine the next but for little."""
    generator = torch.Generator().manual_seed(0)
    successor = torch.randint(0, 48, (48, 48), generator=generator)
    ids = torch.randint(0, 48, (96, 2), generator=generator)
    for _ in range(31):
        noise = torch.randint(0, 48, (96,), generator=generator)
        known = torch.rand(96, generator=generator) < 0.9
        ids = torch.cat([ids, torch.where(known, successor[ids[:, -2], ids[:, -1]], noise)[:, None]], 1)
    return ids


@pytest.fixture(scope="module")
def trained(text):
    torch.manual_seed(0)
    model = Olmo2(Olmo2Config(vocab_size=48, width=32, depth=2, n_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        batch = text[torch.randint(0, 96, (16,))]
        optimizer.zero_grad()
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
    return model


SPECS = [
    QuantSpec(method="gptq"),
    QuantSpec("int3", "none", method="gptq"),
    QuantSpec("mxfp4", "mxfp4", method="gptq"),
    QuantSpec("nvfp4", "fp8", rotate=True, method="gptq"),
    QuantSpec("int4", "int4", "block", block=16, method="gptq"),
    QuantSpec(rotate=True, head=True, method="gptq"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_layer_is_gptq_on_what_reaches_it_in_the_quantized_model(trained, text, spec):
    model = copy.deepcopy(trained).double()
    quantized = quantize_model(model, spec, calibration=text[:16, :-1])
    inputs = {}
    layers = {name: module for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 12 + spec.head
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        quantized(text[:16, :-1])
    for name, layer in layers.items():
        x, weight = inputs[name].flatten(0, -2), model.get_submodule(name).weight.detach()
        if spec.rotate:
            x, weight = hadamard_transform(x), hadamard_transform(weight)
        x = quantize_tensor(x, spec.activations, spec.granularity, spec.block)
        expected = gptq_weight(weight, 2 / len(x) * x.T @ x, spec.weights, spec.granularity, spec.block)
        torch.testing.assert_close(layer.rounded, expected, atol=1e-10, rtol=0)
        plain = quantize_tensor(weight, spec.weights, spec.granularity, spec.block)
        assert not torch.equal(layer.rounded, plain)


@pytest.mark.parametrize("sizes", [[8, 8], [1, 12, 3]])
def test_how_the_inputs_are_batched_does_not_matter(trained, text, sizes):
    model = copy.deepcopy(trained).double()
    whole = quantize_model(model, SPECS[0], calibration=text[:16, :-1])
    parts = quantize_model(model, SPECS[0], calibration=(piece for piece in text[:16, :-1].split(sizes)))
    for (name, a), (_, b) in zip(whole.named_buffers(), parts.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0, msg=name)


def test_the_model_and_a_tied_embedding_stay_as_they_are(trained, text):
    model = copy.deepcopy(trained).train()
    quantized = quantize_model(model, SPECS[-1], calibration=text[:16, :-1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    assert model.head.weight is model.embedding.weight and isinstance(quantized.head, QuantizedLinear)
    assert torch.equal(quantized.embedding.weight, trained.embedding.weight)
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


def test_a_lone_layer_and_half_precision():
    torch.manual_seed(0)
    layer = nn.Linear(64, 16).bfloat16()
    x = torch.randn(100, 64).bfloat16() @ torch.randn(64, 64).bfloat16()
    rounded = quantize_model(layer, QuantSpec(method="gptq"), calibration=x)
    assert rounded.rounded.dtype == torch.bfloat16
    plain, exact = quantize_model(layer, QuantSpec()), layer(x)
    assert 0 < (rounded(x) - exact).norm() < (plain(x) - exact).norm()


@pytest.mark.slow
@pytest.mark.parametrize("head", [False, True])
def test_the_loss_rises_less_than_by_rounding_to_nearest(trained, text, head):
    inputs, targets = text[:, :-1], text[:, 1:]
    rises = {}
    with torch.no_grad():
        base = trained.loss(inputs, targets)
        for weights, rotate in itertools.product(["int3", "int4", "mxfp4", "nvfp4"], [False, True]):
            for activations in ("none", "int8" if weights.startswith("int") else weights):
                for method, calibration in (("rtn", None), ("gptq", inputs)):
                    spec = QuantSpec(weights, activations, head=head, rotate=rotate, method=method)
                    rise = quantize_model(trained, spec, calibration).loss(inputs, targets) - base
                    rises.setdefault(method, []).append(rise.item())
    rtn, compensated = np.array(rises["rtn"]), np.array(rises["gptq"])
    assert 0 < compensated.mean() < 0.8 * rtn.mean()
    assert (compensated < rtn).mean() > 0.75


# ------------------------------------------------------------------------------------ a public implementation


def published(weight, inputs, order):
    """What neural-compressor's GPTQ makes of a weight, 4 bits with a zero point, a scale a row: float32 on CPU."""
    public = pytest.importorskip("neural_compressor.torch.algorithms.weight_only.gptq")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    run = public.GPTQ(layer, weight.clone())
    settings = {"bits": 4, "sym": False, "perchannel": True, "dtype": "int", "mse": False}
    settings |= {"use_double_quant": False, "double_quant_sym": False}
    run.quantizer.configure(settings)
    run.add_batch(inputs.float(), None)
    found = run.fasterquant(weight.clone().float(), blocksize=32, percdamp=0.01, act_order=order is not None)
    return next(part for part in found if part.shape == weight.shape).double()


@pytest.mark.slow
@pytest.mark.parametrize("order", [None, "activation"])
def test_equals_a_public_implementation(order):
    """Asymmetric 4 bits, where both have the same grid: the same levels but where float32 falls on another side."""
    same, reached = [], {"ours": 0.0, "theirs": 0.0, "nearest": 0.0}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(24, 64, generator=generator, dtype=torch.float64)
        inputs = torch.randn(512, 64, generator=generator, dtype=torch.float64)
        inputs = inputs @ (torch.eye(64) + 0.3 * torch.randn(64, 64, generator=generator)).double()
        hessian = 2 / 512 * inputs.T @ inputs
        theirs = published(weight, inputs, order)
        ours = gptq_weight(weight, hessian, "uint4", order=order)
        nearest = quantize_tensor(weight, "uint4")
        fallen = (ours == nearest).all(1)  # rows that ours leaves to rounding to nearest, which theirs does not do
        same.append(((ours - theirs).abs() < 1e-4)[~fallen].double().mean().item())
        for name, rounded in (("ours", ours), ("theirs", theirs), ("nearest", nearest)):
            reached[name] += loss(weight, rounded, hessian).sum()
    assert min(same) > 0.97
    assert reached["ours"] == pytest.approx(reached["theirs"], rel=0.01)
    assert reached["ours"] < 0.9 * reached["nearest"]
