"""Nothing is left in full precision without being named, and what is named as rounded is."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.propagation import decompose, relative_error
from beyond_outliers.quantizers import (
    CoverageWarning,
    QuantSpec,
    coverage,
    freeze_qat,
    prepare_qat,
    quantize_model,
    quantize_tensor,
)

IDS = torch.arange(12).reshape(2, 6)
SPEC = QuantSpec("int3", "int3")


def q(x):
    return quantize_tensor(x, "int3")


def linear(x, layer):
    return q(x) @ q(layer.weight).T + layer.bias


def left(model, spec=SPEC, **options) -> dict[str, str]:
    """name -> reason of what is left alone; all of it must be in the warning."""
    with pytest.warns(CoverageWarning) as said:
        quantized = quantize_model(model, spec, **options)
    found = {weight.name: weight.reason for weight in quantized.quantization.left_alone}
    assert all(name in str(said[0].message) for name in found)
    with pytest.raises(ValueError, match="left in full precision"):
        quantize_model(model, spec, strict=True, **options)
    return found


def test_this_projects_model_is_rounded_whole():
    model = Olmo2(Olmo2Config(vocab_size=32, width=16, depth=2, n_heads=2))
    quantized = quantize_model(model, QuantSpec(), strict=True)
    table = coverage(quantized)
    assert list(table) == ["name", "kind", "entries", "rounded", "reason"]
    assert len(table) == 13 and table.iloc[-1].tolist() == ["head", "linear", 32 * 16, False, "head"]
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and n != "embedding.weight")
    assert table.attrs["share"] == quantized.quantization.share == matrices / (matrices + 32 * 16)
    assert quantize_model(model, QuantSpec(head=True), strict=True).quantization.share == 1
    assert coverage(quantized, IDS).equals(table)
    assert "W4A4: 92.3% of the entries" in str(quantized.quantization)
    assert coverage(freeze_qat(prepare_qat(model, SPEC))).equals(table)
    quantized.load_state_dict(quantized.state_dict())
    assert coverage(quantized).equals(table)
    with pytest.raises(ValueError, match="Olmo2 has no record"):
        coverage(model)


class Tied(nn.Module):
    """Logits without a head layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(24, 16), nn.Linear(16, 16)

    def forward(self, ids):
        return F.linear(self.hidden(self.embedding(ids)), self.embedding.weight)


def test_a_functional_head_is_found_by_a_watched_pass():
    model = Tied()
    seen = quantize_model(model, SPEC, example=IDS, strict=True).quantization  # the specification leaves heads alone
    assert [(w.name, w.reason) for w in seen.weights] == [("hidden", ""), ("embedding.weight", "head")]
    assert seen.share == 16 * 16 / (16 * 16 + 24 * 16)
    reason = left(model, QuantSpec(head=True), example=IDS)["embedding.weight"]
    assert reason == "parent reads .weight without calling the layer"
    assert "no head was found" in left(model, QuantSpec(head=True))["embedding.weight"]


