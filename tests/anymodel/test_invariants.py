"""A decomposition that would not be about the same thing: refused, or put right, with values from outside."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from beyond_outliers.metrics import activation_metrics
from beyond_outliers.modules import evaluating, forward
from beyond_outliers.passes import main_output
from beyond_outliers.propagation import decompose, relative_error
from beyond_outliers.quantizers import CoverageWarning, QuantSpec, quantize_model
from rounded_models import quantize, squared_error

SPEC = QuantSpec("int3", "none")
NUMBERS = ["R", "A", "B", "C", "R_in"]
TEXT = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
TEXT |= {"pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}


@pytest.mark.filterwarnings("ignore")
def test_a_cache_in_a_nested_configuration_is_off():
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text, vision = tf.LlamaConfig(**TEXT), tf.CLIPVisionConfig(**VISION)
    model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=159))
    tokens = torch.randint(4, 150, (2, 10), generator=torch.Generator().manual_seed(1))
    quantized = quantize_model(model.eval(), QuantSpec(), example=tokens)
    table = decompose(model, quantized, tokens, reduction="global")
    first = table[table["kind"].str.startswith("attention")].iloc[0]
    assert first["R_in"] == first["A"] == 0 < first["B"] and first["R"] == first["B"]
    assert model.config.text_config.use_cache and quantized.config.text_config.use_cache  # as they were
    expected = squared_error(model, quantized, tokens, use_cache=False)
    assert table["R"].iloc[-1] == pytest.approx(expected, rel=1e-6)


def test_every_configuration_gets_its_switch_back():
    class Config:
        def __init__(self, **values):
            vars(self).update(values)

    model = nn.Sequential(nn.Linear(2, 2))
    deep = Config(use_cache=True)
    model.config = Config(use_cache=False, text_config=Config(decoder_config=deep))
    model[0].generation_config = Config(use_cache=True)
    with evaluating(model):
        assert not (deep.use_cache or model[0].generation_config.use_cache)
    assert deep.use_cache and model[0].generation_config.use_cache and not model.config.use_cache


@pytest.mark.parametrize("given", [{"use_cache": True}, {"past_key_values": [torch.ones(1)]}])
def test_a_batch_that_brings_a_cache_is_refused(given):
    with pytest.raises(ValueError, match=f"the batch has {next(iter(given))}"):
        forward(nn.Linear(2, 2), {"input": torch.ones(1, 2), **given})


class Cell(nn.Module):
    """A linear layer after a step that `step` gives: what is wrong with it lies there."""

    def __init__(self, step):
        super().__init__()
        self.step, self.linear = step, nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.step(x))


class Growing(nn.Module):
    """Adds up everything that it ever saw, as a cache does."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return torch.stack(self.seen).sum(0)


class Forgetful(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class Global(nn.Module):
    """Follows a number that is no part of it."""

    scale = 1.0

    def forward(self, x):
        return x * Global.scale


@pytest.mark.parametrize("depth", [0, 1])
def test_a_module_that_remembers_is_refused_by_name(depth):
    model = nn.Sequential(*(Cell(nn.Tanh()) for _ in range(depth)), Cell(Growing()))
    with pytest.raises(ValueError, match=rf"module '{depth}\.step' gives another output for the same input"):
        decompose(model, quantize(model), torch.randn(3, 8))


def test_dropout_without_a_mode_is_refused_by_name():
    model = nn.Sequential(Cell(nn.Tanh()), Cell(Forgetful()))
    quantized, x = quantize(model), torch.randn(3, 8)
    for measure in (decompose, relative_error):
        with pytest.raises(ValueError, match=r"random numbers in evaluation mode, drawn in 1\.step \(.*training="):
            measure(model, quantized, x)
    with pytest.raises(ValueError, match=r"1\.step"):
        activation_metrics(model, x)


def test_numbers_that_are_drawn_and_not_used_do_no_harm():
    class Idle(nn.Module):
        def forward(self, x):
            torch.rand(())
            return x.tanh()

    torch.manual_seed(0)
    idle, plain, x = Cell(Idle()), Cell(nn.Tanh()), torch.randn(3, 8)
    plain.linear = idle.linear
    found, expected = (decompose(model, quantize(model), x) for model in (idle, plain))
    np.testing.assert_array_equal(found[NUMBERS], expected[NUMBERS])


def test_an_unchanged_module_that_behaves_otherwise_is_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8), Cell(Global()))
    quantized = quantize(model)
    quantized.register_forward_pre_hook(lambda *_: setattr(Global, "scale", 2.0))
    model.register_forward_pre_hook(lambda *_: setattr(Global, "scale", 1.0))
    # while the quantized model runs, both models' modules are evaluated with its number: f(h) is no longer what it was
    with pytest.raises(ValueError, match=r"module '1\.step' (is the same in both models|gives another output)"):
        decompose(model, quantized, torch.randn(3, 8))
    Global.scale = 1.0


