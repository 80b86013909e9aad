"""Modules that multiply by weights of their own, against references written out expert by expert."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beyond_outliers.anymodel.operands import RoundedProducts
from beyond_outliers.quantizers import QuantSpec, coverage, freeze_qat, prepare_qat, quantize_model, quantize_tensor

N, E, WIDTH, INNER = 12, 4, 16, 24


def q(x, format="int3", granularity="row"):
    return quantize_tensor(x, format, granularity)


def filled(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def mixtral_experts():
    tf = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return filled(MixtralExperts(tf.MixtralConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=E)))


def mixtral_by_hand(experts, x, chosen, share):
    """One token and expert at a time: a weight's rows are its outputs, and each row has a scale."""
    y = torch.zeros_like(x)
    for token in range(len(x)):
        for place in range(chosen.shape[1]):
            e = chosen[token, place]
            gate, up = (q(experts.gate_up_proj[e]) @ q(x[token])).chunk(2)
            y[token] += share[token, place] * (q(experts.down_proj[e]) @ q(F.silu(gate) * up))
    return y


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_fused_experts(implementation):
    experts = mixtral_experts()
    experts.config._experts_implementation = implementation
    x = torch.randn(N, WIDTH)
    chosen = torch.stack([torch.randperm(E)[:2] for _ in range(N)])
    share = torch.rand(N, 2)
    quantized = quantize_model(experts, QuantSpec("int3", "int3"), strict=True)
    expected = mixtral_by_hand(experts, x, chosen, share)
    with torch.no_grad():
        y = quantized(x, chosen, share)
        assert (y - experts(x, chosen, share)).norm() > 0.1 * y.norm()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    table = coverage(quantized)
    assert table["name"].tolist() == ["gate_up_proj", "down_proj"] and table["rounded"].all()
    assert not any(p.ndim > 2 for p in quantized.parameters())  # rounded once, no longer trainable
    for copied in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        with torch.no_grad():
            assert torch.equal(copied(x, chosen, share), y)


@pytest.mark.parametrize("spec", [QuantSpec("int4", "none", "tensor"), QuantSpec("nvfp4", "none")])
def test_a_scale_of_a_tensor_is_of_one_expert(spec):
    experts = mixtral_experts()
    experts.gate_up_proj.data[0] *= 100
    experts.down_proj = nn.Parameter(experts.down_proj[..., :16].contiguous())  # a width that blocks of 16 divide
    quantized = quantize_model(experts, spec)
    for e in range(E):
        assert torch.equal(quantized.gate_up_proj[e], q(experts.gate_up_proj[e], spec.weights, spec.granularity))


def test_experts_train_and_freeze():
    experts = mixtral_experts()
    experts.config._experts_implementation = "grouped_mm"
    x, chosen, share = torch.randn(N, WIDTH), torch.randint(E, (N, 2)), torch.rand(N, 2)
    qat = prepare_qat(experts, QuantSpec("int3", "int3"), "ste")
    y = qat(x, chosen, share)
    torch.testing.assert_close(y, mixtral_by_hand(experts, x, chosen, share), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert qat.gate_up_proj.grad[chosen.unique()].abs().sum() > 0
    for scheme in ("ste", "quest"):
        qat = prepare_qat(experts, QuantSpec(), scheme)
        frozen = freeze_qat(qat)
        assert frozen.quantization.stage == "frozen" and not list(frozen.parameters())
        torch.testing.assert_close(frozen(x, chosen, share), qat(x, chosen, share).detach(), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="fused experts"):
        prepare_qat(nn.Sequential(experts, nn.Linear(4, 4)), QuantSpec(), "lsq")


class Router(nn.Linear):
    def forward(self, x):
        scores = x @ self.weight.T
        return scores.topk(2, -1)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 0.5 * self.weight, self.bias)


class ElementwiseGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 16))

    def forward(self, x):
        return x * self.weight


class LoRA(nn.Linear):
    def __init__(self, *shape):
        super().__init__(*shape)
        self.down = nn.Parameter(torch.randn(2, shape[0]))
        self.up = nn.Parameter(torch.zeros(shape[1], 2))  # as it starts: the same function, and yet not the same layer

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Matmul(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_subclasses_of_linear_are_rounded_exactly_or_named():
    torch.manual_seed(0)
    model = nn.ModuleDict({"router": Router(16, 8), "same": Matmul(16, 8)})
    model["scaled"], model["lora"] = Scaled(16, 8), LoRA(16, 8)
    with pytest.warns(UserWarning, match="scaled .subclass with its own forward.*lora .*lora.down.*lora.up"):
        quantized = quantize_model(model, QuantSpec("int3", "int3"))
    x = torch.randn(5, 16)
    product = {name: q(x) @ q(layer.weight).T + layer.bias for name, layer in model.items()}
    torch.testing.assert_close(quantized["same"](x), product["same"])
    expected = (product["router"] - model["router"].bias).topk(2, -1).values
    torch.testing.assert_close(quantized["router"](x).values, expected)
    for name in ("scaled", "lora"):
        assert torch.equal(quantized[name](x), model[name](x))
    gated = quantize_model(nn.Sequential(ElementwiseGate(), nn.Linear(16, 16)), QuantSpec(), example=x, strict=True)
    assert coverage(gated)["name"].tolist() == ["1"]  # named like a router, and no product
    qat = prepare_qat(nn.Sequential(LoRA(16, 8), nn.Linear(8, 8)), QuantSpec())
    assert {"0.weight", "0.bias", "0.down", "0.up"} <= {name for name, _ in qat.named_parameters()}


def test_other_uses_of_a_weight_are_errors():
    weight = torch.randn(4, 6, 8)
    sums = {"w": -1}
    x = torch.randn(3, 8)
    for use, text in (
        (lambda: x @ (weight[0] + 1).T, "add"),
        (lambda: x[:, :6] @ weight[0], "sums over 6"),
        (lambda: weight[0] @ weight[1].T, "two weights"),
        (lambda: torch.einsum("ti,eoi->eto", x, weight), "einsum"),
    ):
        with pytest.raises(RuntimeError, match=text), RoundedProducts({"w": weight}, sums, torch.zeros_like):
            use()


def test_products_of_every_kind():
    torch.manual_seed(0)
    weight, x = torch.randn(4, 6, 8, dtype=torch.float64), torch.randn(4, 3, 8, dtype=torch.float64)
    rounded = q(x)
    exact = torch.einsum("eti,eoi->eto", rounded, weight)
    with RoundedProducts({"w": weight}, {"w": -1}, q):
        got = [
            torch.bmm(x, weight.transpose(1, 2)),
            torch.bmm(weight, x.mT).mT,
            torch.baddbmm(torch.zeros(4, 3, 6, dtype=torch.float64), x, weight.permute(0, 2, 1)),
            torch.stack([F.linear(rows, part) for rows, part in zip(x, weight, strict=True)]),
            torch.stack([x[e].matmul(weight.select(0, e).T) for e in range(4)]),
            torch.stack([torch.stack([weight[e].mv(row) for row in x[e]]) for e in range(4)]),
        ]
    for product in got:
        torch.testing.assert_close(product, exact)