class Free(nn.Module):
    """Multiplies by one parameter, adds another, and holds one that it does not use."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.mixed, self.added, self.idle = (nn.Parameter(torch.randn(16, 16)) for _ in range(3))

    def forward(self, x):
        return torch.einsum("ti,ij->tj", self.layer(x), self.mixed) + self.added


def test_parameters_outside_of_layers():
    x = torch.randn(16, 16)
    assert set(left(Free())) == {"mixed", "added", "idle"}
    assert left(Free(), example=x) == {"mixed": "the module multiplies by a parameter of its own"}
    assert left(Free(), example=(x,)) == left(Free(), example={"x": x})


def test_layers_that_are_not_rounded_have_their_reasons():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(16, 16),
            "conv": nn.Conv1d(4, 4, 3),
            "lstm": nn.LSTM(16, 16),
            "cell": nn.GRUCell(16, 16),
            "bilinear": nn.Bilinear(4, 4, 4),
            "table": nn.Embedding(8, 4),
            "norm": nn.LayerNorm((4, 4)),
            "pruned": prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5),
        }
    )
    reasons = left(model)
    assert reasons == {
        "conv": "convolution",
        "lstm.weight_ih_l0": "recurrent layer",
        "lstm.weight_hh_l0": "recurrent layer",
        "cell.weight_ih": "recurrent layer",
        "cell.weight_hh": "recurrent layer",
        "bilinear": "bilinear layer",
        "pruned.weight_orig": "weight computed by a hook",
    }


def test_layers_of_other_quantizers():
    class PackedLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.zeros(16, 16, dtype=torch.int8))

    dynamic = torch.ao.nn.quantized.dynamic.Linear(16, 8)
    halves = nn.Linear(16, 16, dtype=torch.float16)
    eighth = nn.Linear(16, 16)
    eighth.weight = nn.Parameter(eighth.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    reasons = left(nn.Sequential(PackedLinear(), dynamic, eighth, halves, nn.Linear(16, 16)))
    assert reasons == dict.fromkeys("012", "already quantized")
    with pytest.raises(ValueError, match=r"layer '1'.*no weight yet"):
        quantize_model(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), SPEC)


@pytest.mark.parametrize("held", [[nn.Linear(16, 16)], {"a": (nn.Sequential(nn.Linear(16, 16)),)}])
def test_layers_in_python_containers_are_refused_by_name(held):
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].acts, model[0].parts = {"relu": nn.ReLU()}, held
    with pytest.raises(ValueError, match=r"no state_dict: 0\.parts; valid: nn\.ModuleList"):
        quantize_model(model, SPEC)


def test_hooks_run_around_what_replaces_their_layer():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), torch.randn(5, 16)
    model[0].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model[0].register_forward_hook(lambda _, args, kwargs, y: y + 1, with_kwargs=True)
    expected = linear(linear(2 * x, model[0]) + 1, model[1])
    quantized = quantize_model(model, SPEC, strict=True)
    for one in (quantized, prepare_qat(model, SPEC, "ste"), freeze_qat(prepare_qat(model, SPEC, "ste"))):
        torch.testing.assert_close(one(x), expected)
    assert decompose(model, quantized, x)["A"][0] == 0  # also around the evaluations: its input is the same


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", list(PARAMETRIZED))
def test_parametrized_layers_are_rounded_and_do_not_train(name):
    torch.manual_seed(0)
    model, x = nn.Sequential(PARAMETRIZED[name](nn.Linear(16, 16)), nn.Linear(16, 16)).double(), torch.randn(5, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantized = quantize_model(model, SPEC, strict=True)  # in training mode: spectral norm's own state must stay
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.eval()
    torch.testing.assert_close(quantized(x.double()), linear(linear(x.double(), model[0]), model[1]))
    with pytest.raises(ValueError, match="layer '0': parametrized weights train through no quantizer"):
        prepare_qat(model, SPEC)


class ReadsPast(nn.Module):
    """Multiplies by a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.idle = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return self.called(x) @ self.read.weight.T


def test_layers_that_are_read_and_layers_that_are_idle():
    torch.manual_seed(0)
    model, x = ReadsPast(), torch.randn(5, 16)
    unwatched = quantize_model(model, SPEC)
    for measure in (decompose, relative_error):
        with pytest.raises(ValueError, match=r"never ran, whose weights another module reads: read$"):
            measure(model, unwatched, x)
    assert not coverage(unwatched, x).set_index("name")["rounded"]["read"]
    watched = quantize_model(model, SPEC, example=x)
    assert left(model, example=x) == {"read": "parent reads .weight without calling the layer"}
    torch.testing.assert_close(watched(x), linear(x, model.called) @ model.read.weight.T)
    with pytest.warns(CoverageWarning, match="never ran in this measurement: idle"):
        decompose(model, watched, x)
    assert watched.quantization.never_ran == ["idle"] and "never ran  idle" in str(watched.quantization)
    weights_alone = quantize_model(model, QuantSpec("int3", "none"), strict=True, example=x)
    torch.testing.assert_close(
        weights_alone(x), F.linear(x, q(model.called.weight), model.called.bias) @ q(model.read.weight).T
    )


@pytest.mark.parametrize("make", [quantize_model, prepare_qat])
def test_the_first_pass_names_layers_that_did_not_run(make):
    """Once, and once in every copy; a pass that failed was none. What a conversion has watched needs no word."""
    torch.manual_seed(0)
    model, x = ReadsPast(), torch.randn(5, 16)
    made = make(model, SPEC)
    for one in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made):
        with pytest.raises((RuntimeError, ValueError)):
            one(torch.randn(5, 3))
        with pytest.warns(CoverageWarning, match=r"first pass: read, idle\. Where another module reads their weights"):
            y = one(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error", CoverageWarning)
            assert torch.equal(one(x), y)
        assert not any(m._forward_hooks for m in one.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoverageWarning)
        torch.compile(make(model, SPEC), backend="eager")(x)
        make(nn.Sequential(nn.Linear(16, 16)), SPEC)(x)
    assert not make(model, SPEC, example=x)._forward_pre_hooks


def test_gptq_reports_as_well():
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    found = left(Free(), QuantSpec(method="gptq"), calibration=[x[:16], x[16:32]])
    assert list(found) == ["mixed"]

    class HalfRouter(nn.Linear):
        def forward(self, x):
            return super().forward(x)[..., : self.out_features // 2]

    model = nn.Sequential(nn.Linear(16, 16), HalfRouter(16, 8))
    table = coverage(quantize_model(model, QuantSpec(method="gptq"), calibration=x, strict=True))
    assert table["rounded"].all() and table["reason"].tolist() == [
        "",
        "rounded to nearest: GPTQ takes linear layers only",
    ]
