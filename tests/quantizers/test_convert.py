"""Post-training quantization of whole models against layers quantized by hand."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from beyond_outliers.anymodel.convert import converted as of_any_model
from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.quantizers import (
    Quantization,
    QuantizedLinear,
    QuantSpec,
    quantize_model,
    quantize_tensor,
)
from beyond_outliers.quantizers.convert import converted


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Olmo2(Olmo2Config(vocab_size=96, width=64, depth=2, n_heads=4))


IDS = torch.arange(48).reshape(3, 16) % 96


@pytest.mark.parametrize(
    "spec", [QuantSpec(), QuantSpec("int4", "none"), QuantSpec("nvfp4", "fp8"), QuantSpec(head=True)]
)
def test_a_quantized_model_is_its_layers_quantized_by_hand(model, spec):
    before = copy.deepcopy(model.state_dict())
    quantized = quantize_model(model, spec)

    reference = copy.deepcopy(model)
    reference.head.weight = nn.Parameter(model.head.weight.detach().clone())
    for name, layer in reference.named_modules():
        if isinstance(layer, nn.Linear) and (spec.head or name != "head"):
            layer.weight.data = quantize_tensor(layer.weight.data, spec.weights)
            layer.register_forward_pre_hook(lambda _, args: (quantize_tensor(args[0], spec.activations),))
    with torch.no_grad():
        assert torch.equal(quantized(IDS), reference(IDS))
        assert not torch.allclose(quantized(IDS), model(IDS), atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.head.weight is model.embedding.weight


def test_the_head_is_rounded_only_when_asked_for(model):
    without, included = quantize_model(model, QuantSpec()), quantize_model(model, QuantSpec(head=True))
    assert type(without.head) is nn.Linear and without.head.weight is without.embedding.weight
    assert torch.equal(included.embedding.weight, model.embedding.weight)
    assert torch.equal(included.head.rounded, quantize_tensor(model.embedding.weight.detach(), "int4"))


def test_rotation_keeps_the_function(model):
    rotated = quantize_model(model, QuantSpec("none", "none", rotate=True, head=True))
    assert all(m.rotation for m in rotated.modules() if isinstance(m, QuantizedLinear))
    with torch.no_grad():
        difference = (rotated(IDS) - model(IDS)).abs().max()
    assert difference < 1e-5
    torch.testing.assert_close(rotated.blocks[0].mlp.down.weight, model.blocks[0].mlp.down.weight.detach())


def test_weight_is_what_acts_on_the_input(model):
    quantized = quantize_model(model, QuantSpec("int4", "none", rotate=True))
    layer = quantized.blocks[0].attention.q
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    assert 0.02 < (layer.weight - model.blocks[0].attention.q.weight).norm() / layer.weight.norm() < 0.2


class Tree(nn.Module):
    """Shared layers, a bias, a Sequential, an untied lm_head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.rest = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.ModuleDict({"a": nn.Linear(6, 4, bias=False)})["a"])
        self.lm_head = nn.Linear(4, 3)

    def forward(self, x):
        return self.lm_head(self.rest(self.again(self.first(x))))


def test_any_tree_of_linear_layers():
    tree = Tree()
    quantized = quantize_model(tree, QuantSpec("int8", "int8"))
    assert quantized.first is quantized.again and isinstance(quantized.first, QuantizedLinear)
    assert type(quantized.lm_head) is nn.Linear
    assert torch.equal(quantized.first.bias, tree.first.bias)
    x = torch.randn(9, 8)
    torch.testing.assert_close(quantized(x), tree(x), atol=0.05, rtol=0.05)
    assert isinstance(quantize_model(nn.Linear(4, 4), QuantSpec()), QuantizedLinear)


def test_models_that_cannot_be_quantized_are_refused(model):
    with pytest.raises(ValueError, match="already"):
        quantize_model(quantize_model(model, QuantSpec()), QuantSpec())
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        quantize_model(nn.Sequential(nn.ReLU()), QuantSpec())
    with pytest.raises(ValueError, match=r"layer 'first'.*multiples of 32"):
        quantize_model(Tree(), QuantSpec("mxfp4", "mxfp4"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_inference_agrees(model, backend):
    quantized = quantize_model(model, QuantSpec(rotate=True))
    torch.compiler.reset()
    with torch.no_grad():
        eager, compiled = quantized(IDS), torch.compile(quantized, backend=backend)(IDS)
    # one entry on the other side of a rounding tie moves logits by a step: agreement in norm, not entry by entry
    assert (eager - compiled).norm() < 0.02 * eager.norm()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("scheme", [None, "quest", "lsq"])
def test_models_of_ours_are_converted_as_any_model_is(model, head, scheme):
    """By the short way and by `anymodel`: the same tensors, names and record."""
    spec = QuantSpec(head=head, rotate=scheme is None)
    made = [way(model, Quantization(spec, "qat" if scheme else "ptq", scheme)) for way in (converted, of_any_model)]
    assert made[0].quantization == made[1].quantization and made[0].quantization.weights
    states = [one.state_dict() for one in made]
    assert states[0].keys() == states[1].keys() and str(made[0]) == str(made[1])
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=0, equal_nan=True)


def test_models_of_ours_load_nothing_of_other_models():
    code = """
    import sys, torch, beyond_outliers.quantizers as q, beyond_outliers.model as m
    from beyond_outliers.metrics import activation_metrics
    from beyond_outliers.propagation import relative_error
    model, ids = m.Olmo2(m.Olmo2Config(32, 16, 1, 2)), torch.zeros(8, 4, dtype=torch.int64)
    q.freeze_qat(q.prepare_qat(model, q.QuantSpec()))
    quantized = q.quantize_model(model, q.QuantSpec(method="gptq"), ids)
    relative_error(model, quantized, ids), activation_metrics(model, ids)
    print([name for name in sys.modules if "anymodel" in name or name.split(".")[0] == "transformers"])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
