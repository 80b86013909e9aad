"""What layers cost, by propagation and by ablation, against exact derivatives; budgets of bits; the words for it."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from beyond_outliers import paths
from beyond_outliers.anymodel import advice
from beyond_outliers.anymodel.sensitivity import Damage, ablate, bits_of, carried, mixed, recommend
from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.model import olmo2 as model_module
from beyond_outliers.probe import probe
from beyond_outliers.propagation import output_readings
from beyond_outliers.quantizers import QuantSpec, quantize_model
from prose_style import wrong

SHAPE = {"vocab_size": 256, "width": 16, "depth": 2, "n_heads": 2}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Olmo2(Olmo2Config(**SHAPE)).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(1))


class Encoder(nn.Module):
    """Hidden states and no logits."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(256, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids):
        return self.down(torch.tanh(self.up(self.table(ids))))


def by_jacobian(model, quantized, ids, name):
    """Var_p(J e) / 2 per token, or ||J e||^2 / ||h||^2, from a directional derivative in float64."""
    model, quantized = model.double(), quantized.double()
    layer, rounded = model.get_submodule(name), quantized.get_submodule(name)

    def answer(size):
        hook = layer.register_forward_hook(lambda m, args, y: y + size * (rounded(args[0]) - y))
        try:
            return model(ids)
        finally:
            hook.remove()

    with torch.no_grad():
        y, step = model(ids), 1e-5
        moved = (answer(step) - answer(-step)) / (2 * step)
    if isinstance(model, Encoder):
        return float(moved.square().sum() / y.square().sum())
    p = y.softmax(-1)
    return float((p * (moved - (p * moved).sum(-1, keepdim=True)).square()).sum(-1).mean() / 2)


@pytest.mark.parametrize("kind", [Olmo2, Encoder])
def test_what_a_layer_costs_is_its_new_error_carried_to_the_end(kind, ids):
    torch.manual_seed(0)
    model = (Olmo2(Olmo2Config(**SHAPE)) if kind is Olmo2 else Encoder()).eval()
    quantized = quantize_model(model, QuantSpec())
    table = carried(model, quantized, ids, samples=300).set_index("name")
    for name in table.index[::3]:
        expected = by_jacobian(model, quantized, ids, name)
        assert table.carried[name] == pytest.approx(expected, rel=0.35), name  # 900 draws, which share their tokens
    assert table.share.sum() == pytest.approx(1) and (table.low < table.carried).all()


def test_new_error_is_that_of_the_layer_alone(model, ids):
    quantized = quantize_model(model, QuantSpec())
    table = carried(model, quantized, ids, samples=1).set_index("name")
    name, seen = "blocks.1.mlp.up", []
    hook = model.get_submodule(name).register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        model(ids)
        hook.remove()
        x, y = seen[0]
        expected = (quantized.get_submodule(name)(x) - y).square().sum() / y.square().sum()
    assert table.B[name] == pytest.approx(float(expected), rel=1e-5)
    assert list(table.index) == [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]


def test_ablation_is_the_damage_without_and_with(model, ids):
    quantized = quantize_model(model, QuantSpec())
    damage = Damage(model, ids)
    table = damage.of(quantized)
    readings = output_readings(model, quantized, ids).value
    assert table.kl.mean() == pytest.approx(readings["kl"], rel=1e-3)
    assert table.increase.mean() == pytest.approx(readings["increase"], rel=1e-2)
    saved = ablate(model, quantized, damage)
    assert saved.shape == (3, 12)
    name = "blocks.0.mlp.down"
    by_hand = quantize_model(model, QuantSpec())
    by_hand.set_submodule(name, quantize_model(model, QuantSpec("int8", "int8")).get_submodule(name))
    assert saved[name].mean() == pytest.approx((table.kl - damage.of(by_hand).kl).mean(), rel=1e-6)
    assert quantized.get_submodule(name).rounded.unique().numel() < 16 * 16  # it stays as it was
    with pytest.raises(ValueError, match="no rounded linear layers: head; valid: blocks"):
        mixed(model, quantized, {"head": 8})
    encoder = Encoder()
    rounded = quantize_model(encoder, QuantSpec())
    assert Damage(encoder, ids).of(rounded).R_L.mean() == pytest.approx(
        output_readings(encoder, rounded, ids).value["R_L"], rel=1e-5
    )


