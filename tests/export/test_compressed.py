"""compressed-tensors folders: `transformers` reads the rounded weights back, from files as small as promised."""

from pathlib import Path

import pytest
import torch

from beyond_outliers.export.compressed import export_compressed, fitting_scales
from beyond_outliers.model import olmo2 as model_module
from beyond_outliers.probe import windows
from beyond_outliers.quantizers import QuantSpec, quantize_model, quantize_tensor
from beyond_outliers.quantizers.formats import FORMATS

tf = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
TEXT = Path(model_module.__file__)
SHAPE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE)).save_pretrained(folder)
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


SPECS = [
    QuantSpec("int4", "none"),
    QuantSpec("int4", "none", "block", block=32),
    QuantSpec("int4g64", "none"),
    QuantSpec("int8", "int8"),
    QuantSpec("fp8", "fp8"),
    QuantSpec("nvfp4", "none"),
]
BITS = {"int4": 4, "int4g64": 4, "int8": 8, "fp8": 8, "nvfp4": 4}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_transformers_gives_the_rounded_models_logits(spec, method, folder, tmp_path):
    spec = QuantSpec(spec.weights, spec.activations, spec.granularity, block=spec.block, method=method)
    out = export_compressed(folder, tmp_path / "out", spec, TEXT, windows=2)
    model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(folder), tf.AutoTokenizer.from_pretrained(out)
    ids = windows(tokenizer, TEXT.read_text(), 256, 2)
    quantized = quantize_model(model, spec, ids if method == "gptq" else None)
    config = tf.CompressedTensorsConfig(dequantize=True)
    weights_only = tf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=config)
    plain = quantize_model(model, QuantSpec("int8", "none"))
    for name, module in plain.named_modules():
        if hasattr(module, "rounded"):
            module.rounded.copy_(quantized.get_submodule(name).rounded)
    with torch.no_grad():
        expected = quantized(ids).logits
        near = {"rtol": 1e-2, "atol": 5e-3} if spec.weights == "nvfp4" else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(weights_only(ids).logits, plain(ids).logits, **near)
        if spec.weights != "nvfp4":  # the library unpacks these in bfloat16: they run in no float32 model
            found = tf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-2 * expected.abs().max().item())
    entries = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    rest = sum(p.numel() for n, p in model.named_parameters() if "proj" not in n)
    size = (out / "model.safetensors").stat().st_size
    assert size < entries * BITS[spec.weights] / 8 * 1.2 + 4 * rest + 2e4


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_scales_are_found_that_make_all_entries_levels(spec):
    torch.manual_seed(1)
    weight = torch.randn(8, 128)
    rounded = quantize_tensor(weight, spec.weights, spec.granularity, spec.block)
    moved = rounded * torch.where(torch.rand(8, 128) < 0.2, 0.0, 1.0)  # the largest entries may lack, as after GPTQ
    for given in (rounded, moved):
        scale = fitting_scales(given, weight, spec)
        again = given.unflatten(1, (scale.shape[1], -1)) / scale[..., None]
        torch.testing.assert_close(FORMATS[spec.weights].round_unit(again), again, rtol=1e-4, atol=1e-4)
        assert again.abs().max() <= FORMATS[spec.weights].largest * 1.0001


def test_what_the_format_has_no_words_for_is_refused(folder, tmp_path):
    for spec in (QuantSpec("nf4", "none"), QuantSpec("int4", "int4"), QuantSpec("int8", "none", rotate=True)):
        with pytest.raises(ValueError, match=r"has no .*; valid: weights int4"):
            export_compressed(folder, tmp_path / "x", spec)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(ValueError, match="is not empty"):
        export_compressed(folder, tmp_path / "full", QuantSpec("int8", "none"))
    gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=256, n_embd=32, n_layer=1, n_head=4))
    gpt2.save_pretrained(tmp_path / "gpt2")
    tf.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"holds nn\.Linear alone, not transformer\.h\.0"):
        export_compressed(tmp_path / "gpt2", tmp_path / "y", QuantSpec("int8", "none"))
