"""What a caller has switched on (autocast, a default dtype or device, inference mode) changes no rounded weight."""

import contextlib

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.quantizers import (
    FORMATS,
    AbsMaxQuantizer,
    LSQQuantizer,
    QuantSpec,
    QuestQuantizer,
    freeze_qat,
    hadamard_transform,
    load_quantized,
    prepare_qat,
    quantize_model,
    quantize_tensor,
    save_quantized,
)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "another device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
}


class Twice(nn.Linear):
    """A forward of its own with two products: conversion tries it on rows of its making."""

    def forward(self, x):
        return (x @ self.weight.T + self.bias) - (2 * x) @ self.weight.T


class Experts(nn.Module):
    is_transposed, has_gate = True, False

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = (nn.Parameter(torch.randn(2, 32, 32) / 6) for _ in range(2))

    def forward(self, x):
        return x + ((x @ self.up_proj).relu() @ self.down_proj).sum(0)


torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(32, 32), Twice(32, 32), Experts(), nn.Linear(32, 24)).eval()
X = torch.randn(64, 32) @ torch.randn(32, 32)


def trained(scheme):
    model = prepare_qat(MODEL, QuantSpec(), scheme)
    model(X)  # LSQ starts from a batch
    return model


ENTRIES = {
    **{name: lambda name=name: quantize_tensor(X.reshape(-1, 128), name) for name in FORMATS},
    "rotation": lambda: hadamard_transform(X),
    "rtn": lambda: quantize_model(MODEL, QuantSpec()),
    "rotated": lambda: quantize_model(MODEL, QuantSpec("int8", "mxfp4", rotate=True)),
    "example": lambda: quantize_model(MODEL, QuantSpec(), example=X),
    "gptq": lambda: quantize_model(MODEL, QuantSpec(method="gptq", rotate=True), X),
    **{scheme: lambda scheme=scheme: prepare_qat(MODEL, QuantSpec(), scheme) for scheme in ("quest", "ste", "lsq")},
}


def state(made):
    if isinstance(made, torch.Tensor):
        return {"": made}
    return made.state_dict() | {
        f"{n}.rounded": m.rounded_weight() for n, m in made.named_modules() if hasattr(m, "hold")
    }


@pytest.mark.filterwarnings("ignore")  # what each leaves alone is another test's
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_made_does_not_depend_on_the_caller(setting, tmp_path):
    models = {f"frozen {scheme}": trained(scheme) for scheme in ("quest", "ste", "lsq")}
    folder = save_quantized(ENTRIES["rotated"](), tmp_path / "saved")
    entries = ENTRIES | {name: lambda model=model: freeze_qat(model) for name, model in models.items()}
    entries["loaded"] = lambda: load_quantized(MODEL, folder)
    for name, make in entries.items():
        outside = state(make())
        with SETTINGS[setting]():
            made = make()
            inside = state(made)
        assert inside.keys() == outside.keys(), name
        for key, tensor in outside.items():
            torch.testing.assert_close(inside[key], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{name} {key}")
        if isinstance(made, nn.Module):
            y = made(X.clone())
            assert y.dtype == torch.float32 and not any(t.is_inference() for t in made.state_dict().values()), name


def test_a_compiled_inference_leaves_nothing_that_cannot_be_trained_with():
    """A width that no other test rotates in half precision."""
    model = prepare_qat(nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48)), QuantSpec()).bfloat16()
    x = torch.randn(4, 48, dtype=torch.bfloat16)
    with torch.inference_mode():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    y = model(x)
    y.sum().backward()
    assert torch.equal(y, compiled) and model[0].weight.grad.isfinite().all()


QUANTIZERS = [QuestQuantizer(4), QuestQuantizer(2, hadamard=False), AbsMaxQuantizer("int4"), AbsMaxQuantizer("nvfp4")]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_transforms_of_torch_func(quantizer):
    x, weights = 4 * torch.randn(3, 5, 32), torch.randn(3, 5, 32)
    leaf = x.clone().requires_grad_()
    (quantizer(leaf) * weights).sum().backward()
    assert torch.equal(grad(lambda x: (quantizer(x) * weights).sum())(x), leaf.grad)
    rows = torch.stack([quantizer(row) for row in x])
    assert torch.equal(vmap(quantizer)(x), rows)
    each = vmap(grad(lambda x, w: (quantizer(x) * w).sum()))(x, weights)
    torch.testing.assert_close(each, leaf.grad if quantizer.extra_repr() != "'nvfp4', 'row'" else each)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_and_small_numbers_stay_finite(dtype):
    zeros = torch.zeros(3, 32, dtype=dtype)
    for quantizer in (*QUANTIZERS, LSQQuantizer(4), LSQQuantizer(4, zeros)):
        assert torch.equal(quantizer(zeros), zeros), quantizer
        assert quantizer(zeros + torch.finfo(dtype).tiny).isfinite().all()
    model = Olmo2(Olmo2Config(64, 24, 1, 2)).to(dtype)
    for parameter in model.blocks.parameters():
        parameter.data.zero_()
    assert model(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()
