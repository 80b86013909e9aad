"""The ABC decomposition against a NumPy implementation of its definitions, and its identities on real module trees."""

import copy
import gc

import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn

from beyond_outliers.model import Llama, LlamaConfig, Olmo2, Olmo2Config, ReluSquared, ResidualAdd
from beyond_outliers.propagation import decompose, relative_error, summarise
from beyond_outliers.quantizers import QuantSpec, freeze_qat, prepare_qat, quantize_model
from rounded_models import ids, olmo, quantize

COLUMNS = ["index", "name", "kind", "R", "A", "B", "C", "gain"]

RATIOS = ["spectral_ratio", "alignment_ratio", "cos_phi", "cos_psi"]


def llama():
    torch.manual_seed(0)
    return Llama(LlamaConfig(vocab_size=200, width=32, depth=2, n_heads=2)).double()


class ThreeLayers(nn.Module):
    """x -> up -> relu^2 -> down -> + x -> out."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 10, bias=True)
        self.activation = ReluSquared()
        self.down = nn.Linear(10, 6, bias=False)
        self.add = ResidualAdd()
        self.out = nn.Linear(6, 5, bias=False)

    def forward(self, x):
        return self.out(self.add(x, self.down(self.activation(self.up(x)))))


# ------------------------------------------------------------------------------------------- the independent check


def numpy_rounded(x):
    scale = np.abs(x).max(-1, keepdims=True) / 7
    return np.round(x / np.where(scale == 0, 1, scale)) * scale


def numpy_reference(weights, bias, x):
    """Rows of the definitions, written out for ThreeLayers: {name: {column: value}}."""
    linears = {name: (w, numpy_rounded(w), bias if name == "up" else 0.0) for name, w in weights.items()}

    def plain(name):
        return lambda h: h @ linears[name][0].T + linears[name][2]

    def quant(name):
        return lambda h: numpy_rounded(h) @ linears[name][1].T + linears[name][2]

    def relu2(h):
        return np.maximum(h, 0) ** 2

    def norm2(*tensors):
        return sum((t**2).sum() for t in tensors)

    rows = {}

    def visit(name, f, fq, h, hq):
        """h, hq: tuples of inputs."""
        y, yq, moved, replaced = f(*h), fq(*hq), f(*hq), fq(*h)
        a = 0.5 * (yq - replaced + moved - y)
        b = 0.5 * (yq - moved + replaced - y)
        changed = [(u, v) for u, v in zip(h, hq, strict=True) if (u != v).any()]
        r_in = norm2(*(v - u for u, v in changed)) / norm2(*(u for u, _ in changed)) if changed else 0.0
        row = {"R": norm2(yq - y), "A": norm2(a), "B": norm2(b), "C": 2 * (a * b).sum()}
        row = {key: value / norm2(y) for key, value in row.items()} | {"R_in": r_in}
        row["gain"] = row["A"] / r_in if r_in else np.nan
        if name in linears:
            w, wq, _ = linears[name]
            middle, dh = (w + wq) / 2, hq[0] - h[0]
            top, top_middle = np.linalg.svd(w)[1][0], np.linalg.svd(middle)[1][0]
            row["spectral_ratio"] = (top_middle / top) ** 2
            row["cos_psi"] = np.sqrt(norm2(y) / norm2(h[0])) / top
            if r_in:
                row["cos_phi"] = np.sqrt(norm2(dh @ middle.T) / norm2(dh)) / top_middle
                row["alignment_ratio"] = (row["cos_phi"] / row["cos_psi"]) ** 2
        rows[name] = row
        return (y,), (yq,)

    start = (x,), (x,)
    h, hq = visit("up", plain("up"), quant("up"), *start)
    h, hq = visit("activation", relu2, relu2, h, hq)
    h, hq = visit("down", plain("down"), quant("down"), h, hq)
    h, hq = visit("add", np.add, np.add, start[0] + h, start[1] + hq)
    visit("out", plain("out"), quant("out"), h, hq)
    return rows


def test_agrees_with_numpy_on_a_three_layer_residual_network():
    torch.manual_seed(3)
    model = ThreeLayers().double()
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    weights = {name: getattr(model, name).weight.detach().numpy() for name in ("up", "down", "out")}
    reference = numpy_reference(weights, model.up.bias.detach().numpy(), x.numpy())
    table = decompose(model, quantize(model), x.split([1, 2, 1]), reduction="global")
    assert list(table.columns[:8]) == COLUMNS and list(table.columns[8:12]) == RATIOS
    assert list(table["name"]) == list(reference)
    assert list(table["kind"]) == ["linear", "activation", "linear", "residual add", "linear"]
    for name, row in reference.items():
        found = table.set_index("name").loc[name]
        for column, value in row.items():
            assert found[column] == pytest.approx(value, rel=1e-10, abs=1e-13, nan_ok=True), (name, column)
    assert np.isnan(table["gain"][0]) and np.isnan(table["alignment_ratio"][0])  # the first input has no error


# ---------------------------------------------------------------------------------------------------- identities


def ours(spec):
    torch.manual_seed(0)
    model = Olmo2(Olmo2Config(vocab_size=200, width=32, depth=2, n_heads=2)).double()
    return model, quantize_model(model, spec), ids(3, 12)


def biased():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    return model, quantize(model, activations=False), torch.randn(5, 8).double()


def trained():
    model = olmo(torch.float32)
    twin = prepare_qat(model, QuantSpec("int4", "none"))
    twin.load_state_dict(model.state_dict())
    return model.double(), freeze_qat(twin).double(), ids(3, 12)


@pytest.mark.parametrize(
    ("make", "linears"),  # without those whose input has no error, as the first q, k, v
    [
        (lambda: (olmo(), quantize(olmo(), activations=False), ids(3, 12)), 10),
        (biased, 1),
        (trained, 10),
        (lambda: ours(QuantSpec(activations="none")), 10),
        (lambda: ours(QuantSpec("mxfp4", "none")), 10),
        (lambda: ours(QuantSpec("int4", "none", rotate=True, head=True)), 10),
    ],
)
def test_gain_is_spectral_times_alignment_when_only_weights_are_quantized(make, linears):
    table = decompose(*make(), attention="open", reduction="global")
    np.testing.assert_allclose(table["R"], table["A"] + table["B"] + table["C"], rtol=0, atol=1e-14)
    linear = table[(table["kind"] == "linear") & (table["R_in"] > 0)]
    assert len(linear) == linears and table["R"].iloc[-1] > 1e-3
    np.testing.assert_allclose(linear["gain"], linear["spectral_ratio"] * linear["alignment_ratio"], rtol=1e-9)
    np.testing.assert_allclose(linear["alignment_ratio"], (linear["cos_phi"] / linear["cos_psi"]) ** 2, rtol=1e-12)


def test_unchanged_functions_and_unchanged_inputs():
    model = olmo()
    table = decompose(model, quantize(model, skip=("head",)), ids(2, 10), attention="open").set_index("name")
    untouched = table["kind"] != "linear"
    untouched["head"] = True
    assert (table.loc[untouched, ["B", "C"]] == 0).all().all()
    assert (table.loc[["blocks.0.attention.q", "blocks.0.attention.k"], ["A", "C"]] == 0).all().all()
    assert table.loc["embedding", "R"] == 0


def test_rows_of_every_granularity_describe_the_same_run():
    model = olmo()
    quantized, batch = quantize(model), ids(2, 10)
    whole = relative_error(model, quantized, batch).value
    tables = [decompose(model, quantized, batch, view).set_index("name") for view in ("module", "sublayer", "block")]
    module, _, table = tables
    for other in tables:
        assert other["R"].iloc[-1] == pytest.approx(whole, rel=1e-12)
    assert module["R"]["blocks.0.mlp_add"] == pytest.approx(table["R"]["blocks.0"], rel=1e-12)
    assert list(table.index) == ["embedding", "blocks.0", "blocks.1", "final_norm", "head"]


@pytest.mark.parametrize("make", [olmo, llama])
@pytest.mark.parametrize("reduction", ["global", "token"])
@pytest.mark.parametrize(
    "view", [("module", "unit"), ("module", "open"), ("sublayer", "unit"), ("block", "unit")], ids="-".join
)
def test_our_models_have_the_rows_that_a_model_of_which_nothing_is_known_would_have(make, view, reduction, monkeypatch):
    model, batches = make(), [ids(2, 10), ids(3, 10, seed=1)]
    quantized = quantize_model(model, QuantSpec(head=True))
    found = decompose(model, quantized, batches, *view, reduction)
    assert found[["R", "A", "B", "C"]].notna().all().all() and found["R"].iloc[-1] > 0.01
    np.testing.assert_allclose(found["R"], found["A"] + found["B"] + found["C"], rtol=0, atol=1e-14)
    monkeypatch.setattr("beyond_outliers.propagation.decomposition._known", lambda module: False)
    assert_frame_equal(found, decompose(model, quantized, batches, *view, reduction), check_exact=True)


def test_open_attention_shows_its_parts_and_leaves_the_rest_alone():
    model = olmo()
    quantized, batch = quantize(model), ids(2, 10)
    unit = decompose(model, quantized, batch).set_index("name")
    opened = decompose(model, quantized, batch, attention="open").set_index("name")
    summary = summarise(unit.reset_index())
    assert summary["R_L"] == unit["R"].iloc[-1] and summary["mean_B"] == pytest.approx(unit["B"].mean())
    assert summary["linear_gain"] == pytest.approx(unit[unit["kind"] == "linear"]["gain"].mean())
    inside = opened.index[opened.index.str.startswith("blocks.0.attention.")].str.removeprefix("blocks.0.attention.")
    assert list(inside) == [
        *("q", "k", "v", "rotary", "rotary#2", "qk_norm", "mixing.scores", "mixing.softmax", "mixing.mix", "out")
    ]
    assert not opened["kind"].str.contains("functional").any()
    outside = unit.index[~unit.index.str.endswith("attention")]
    np.testing.assert_allclose(opened.loc[outside, "R"], unit.loc[outside, "R"], rtol=1e-9)
    # the attention unit ends where its output projection ends
    assert unit["R"]["blocks.1.attention"] == pytest.approx(opened["R"]["blocks.1.attention.out"], rel=1e-9)
    # rotation keeps lengths: the tables that it also takes are no activations
    assert opened["gain"]["blocks.1.attention.rotary"] == pytest.approx(1.0, rel=1e-12)


def test_future_positions_do_not_count():
    model = olmo()
    quantized, batch = quantize(model), ids(2, 6)
    table = decompose(model, quantized, batch, attention="open", reduction="global").set_index("name")
    found = {}
    for key, network in (("h", model), ("hq", quantized)):
        mixer = network.blocks[0].attention.mixing
        mixer.opened = True
        mixer.scores.register_forward_hook(lambda _, args, out, key=key: found.__setitem__(key, out.detach().numpy()))
        with torch.no_grad():
            network(batch)
    past = np.isfinite(found["h"])
    assert past.mean() == pytest.approx(7 / 12)
    expected = ((found["hq"][past] - found["h"][past]) ** 2).sum() / (found["h"][past] ** 2).sum()
    assert table["R"]["blocks.0.attention.mixing.scores"] == pytest.approx(expected, rel=1e-10)


# ------------------------------------------------------------------------------------------ streaming and reduction


@pytest.mark.parametrize("reduction", ["global", "token"])
def test_batches_stream(reduction):
    model = olmo()
    quantized, batch = quantize(model), ids(6, 8)
    numbers = ["R", "A", "B", "C", "gain", *RATIOS, "R_in"]
    once = decompose(model, quantized, batch, attention="open", reduction=reduction)
    pieces = decompose(model, quantized, iter(batch.split([1, 3, 2])), attention="open", reduction=reduction)
    np.testing.assert_allclose(once[numbers], pieces[numbers], rtol=1e-9, atol=1e-15)


def test_token_reduction_is_the_mean_of_the_tokens_ratios():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    quantized = quantize(layer)
    x = torch.randn(9, 5).double()
    x[3] = 0  # no relative error: not counted
    with torch.no_grad():
        y, yq = layer(x), quantized(x)
    ratio = ((yq - y).square().sum(-1) / y.square().sum(-1))[torch.arange(9) != 3]
    assert decompose(layer, quantized, x)["R"][0] == pytest.approx(float(ratio.mean()), rel=1e-12)
    whole = (yq - y).square().sum() / y.square().sum()
    assert decompose(layer, quantized, x, reduction="global")["R"][0] == pytest.approx(float(whole), rel=1e-12)


def test_memory_stays_within_one_pass_of_one_batch():
    depth, most = 12, 0
    model = nn.Sequential(*(nn.Linear(31, 31) for _ in range(depth)))
    quantized = quantize(model)

    def count(*_):
        nonlocal most
        most = max(most, sum(type(o) is torch.Tensor and o.shape == (97, 31) for o in gc.get_objects()))

    for module in quantized:
        module.register_forward_hook(count)
    gc.freeze()  # what was there before need not be looked through every time
    try:
        decompose(model, quantized, (torch.randn(97, 31) for _ in range(3)))
    finally:
        gc.unfreeze()
    assert depth < most <= depth + 8  # all layers of one pass, and what one module needs


# ------------------------------------------------------------------------------------------------ foreign modules


class ForeignBlock(nn.Module):
    """A residual add that is no module, keyword arguments, a dictionary as output, a mask among the inputs."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, *, hidden, mask):
        return {"hidden": hidden + self.dropout(self.linear(self.norm(hidden))) * mask, "count": 1}


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.layers = nn.ModuleList(ForeignBlock() for _ in range(2))
        self.head = nn.Linear(6, 20)

    def forward(self, tokens, scale=1.0):
        h = self.embed(tokens)
        mask = torch.ones(h.shape[1], 1, dtype=h.dtype) * scale
        for layer in self.layers:
            h = layer(hidden=h, mask=mask)["hidden"]
        return {"logits": self.head(h).transpose(1, 2)}