def test_a_changed_attribute_is_a_changed_function():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = 1.0

        def forward(self, x):
            return x * self.factor

    model = Cell(Scaled())
    other = copy.deepcopy(model)
    other.step.factor = 1.5
    row = decompose(model, other, torch.randn(3, 8)).iloc[0]
    assert row["B"] == row["R"] == pytest.approx(0.25) and row["A"] == 0


# ------------------------------------------------------------------------------------------- what a model answers


def test_main_output():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    cases = [
        (a, [1]),
        ((a, (b, c)), [1]),
        ((torch.tensor(1), a), [1]),
        (((a, b), c), [1, 2, 3]),
        ({"loss": a, "logits": b, "hidden_states": (c,)}, [2]),
        ({"start_logits": a, "end_logits": b, "attentions": (c,)}, [1, 2]),
        ({"last_hidden_state": b, "pooler_output": a}, [2]),
        ({"image_embeds": a, "text_embeds": b, "text_hidden_states": (c,)}, [1, 2]),
    ]
    for output, sizes in cases:
        assert [len(x) for x in main_output(output)] == sizes, output
    assert main_output(torch.ones(3, dtype=torch.complex64))[0].shape == (6,)


# --------------------------------------------------------------------------------------------- how it is called


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, *, hidden):
        return self.down(input=self.up(input=hidden).relu())


def test_layers_that_are_called_by_keyword():
    torch.manual_seed(0)
    model, x = ByKeyword(), torch.randn(64, 8)
    twin = nn.Sequential(model.up, nn.ReLU(), model.down)
    batch = {"hidden": x}
    ours, theirs = activation_metrics(model, batch), activation_metrics(twin, x)
    np.testing.assert_array_equal(ours["expected_error"], theirs["expected_error"])
    spec = QuantSpec(method="gptq")
    ours, theirs = quantize_model(model, spec, batch), quantize_model(twin, spec, x)
    assert torch.equal(ours.down.rounded, theirs[2].rounded)
    found = decompose(model, ours, batch).set_index("name").loc[["up", "down"], NUMBERS]
    expected = decompose(twin, theirs, x).set_index("name").loc[["0", "2"], NUMBERS]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_batches_as_a_data_loader_gives_them():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(6, 8)
    quantized = quantize(model)
    lists = DataLoader(TensorDataset(x), batch_size=2)
    mappings = DataLoader([{"input": row} for row in x], batch_size=2)
    expected, exact = decompose(model, quantized, x.split(2)), relative_error(model, quantized, x.split(2))
    for loader in (lists, mappings):
        found = decompose(model, quantized, loader)
        np.testing.assert_array_equal(found[NUMBERS], expected[NUMBERS])
        assert relative_error(model, quantized, loader) == exact
        np.testing.assert_array_equal(activation_metrics(model, loader)["mmr"], activation_metrics(model, x)["mmr"])
        assert relative_error(model, quantized, loader, sample=3).n_sequences == 3


