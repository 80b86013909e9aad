"""Coverage of small randomly initialised models of `transformers`: the share rounded, and what is left alone."""

import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from beyond_outliers.metrics import activation_metrics
from beyond_outliers.model import olmo2 as model_module
from beyond_outliers.modules import evaluating, forward
from beyond_outliers.passes import floats
from beyond_outliers.probe import probe
from beyond_outliers.propagation import relative_error
from beyond_outliers.quantizers import QuantSpec, coverage, quantize_model

tf = pytest.importorskip("transformers")

TABLES = tomllib.loads((Path(__file__).parent / "architectures.toml").read_text())
CASES, BASES = TABLES["architectures"], TABLES["bases"]
V = BASES["small"]["vocab_size"]
SAMPLE = {"llama", "gpt2", "bloom", "mamba", "mixtral", "bert", "t5", "vit", "clip", "squeezebert"}  # of every kind


def swept(names) -> list:
    """A sample in `make test`, all of them in `make test-all`."""
    return [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.exhaustive) for name in names]


def build(name: str):
    case = CASES[name]
    torch.manual_seed(0)
    arguments = BASES.get(case.get("base"), {}) | case.get("with", {})
    arguments |= {"forced_eos_token_id": None} if case.get("base") == "pair" else {}
    config, model = getattr(tf, case["config"])(**arguments), getattr(tf, case.get("model", "AutoModelForCausalLM"))
    return (model.from_config(config) if hasattr(model, "from_config") else model(config)).eval()


def inputs(kind: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, V, (2, 12), generator=generator)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return {
        "ids": {"input_ids": ids},
        "pixels": {"pixel_values": pixels},
        "pair": {"input_ids": ids, "decoder_input_ids": ids[:, :8]},
        "both": {"input_ids": ids, "pixel_values": pixels},
    }[kind]


def outputs(model, batch) -> list:
    with evaluating(model):
        return floats(forward(model, batch))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", swept(CASES))
def test_coverage(name):
    case, model = CASES[name], build(name)
    kind, left = case.get("inputs", "ids"), tuple(case.get("left", ()))
    batch = inputs(kind)

    # rotating both operands of every product changes nothing, if all of them are the right ones the right way round
    rotated = quantize_model(model, QuantSpec("none", "none", rotate=True), example=batch)
    for y, expected in zip(outputs(rotated, batch), outputs(model, batch), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))

    quantized = quantize_model(model, QuantSpec(), example=batch)
    record, table = quantized.quantization, coverage(quantized)
    names = [weight.name for weight in record.left_alone]
    assert all(name.endswith(left) for name in names) if left else not names
    assert all(any(name.endswith(end) for name in names) for end in left)
    heads = table[table["reason"] == "head"]
    assert len(heads) == ("model" not in case or kind == "pair" or name == "siglip_both")
    expected = 1 - (heads["entries"].sum() + sum(w.entries for w in record.left_alone)) / table["entries"].sum()
    assert table.attrs["share"] == pytest.approx(expected) and table["name"].is_unique
    # every matrix of the model is in the table, but for tables, positions and what else is only added or looked up
    assert not any(weight.reason.startswith("parameter outside") for weight in record.weights)
    if names:
        with pytest.raises(ValueError, match=names[0].replace(".", r"\.")):
            quantize_model(model, QuantSpec(), strict=True, example=batch)
    else:
        assert quantize_model(model, QuantSpec(), strict=True).quantization.share == record.share
    error = relative_error(model, quantized, [batch], reduction="global").value
    # of SqueezeBERT only the pooler is rounded, which is no part of the hidden states that it answers in
    assert error == 0 if name == "squeezebert" else 0 < error < 3


TEXT = Path(model_module.__file__)
NOT_PROBED = {"squeezebert"}  # nothing but convolutions
PROBED = [name for name, case in CASES.items() if "inputs" not in case and name not in NOT_PROBED]


def test_at_least_sixty_architectures_go_through_probe():
    assert len(PROBED) >= 60 and len(CASES) >= 100


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator([TEXT.read_text()], trainers.BpeTrainer(vocab_size=V - 10, show_progress=False))
    return bpe


def test_layers_that_return_a_scale_beside_their_output(tokenizer):
    """I-BERT's: measured like others, and refused in words where nothing can be rounded."""
    model = tf.IBertModel(tf.IBertConfig(**BASES["shape"])).eval()
    assert len(activation_metrics(model, inputs("ids"))) == 2 * 6 + 1
    with pytest.raises(ValueError, match=r"IBertModel has no nn\.Linear"):
        probe(model, TEXT, tokenizer=tokenizer, context=12, sequences=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", swept(PROBED))
def test_probe(name, tokenizer, capsys):
    model, left = build(name), CASES[name].get("left")
    if left:
        with pytest.raises(ValueError, match="strict=False"):
            probe(model, TEXT, tokenizer=tokenizer, context=12, sequences=4, batch_size=2)
    found = probe(model, TEXT, tokenizer=tokenizer, context=12, sequences=4, batch_size=2, strict=not left)
    assert f"{found.quantization.share:.1%} of the entries" in capsys.readouterr().out
    assert found.modules["R"].iloc[-1] == pytest.approx(found.R_L, rel=1e-5)
    np.testing.assert_allclose(found.modules["R"], found.modules[["A", "B", "C"]].sum(axis=1, skipna=False), atol=1e-12)