def test_what_is_no_module_is_covered_by_the_module_around_it():
    torch.manual_seed(0)
    model = Foreign().double()
    quantized, tokens = quantize(model), torch.randint(0, 20, (3, 5))
    model.train()
    table = decompose(model, quantized, {"tokens": tokens, "scale": 2.0}, reduction="global").set_index("name")
    assert list(table.index) == [
        *("embed", "layers.0.norm", "layers.0.linear", "layers.0"),
        *("layers.1.norm", "layers.1.linear", "layers.1", "head"),
    ]
    assert table["kind"]["layers.1"] == "block (functional parts)"
    assert not table["kind"].drop(["layers.0", "layers.1"]).str.contains("functional").any()
    assert model.layers[0].dropout.training
    model.eval(), quantized.eval()
    with torch.no_grad():
        mask = torch.full((5, 1), 2.0, dtype=torch.float64)
        h = model.layers[0](hidden=model.embed(tokens), mask=mask)["hidden"]
        hq = quantized.layers[0](hidden=model.embed(tokens), mask=mask)["hidden"]
        f, fq = model.layers[1], quantized.layers[1]
        y, yq, moved, replaced = (
            function(hidden=x, mask=mask)["hidden"] for function, x in ((f, h), (fq, hq), (f, hq), (fq, h))
        )
        a, b = (yq - replaced + moved - y) / 2, (yq - moved + replaced - y) / 2
        row, size = table.loc["layers.1"], y.square().sum()
        assert row["A"] == pytest.approx(float(a.square().sum() / size), rel=1e-10)
        assert row["B"] == pytest.approx(float(b.square().sum() / size), rel=1e-10)
        # the mask is an input that the models share: it does not count
        assert row["R_in"] == pytest.approx(float((hq - h).square().sum() / h.square().sum()), rel=1e-10)
    last = decompose(model, quantized, [(tokens, 2.0)], "block", reduction="global")["R"].iloc[-1]
    assert last == pytest.approx(table["R"]["head"])