def test_a_budget_goes_where_it_saves_most():
    generator = np.random.default_rng(0)
    layers = pd.DataFrame({"name": list("abcdef"), "entries": 10, "carried": generator.random(6)})
    layers["kurtosis"] = 1 - layers.carried
    bits = recommend(layers, 6.0)
    best = min(
        (mix for mix in itertools.product((4, 8), repeat=6) if sum(mix) <= 36),
        key=lambda mix: sum(c * (7 / (2 ** (b - 1) - 1)) ** 2 for c, b in zip(layers.carried, mix, strict=True)),
    )
    assert tuple(bits) == best and set(bits[bits == 8].index) == set(layers.nlargest(3, "carried").name)
    assert set(recommend(layers, 6.0, "kurtosis").nlargest(3).index) == set(layers.nsmallest(3, "carried").name)
    fine = recommend(layers, 5.0, widths=(3, 4, 5, 6, 8))
    assert fine.mean() <= 5 and fine[layers.name[layers.carried.idxmax()]] >= fine[layers.name[layers.carried.idxmin()]]
    assert set(recommend(layers, 4)) == {4} and set(recommend(layers, 8)) == {8}
    layers["entries"] = [1, 100, 1, 1, 1, 1]
    assert recommend(layers, 4.1)["b"] == 4  # it alone would take more than there is
    for budget, by, words in ((3, "carried", "3 bits; valid: 4 to 8"), (5, "name", "'name' to go by; valid:")):
        with pytest.raises(ValueError, match=words):
            recommend(layers, budget, by)


@pytest.mark.parametrize("name, bits", [("W4A4", 4), ("A8", 8), ("W4g128", 4), ("mxfp6_e2m3", 6), ("FP", 16)])
def test_bits_are_those_of_the_formats_name(name, bits):
    assert bits_of(QuantSpec(weights="int4g128", activations="none") if "g" in name else QuantSpec.named(name)) == bits


def test_words_follow_the_numbers(tokenizer, capsys, tmp_path):
    torch.manual_seed(0)
    model = Olmo2(Olmo2Config(**SHAPE))
    with torch.no_grad():  # a layer already rounded, and one whose input has an outlier
        model.blocks[1].mlp.up.weight.copy_((model.blocks[1].mlp.up.weight * 20).round() / 20)
        model.blocks[0].attention.q.weight.mul_(30)
    found = probe(model, Path(model_module.__file__), tokenizer=tokenizer, context=16, sequences=9)
    text = capsys.readouterr().out
    assert text.index("about") < text.index("entries of matrix-multiply") < text.index(str(found))  # time first
    loss = found.readings.loc["increase"]
    assert f"The loss changes by {loss.value:.3g} [{loss.low:.3g}, {loss.high:.3g}]" in str(found)
    assert f"KL is {found.readings.value['kl']:.3g}" in str(found) and "guesses" not in str(found)
    assert set(found.metrics.n_tokens) == {8 * 16} and found.held_out is not None
    lines = advice.advice(found)
    assert all(f"`{name}`" in lines[0] for name in found.worst(3).name)
    assert f"KL goes from {found.readings.value['kl']:.3g} to {found.kept.value['kl']:.3g}" in lines[1]
    assert found.layers.set_index("name").mmr_mean.idxmax() in lines[2] and "Rotation (`+rot`)" in lines[2]
    assert lines[-1] == "Not quantized: `head`, head." and wrong("\n\n".join([advice.finding(found), *lines])) == []
    two = probe(model, None, QuantSpec("int8", "none"), tokenizer=tokenizer, context=16, sequences=2)
    assert "Only 2 sequences" in str(two) and two.kept is None and two.held_out is None
    two.save(tmp_path)
    assert str(type(two).read(tmp_path)) == str(two)
    assert "The answers of Encoder" in advice.finding(
        probe(Encoder(), None, tokenizer=tokenizer, context=16, sequences=2)
    )


def test_guides_are_judged_on_other_text(model, ids, monkeypatch):
    monkeypatch.syspath_prepend(paths.ROOT / "tests" / "benchmarks")
    from guides import compare_guides

    other = torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(2))
    table = compare_guides(model, QuantSpec(), ids, other, budgets=(5.0,), draws=2)
    kl = table[table.reading == "kl"].set_index(["guide", "bits"])
    assert (kl.n == 4).all() and (kl.low <= kl.value).all() and kl.value["uniform", 8] < kl.value["uniform", 4]
    damage, quantized = Damage(model, other), quantize_model(model, QuantSpec())
    assert kl.value["uniform", 4] == pytest.approx(damage.of(quantized).kl.mean())
    bits = recommend(carried(model, quantized, ids), 5.0)
    by_hand = mixed(model, quantized, bits[bits == 8].to_dict())
    assert kl.value["carried", 5] == pytest.approx(damage.of(by_hand).kl.mean())
    ranks = table[table.reading == "rank correlation"].set_index("guide")
    assert ranks.value.between(ranks.low - 0.2, ranks.high + 0.2).all() and (ranks.value.abs() <= 1).all()
    text = advice.on_guides(table.assign(model="a", optimizer="b"), 5.0)
    assert wrong(text) == [] and f"leaves {kl.value['carried', 5] / kl.value['uniform', 4]:.0%} of the damage" in text