def test_a_model_that_changes_its_input_and_activations_in_place():
    class Hasty(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.first, self.relu, self.second = nn.Linear(8, 8), nn.ReLU(in_place), nn.Linear(8, 8)
            self.in_place = in_place

        def forward(self, x):
            y, scale = self.relu(self.first(x)), torch.linspace(0, 30, 8, dtype=x.dtype)
            if self.in_place:
                return y.add_(self.second(x.mul_(scale)))
            return y + self.second(x * scale)

    torch.manual_seed(0)
    hasty, careful, x = Hasty(True).double(), Hasty(False).double(), torch.randn(5, 8).double()
    careful.load_state_dict(hasty.state_dict())
    before, columns = x.clone(), ["mmr", "kurtosis", "input_error", "expected_error"]

    def measured(model):
        quantized = quantize(model)
        error = relative_error(model, quantized, x).value
        return decompose(model, quantized, x)[NUMBERS], activation_metrics(model, x)[columns], error

    expected = measured(careful)
    for inference in (False, True):
        with torch.inference_mode(inference):
            for found, table in zip(measured(hasty), expected, strict=True):
                np.testing.assert_allclose(found, table, rtol=1e-12)
    assert torch.equal(x, before)


def test_conv1d_is_the_linear_layer_that_it_is():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    conv, x = transformers.pytorch_utils.Conv1D(12, 16), torch.randn(20, 16)
    conv.weight.data *= 20
    linear = nn.Linear(16, 12)
    linear.weight.data, linear.bias.data = conv.weight.data.T.contiguous(), conv.bias.data
    ours, theirs = (
        decompose(nn.Sequential(one), quantize_model(nn.Sequential(one), SPEC), x) for one in (conv, linear)
    )
    columns = ["R", "B", "spectral_ratio", "cos_psi"]
    np.testing.assert_allclose(ours[columns], theirs[columns], rtol=1e-5)
    ours, theirs = (activation_metrics(one, x)["expected_error"] for one in (conv, linear))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


class Spectrum(nn.Module):
    """A linear layer, its output's transform, and a layer of complex weights."""

    def __init__(self):
        super().__init__()
        self.real, self.transform = nn.Linear(8, 8), Transform()
        self.wave = nn.Linear(8, 8, dtype=torch.complex128)

    def forward(self, x):
        return self.wave(self.transform(self.real(x))).abs()


class Transform(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x)


def test_complex_numbers_count_as_pairs_and_complex_weights_are_left_alone():
    torch.manual_seed(0)
    model, x = Spectrum(), torch.randn(5, 8).double()
    model.real.double()
    with pytest.warns(CoverageWarning, match=r"wave \(complex numbers\)"):
        quantized = quantize_model(model, QuantSpec())
    table = decompose(model, quantized, x).set_index("name")
    with torch.no_grad():
        h, hq = (np.fft.fft(one.real(x).numpy()) for one in (model, quantized))
    expected = (np.abs(hq - h) ** 2).sum(-1) / (np.abs(h) ** 2).sum(-1)
    # Parseval: the transform stretches every vector alike
    assert table.loc["transform", "R"] == pytest.approx(expected.mean(), rel=1e-12)
    assert table.loc["real", "R"] == pytest.approx(table.loc["transform", "R"], rel=1e-12)
    assert table.loc["wave", "kind"] == "own linear" and np.isnan(table.loc["wave", "spectral_ratio"])
    assert table.loc["wave", "B"] == 0 and activation_metrics(model, x)["name"].tolist() == ["real"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_matrix_of_zeros_has_no_ratios():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[1].weight)
    table = decompose(model, quantize(model), torch.randn(5, 8))
    assert table.loc[1, ["spectral_ratio", "cos_phi", "cos_psi", "alignment_ratio"]].isna().all()
    assert (table.loc[1, ["R", "A", "B"]] == 0).all() and table.loc[2, "spectral_ratio"] > 0


# ------------------------------------------------------------------------------------------------------- experts


class Experts(nn.Module):
    """Sends each token to the expert with the largest of two scores, which a linear layer gives."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, x):
        rows, chosen = x.flatten(0, -2), self.router(x.flatten(0, -2)).argmax(-1)
        y = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            picked = (chosen == i).nonzero().squeeze(-1)
            y.index_add_(0, picked, expert(rows[picked]))
        return y.view(x.shape)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(8, 8), Experts(), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.mix(self.first(x)))


def test_experts_that_see_other_tokens_have_no_row_and_are_named():
    torch.manual_seed(0)
    model, x = Routed().double(), torch.randn(2, 20, 8).double()
    quantized = quantize(model)
    with torch.no_grad():
        h, hq = model.first(x), quantized.first(x)
        moved = (model.mix.router(h).argmax(-1) != quantized.mix.router(hq).argmax(-1)).sum()
    assert moved > 0
    with pytest.warns(CoverageWarning, match=r"other tokens .*: mix\.experts\.0\.0, mix\.experts\.0\.1, mix\.experts"):
        table = decompose(model, quantized, x, reduction="global").set_index("name")
    assert list(table.index) == ["first", "mix.router", "mix", "last"]
    assert table.loc["last", "R"] == pytest.approx(squared_error(model, quantized, x, None), rel=1e-12)
    # the same number of tokens each, and yet others
    swapped = copy.deepcopy(model)
    swapped.mix.router.weight.data = model.mix.router.weight.data.flip(0)
    swapped.mix.router.bias.data = model.mix.router.bias.data.flip(0)
    half = torch.cat([x.flatten(0, 1)[model.mix.router(h).argmax(-1).flatten() == i][:5] for i in (0, 1)])
    with pytest.warns(CoverageWarning, match="other tokens"):
        assert list(decompose(model, swapped, half)["name"]) == ["first", "mix.router", "mix", "last"]


def test_experts_that_see_the_same_tokens_have_rows_of_right_values():
    torch.manual_seed(0)
    model, x = Routed().double(), torch.randn(2, 20, 8).double()
    quantized = quantize(model, skip=("first", "mix.router"))
    table = decompose(model, quantized, x, reduction="global").set_index("name")
    with torch.no_grad():
        h = model.first(x).flatten(0, 1)
        rows = h[model.mix.router(h).argmax(-1) == 0]
    expected = squared_error(model.mix.experts[0][0], quantized.mix.experts[0][0], rows, None)
    row = table.loc["mix.experts.0.0"]
    assert row["R"] == row["B"] == pytest.approx(expected, rel=1e-12) and row["A"] == 0
    assert (table.loc[["first", "mix.router"], "R"] == 0).all()