def test_nothing_stays_behind_even_after_an_error():
    model = olmo(torch.float32)
    quantized = quantize(model)
    model.train()

    def clean():
        hooked = any(m._forward_hooks or m._forward_pre_hooks for n in (model, quantized) for m in n.modules())
        return model.training and not hooked and not model.blocks[0].attention.mixing.opened

    decompose(model, quantized, ids(2, 5), attention="open")
    assert clean()
    with pytest.raises(IndexError):
        decompose(model, quantized, [ids(2, 5), ids(2, 5) + 1000], attention="open")
    assert clean()


def test_bad_input_is_named():
    model = olmo(torch.float32)
    quantized = quantize(model)
    for option, value in (("granularity", "layer"), ("attention", "closed"), ("reduction", "row")):
        with pytest.raises(ValueError, match=f"{option} '{value}'; valid"):
            decompose(model, quantized, ids(1, 4), **{option: value})
    with pytest.raises(ValueError, match="no batch"):
        decompose(model, quantized, [])
    with pytest.raises(ValueError, match="no batch"):
        relative_error(model, quantized, [])
    other = copy.deepcopy(quantized)
    del other.blocks[1]
    with pytest.raises(ValueError, match=r"lacks.*blocks\.1\."):
        decompose(model, other, ids(1, 4))
    other = copy.deepcopy(quantized)
    other.blocks[1].forward = lambda x: x
    with pytest.raises(ValueError, match=r"does not run.*blocks\.1\."):
        decompose(model, other, ids(1, 4))
    with pytest.raises(ValueError, match="sample"):
        relative_error(model, quantized, ids(4, 4), sample=1)
    with pytest.raises(ValueError, match=r"confidence.*95"):
        relative_error(model, quantized, ids(4, 4), confidence=95)


