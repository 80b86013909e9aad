"""Coverage of small randomly initialised models of `transformers`: the share rounded, and what is left alone."""

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

V = 160
SHAPE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 64}
GROUPED = SHAPE | {"num_key_value_heads": 2}
MOE = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64}
GPT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
PAIR = {"vocab_size": V, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
PAIR |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
PAIR |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
PAIR |= {"forced_eos_token_id": None}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = SHAPE | MLA | {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2}
DEEPSEEK |= {"moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
DEEPSEEK |= {"n_shared_experts": 1}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}

IDS = "ids"
PIXELS = "pixels"
PAIRED = "pair"
BOTH = "both"

# name: (configuration class, its arguments, model class, kind of input, ends of the names left alone beside the head)
CAUSAL = {
    "llama": ("LlamaConfig", GROUPED, ()),
    "mistral": ("MistralConfig", GROUPED, ()),
    "olmo": ("OlmoConfig", GROUPED, ()),
    "olmo2": ("Olmo2Config", GROUPED, ()),
    "olmo3": ("Olmo3Config", GROUPED, ()),
    "qwen2": ("Qwen2Config", GROUPED, ()),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}, ()),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 8}, ()),
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 8}, ()),
    "gemma3": ("Gemma3TextConfig", GROUPED | {"head_dim": 8}, ()),
    "phi": ("PhiConfig", GROUPED, ()),
    "phi3": ("Phi3Config", GROUPED, ()),
    "granite": ("GraniteConfig", GROUPED, ()),
    "cohere": ("CohereConfig", GROUPED, ()),
    "glm": ("GlmConfig", GROUPED | {"head_dim": 8}, ()),
    "smollm3": ("SmolLM3Config", GROUPED, ()),
    "stablelm": ("StableLmConfig", GROUPED, ()),
    "starcoder2": ("Starcoder2Config", GROUPED, ()),
    "nemotron": ("NemotronConfig", GROUPED, ()),
    "gpt2": ("GPT2Config", GPT, ()),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT, ()),
    "gptj": ("GPTJConfig", GPT | {"rotary_dim": 4}, ()),
    "codegen": ("CodeGenConfig", GPT | {"rotary_dim": 4}, ()),
    "openai": ("OpenAIGPTConfig", GPT, ()),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        (),
    ),
    "gpt_neox": ("GPTNeoXConfig", SHAPE, ()),
    "opt": ("OPTConfig", SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 32}, ()),
    "bloom": (
        "BloomConfig",
        {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1},
        (),
    ),
    "falcon": ("FalconConfig", SHAPE | {"ffn_hidden_size": 64}, ()),
    "mpt": ("MptConfig", {"vocab_size": V, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, ()),
    "ctrl": (
        "CTRLConfig",
        {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64, "n_positions": 64},
        (),
    ),
    "xglm": (
        "XGLMConfig",
        {
            "vocab_size": V,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 64,
        },
        (),
    ),
    "biogpt": ("BioGptConfig", SHAPE, ()),
    "mamba": (
        "MambaConfig",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        ("conv1d", "dt_proj"),
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "head_dim": 16,
            "num_heads": 4,
            "n_groups": 1,
            "expand": 2,
            "chunk_size": 8,
        },
        ("conv1d",),
    ),
    "rwkv": (
        "RwkvConfig",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
        (),
    ),
    "jamba": (
        "JambaConfig",
        LOCAL
        | {
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        ("conv1d", "dt_proj"),
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        GROUPED | {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
        ("conv_1d", "_gate_weight"),
    ),
    "mixtral": ("MixtralConfig", LOCAL, ()),
    "qwen2_moe": ("Qwen2MoeConfig", MOE | {"shared_expert_intermediate_size": 32}, ()),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | {"head_dim": 8}, ()),
    "olmoe": ("OlmoeConfig", MOE, ()),
    "gpt_oss": ("GptOssConfig", LOCAL | {"head_dim": 8}, ()),
    "phimoe": ("PhimoeConfig", LOCAL, ()),
    "granitemoe": ("GraniteMoeConfig", LOCAL, ()),
    "jetmoe": (
        "JetMoeConfig",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 64,
        },
        (),
    ),
    "dbrx": (
        "DbrxConfig",
        {
            "vocab_size": V,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
        ("mlp.w1", "mlp.v1", "mlp.w2"),
    ),
    "deepseek_v2": ("DeepseekV2Config", DEEPSEEK | {"topk_method": "greedy"}, ()),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK, ()),
    "glm4_moe": (
        "Glm4MoeConfig",
        MOE | {"n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 8, "n_group": 1, "topk_group": 1},
        (),
    ),
    "llama4": (
        "Llama4TextConfig",
        LOCAL | {"head_dim": 8, "intermediate_size_mlp": 64, "moe_layers": [1], "attention_chunk_size": 16},
        (),
    ),
    "minimax": ("MiniMaxConfig", LOCAL | {"head_dim": 8}, ()),
    "lfm2": (
        "Lfm2Config",
        GROUPED | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "block_multiple_of": 8},
        ("conv",),
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        MOE | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1},
        (),
    ),
    "hunyuan_moe": ("HunYuanMoEV1Config", LOCAL | {"head_dim": 8, "moe_topk": 2, "num_experts": 4}, ()),
    "dots1": ("Dots1Config", DEEPSEEK | {"n_group": 1}, ()),
    "flex_olmo": ("FlexOlmoConfig", MOE, ()),
    "lfm2_moe": ("Lfm2MoeConfig", MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, ("conv",)),
    "minimax_m2": ("MiniMaxM2Config", LOCAL | {"head_dim": 8}, ()),
    "longcat": (
        "LongcatFlashConfig",
        SHAPE
        | MLA
        | {
            "num_layers": 1,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "moe_topk": 2,
            "zero_expert_num": 1,
            "head_dim": 8,
        },
        ("router.classifier",),
    ),
    "nemotron_h": (
        "NemotronHConfig",
        GROUPED
        | {
            "head_dim": 8,
            "layers_block_type": ["mamba", "attention", "moe"],
            "num_hidden_layers": 3,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
        },
        ("conv1d",),
    ),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        LOCAL
        | {
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        ("conv1d",),
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        MOE
        | {
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
        ("conv1d",),
    ),
    "zamba2": (
        "Zamba2Config",
        GROUPED
        | {
            "mamba_d_state": 8,
            "mamba_headdim": 16,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "layers_block_type": ["mamba", "hybrid"],
            "chunk_size": 8,
        },
        ("conv1d",),
    ),
    "cohere2_moe": ("Cohere2MoeConfig", MOE, ()),
    "gemma4": (
        "Gemma4TextConfig",
        GROUPED
        | {
            "head_dim": 8,
            "global_head_dim": 8,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "vocab_size_per_layer_input": V,
            "hidden_size_per_layer_input": 8,
        },
        (),
    ),
    "aria": (
        "AriaTextConfig",
        SHAPE | {"num_key_value_heads": 2, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        (),
    ),
    "falcon_h1": (
        "FalconH1Config",
        GROUPED
        | {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
        ("conv1d",),
    ),
    "arcee": ("ArceeConfig", GROUPED, ()),
    "helium": ("HeliumConfig", GROUPED | {"head_dim": 8}, ()),
    "persimmon": ("PersimmonConfig", SHAPE, ()),
    "apertus": ("ApertusConfig", GROUPED, ()),
    "seed_oss": ("SeedOssConfig", GROUPED | {"head_dim": 8}, ()),
    "diffllama": ("DiffLlamaConfig", GROUPED, ()),
    "xlstm": ("xLSTMConfig", {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}, ()),
    "falcon_mamba": (
        "FalconMambaConfig",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        ("conv1d", "dt_proj"),
    ),
}
HIDDEN = {
    "bert": ("BertConfig", SHAPE, ()),
    "roberta": ("RobertaConfig", SHAPE, ()),
    "electra": ("ElectraConfig", SHAPE | {"embedding_size": 16}, ()),
    "albert": ("AlbertConfig", SHAPE | {"embedding_size": 16}, ()),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": V, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        (),
    ),
    "deberta": (
        "DebertaV2Config",
        SHAPE | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
        (),
    ),
    "mpnet": ("MPNetConfig", SHAPE, ()),
    "modernbert": (
        "ModernBertConfig",
        SHAPE | {"attn_implementation": "eager", "cls_token_id": 0, "sep_token_id": 1},
        (),
    ),
    "xlm_roberta": ("XLMRobertaConfig", SHAPE, ()),
    "esm": ("EsmConfig", SHAPE | {"mask_token_id": 3}, ()),
    "xlnet": (
        "XLNetConfig",
        {"vocab_size": V, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        ("rel_attn.q", "rel_attn.k", "rel_attn.v", "rel_attn.o", "rel_attn.r"),
    ),
    "squeezebert": (
        "SqueezeBertConfig",
        SHAPE
        | {
            "embedding_size": 32,
            "q_groups": 1,
            "k_groups": 1,
            "v_groups": 1,
            "post_attention_groups": 1,
            "intermediate_groups": 1,
            "output_groups": 1,
        },
        ("query", "key", "value", "conv1d"),
    ),
    "fnet": ("FNetConfig", SHAPE, ()),
    "canine": (
        "CanineConfig",
        SHAPE | {"local_transformer_stride": 4, "downsampling_rate": 4, "upsampling_kernel_size": 4},
        ("chars_to_molecules.conv", "projection.conv"),
    ),
}
PAIRS = {
    "bart": ("BartConfig", PAIR, "BartForConditionalGeneration", ()),
    "mbart": ("MBartConfig", PAIR, "MBartForConditionalGeneration", ()),
    "pegasus": ("PegasusConfig", PAIR, "PegasusForConditionalGeneration", ()),
    "marian": ("MarianConfig", PAIR, "MarianMTModel", ()),
    "m2m_100": ("M2M100Config", PAIR, "M2M100ForConditionalGeneration", ()),
    "t5": (
        "T5Config",
        {
            "vocab_size": V,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "T5ForConditionalGeneration",
        (),
    ),
    "switch": (
        "SwitchTransformersConfig",
        {
            "vocab_size": V,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "decoder_start_token_id": 0,
        },
        "SwitchTransformersForConditionalGeneration",
        (),
    ),
    "nllb_moe": (
        "NllbMoeConfig",
        PAIR | {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 16},
        "NllbMoeForConditionalGeneration",
        (),
    ),
}
IMAGES = {
    "vit": ("ViTConfig", VISION, "ViTModel", ("projection",)),
    "deit": ("DeiTConfig", VISION, "DeiTModel", ("projection",)),
    "beit": ("BeitConfig", VISION, "BeitModel", ("projection",)),
    "dinov2": ("Dinov2Config", VISION, "Dinov2Model", ("projection",)),
    "siglip": ("SiglipVisionConfig", VISION, "SiglipVisionModel", ("patch_embedding",)),
    "clip_vision": ("CLIPVisionConfig", VISION, "CLIPVisionModel", ("patch_embedding",)),
    "swin": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        "SwinModel",
        ("projection",),
    ),
    "resnet": (
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
        "ResNetForImageClassification",
        ("convolution",),
    ),
    "convnext": (
        "ConvNextConfig",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        "ConvNextModel",
        ("dwconv", "patch_embeddings", "downsampling_layer.1"),
    ),
}
TEXT_SIDE = SHAPE | {"hidden_size": 32}
IMAGE_AND_TEXT = {
    "clip": (
        "CLIPConfig",
        {"text_config": TEXT_SIDE, "vision_config": VISION, "projection_dim": 16},
        "CLIPModel",
        ("patch_embedding",),
    ),
    "siglip_both": (
        "SiglipConfig",
        {"text_config": TEXT_SIDE, "vision_config": VISION},
        "SiglipModel",
        ("patch_embedding",),
    ),
}


def build(config: str, arguments: dict, model: str | None = None):
    torch.manual_seed(0)
    made = getattr(tf, config)(**arguments)
    if model is None:
        return tf.AutoModelForCausalLM.from_config(made).eval()
    return (tf.AutoModel.from_config(made) if model == "AutoModel" else getattr(tf, model)(made)).eval()


def inputs(kind: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, V, (2, 12), generator=generator)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return {
        IDS: {"input_ids": ids},
        PIXELS: {"pixel_values": pixels},
        PAIRED: {"input_ids": ids, "decoder_input_ids": ids[:, :8]},
        BOTH: {"input_ids": ids, "pixel_values": pixels},
    }[kind]


CASES = {name: (config, arguments, None, IDS, left) for name, (config, arguments, left) in CAUSAL.items()}
CASES |= {name: (config, arguments, "AutoModel", IDS, left) for name, (config, arguments, left) in HIDDEN.items()}
CASES |= {name: (config, arguments, model, PAIRED, left) for name, (config, arguments, model, left) in PAIRS.items()}
CASES |= {name: (config, arguments, model, PIXELS, left) for name, (config, arguments, model, left) in IMAGES.items()}
CASES |= {name: (c, a, model, BOTH, left) for name, (c, a, model, left) in IMAGE_AND_TEXT.items()}


def outputs(model, batch) -> list:
    with evaluating(model):
        return floats(forward(model, batch))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(CASES))
def test_coverage(name):
    config, arguments, label, kind, left = CASES[name]
    model, batch = build(config, arguments, label), inputs(kind)

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
    assert len(heads) == (label is None or kind == PAIRED or name == "siglip_both")
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
PROBED = [name for name, case in CASES.items() if case[3] == IDS and name not in NOT_PROBED]


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
    model = build("IBertConfig", SHAPE, "AutoModel")
    assert len(activation_metrics(model, inputs(IDS))) == 2 * 6 + 1
    with pytest.raises(ValueError, match=r"IBertModel has no nn\.Linear"):
        probe(model, TEXT, tokenizer=tokenizer, context=12, sequences=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROBED)
def test_probe(name, tokenizer, capsys):
    config, arguments, label, _, left = CASES[name]
    model = build(config, arguments, label)
    if left:
        with pytest.raises(ValueError, match="strict=False"):
            probe(model, TEXT, tokenizer=tokenizer, context=12, sequences=4, batch_size=2)
    found = probe(model, TEXT, tokenizer=tokenizer, context=12, sequences=4, batch_size=2, strict=not left)
    assert f"{found.quantization.share:.1%} of the entries" in capsys.readouterr().out
    assert found.modules["R"].iloc[-1] == pytest.approx(found.error.value, rel=1e-5)
    np.testing.assert_allclose(found.modules["R"], found.modules[["A", "B", "C"]].sum(axis=1, skipna=False), atol=1e-12)