class Sparse(nn.Module):
    """An expert that gets the rows of a large first feature: none here."""

    def __init__(self):
        super().__init__()
        self.first, self.expert = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        y = self.first(x)
        chosen = y[:, 0] > 1e9
        y[chosen] = self.expert(y[chosen])
        return y


@pytest.mark.parametrize("reduction", ["global", "token"])
def test_an_expert_without_tokens_has_a_row_of_nan(reduction):
    torch.manual_seed(0)
    model, x = Sparse(), torch.randn(6, 16)
    table = decompose(model, quantize_model(model, QuantSpec()), [x, -x], reduction=reduction).set_index("name")
    assert table.loc["expert", ["R", "A", "B", "C", "gain", "cos_phi"]].isna().all()
    assert table.loc["first", "R"] == pytest.approx(table["R"].iloc[-1]) and table.loc["first", "R"] > 0


class Lookup(nn.Module):
    """Adds the entries of a table that its input picks, as Doge's experts are looked up."""

    def __init__(self):
        super().__init__()
        self.router, self.table = nn.Linear(16, 8, bias=False), nn.Embedding(9, 16)

    def forward(self, x):
        return x + self.table(self.router(x).argmax(-1))


def test_a_lookup_of_other_entries_has_no_relative_error_of_its_input():
    torch.manual_seed(0)
    model, x = Lookup(), torch.randn(4, 64, 16)
    rows = decompose(model, quantize_model(model, QuantSpec("int2", "int2")), x).set_index("name")
    assert rows.A["table"] > 0 and np.isnan(rows.R_in["table"]) and np.isnan(rows.gain["table"])
    rows = decompose(model, quantize_model(model, QuantSpec("int8", "none")), x[:1, :4]).set_index("name")
    assert rows.R_in["table"] == rows.A["table"] == 0
