"""The two decoders: against NumPy and Llama of `transformers`, their invariants, and Llama's way through the study."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beyond_outliers.config import CorpusConfig, LlamaConfig, Olmo2Config, RunConfig
from beyond_outliers.model import MODELS, Decoder, Llama, Olmo2
from beyond_outliers.model.decoder import _ROTARY_TABLES
from beyond_outliers.quantizers import QuantSpec, prepare_qat, weights_held
from beyond_outliers.train import train

OLMO2 = [Olmo2Config(37, 24, 2, 3), Olmo2Config(37, 24, 2, 6, n_kv_heads=2)]
LLAMA = [LlamaConfig(37, 24, 2, 3), LlamaConfig(37, 24, 2, 6, n_kv_heads=2, mlp_ratio=2)]
BLOCKED = LlamaConfig(vocab_size=96, width=32, depth=2, n_heads=4, n_kv_heads=2)  # widths that mxfp4 divides
llamas = pytest.mark.parametrize("config", LLAMA, ids=["full", "grouped"])
every = pytest.mark.parametrize("config", [*OLMO2, *LLAMA], ids=["olmo2", "olmo2 grouped", "llama", "llama grouped"])


def made(config) -> Decoder:
    torch.manual_seed(0)
    return MODELS[type(config)](config)


def shaken(config, dtype=torch.float64) -> Decoder:
    """A model whose gains and scales are not at their initial values."""
    model = made(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def token_ids(*shape: int, vocab_size: int = 37) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------- references


def reference_logits(weights: dict, config: Olmo2Config, ids: np.ndarray) -> np.ndarray:
    """PAPER.md's set-up written out in NumPy float64, one head and one position pair at a time where it matters."""

    def rms_norm(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * gain

    def rotate(x):  # (T, head_size): complex pairs turned by position * base^(-2i/d)
        positions, pairs = np.arange(len(x))[:, None], np.arange(config.head_size // 2)[None]
        turn = np.exp(1j * positions * config.rope_base ** (-2 * pairs / config.head_size))
        turned = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
        out = np.empty_like(x)
        out[:, 0::2], out[:, 1::2] = turned.real, turned.imag
        return out

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    w = {name: value.detach().double().numpy() for name, value in weights.items()}
    logits = []
    for sequence in ids:
        x = w["embedding.weight"][sequence]
        length = len(sequence)
        for b in range(config.depth):
            p = f"blocks.{b}."
            q, k, v = (x @ w[f"{p}attention.{name}.weight"].T for name in "qkv")
            heads = []
            for h in range(config.n_heads):
                group = h // (config.n_heads // config.n_kv_heads)
                own = slice(h * config.head_size, (h + 1) * config.head_size)
                shared = slice(group * config.head_size, (group + 1) * config.head_size)
                qh, kh = unit(rotate(q[:, own])), unit(rotate(k[:, shared]))
                scores = w[f"{p}attention.qk_norm.scale"][h] * qh @ kh.T
                scores[np.triu_indices(length, 1)] = -np.inf
                weights_ = np.exp(scores - scores.max(-1, keepdims=True))
                heads.append(weights_ / weights_.sum(-1, keepdims=True) @ v[:, shared])
            attended = np.concatenate(heads, -1) @ w[f"{p}attention.out.weight"].T
            x = x + rms_norm(attended, w[f"{p}attention_norm.gain"])
            up = np.maximum(x @ w[f"{p}mlp.up.weight"].T, 0) ** 2
            x = x + rms_norm(up @ w[f"{p}mlp.down.weight"].T, w[f"{p}mlp_norm.gain"])
        logits.append(rms_norm(x, w["final_norm.gain"]) @ w["embedding.weight"].T)
    return np.stack(logits)


@pytest.mark.parametrize("config", OLMO2, ids=["full", "grouped"])
def test_logits_agree_with_the_reference(config):
    model, ids = shaken(config), token_ids(2, 11)
    expected = reference_logits(dict(model.named_parameters()), config, ids.numpy())
    assert np.abs(model(ids).detach().numpy() - expected).max() < 1e-10
    assert np.abs(model.float()(ids).detach().numpy() - expected).max() < 1e-4


def of_transformers(model: Llama) -> nn.Module:
    """transformers' Llama of the same weights and dtype."""
    tf, config = pytest.importorskip("transformers"), model.config
    reference = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_ratio * config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )
    own = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.o_proj"}
    own |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    own |= {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names = {"embedding.weight": "model.embed_tokens.weight", "final_norm.gain": "model.norm.weight"}
    names["head.weight"] = "lm_head.weight"
    weights = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        weights[names.get(name) or f"model.layers.{parts[1]}.{own[parts[-2]]}.weight"] = value
    reference.to(model.final_norm.gain.dtype).load_state_dict(weights)  # strict: every weight has its place
    return reference.eval()


@llamas
def test_logits_agree_with_transformers_in_float32(config):
    model = shaken(config, torch.float32)
    ids = token_ids(2, 64)
    with torch.no_grad():
        ours, theirs = model(ids), of_transformers(model)(ids).logits
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------- invariants


@every
def test_opened_attention_is_the_same_function(config):
    model, ids = shaken(config), token_ids(2, 9)
    fused = model(ids)
    for block in model.blocks:
        block.attention.mixing.opened = True
    assert torch.allclose(model(ids), fused, atol=1e-12)


@every
def test_no_position_sees_the_future(config):
    model, ids = shaken(config), token_ids(1, 12)
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 37
    before, after = model(ids), model(changed)
    assert torch.equal(before[0, :7], after[0, :7])
    assert not torch.allclose(before[0, 7:], after[0, 7:])


@pytest.mark.parametrize("kind", [Olmo2Config, LlamaConfig])
def test_initialisation(kind):
    model = made(kind(vocab_size=512, width=64, depth=2, n_heads=4))
    assert model.head.weight is model.embedding.weight
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert abs(parameter.std().item() - 0.02) < 0.002 and abs(parameter.mean().item()) < 0.002, name
        else:
            assert (parameter == (math.sqrt(16) if name.endswith("scale") else 1)).all(), name


@every
def test_n_parameters_counts_the_tied_embedding_once(config):
    assert sum(p.numel() for p in made(config).parameters()) == config.n_parameters


@every
def test_the_loss_is_the_cross_entropy_of_the_logits_and_so_are_its_gradients(config):
    model = shaken(config)
    ids, targets = token_ids(2, 2, 300)  # 600 tokens: a whole slice of the sliced loss and a rest
    ours, expected = model.loss(ids, targets), F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    assert torch.allclose(ours, expected, atol=1e-13)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found, wanted = (torch.autograd.grad(loss, parameters) for loss in (ours, expected))
    for name, mine, theirs in zip(names, found, wanted, strict=True):
        assert theirs.abs().max() > 0 and torch.allclose(mine, theirs, atol=1e-13), name


@every
def test_a_model_that_first_ran_under_inference_mode_can_be_trained(config):
    _ROTARY_TABLES.clear()
    model, ids = made(config), token_ids(1, 13)
    with torch.inference_mode():
        model(ids)
    model.loss(ids, ids).backward()
    assert model.blocks[0].attention.q.weight.grad.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("config", [OLMO2[0], LLAMA[1]])
def test_the_compiled_model_is_the_same_function(config):
    model = made(config)
    ids, targets = token_ids(2, 2, 10)
    model.loss(ids, targets).backward()
    eager = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model.loss)(ids, targets).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, eager[name], atol=1e-6), name


@pytest.mark.parametrize("config", [Olmo2Config, LlamaConfig])
@pytest.mark.parametrize("scheme", [None, "quest", "lsq"])
def test_recomputation_changes_no_bit_of_a_gradient(config, scheme):
    model = made(config(vocab_size=320, width=32, depth=3, n_heads=2))
    if scheme:
        model = prepare_qat(model, QuantSpec(), scheme=scheme)
    ids, targets = torch.randint(320, (2, 4, 16))
    model(ids)  # LSQ's steps start from it
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        loss = 0.0
        with weights_held(model):
            for half in (slice(2), slice(2, 4)):
                part = model.loss(ids[half], targets[half])
                part.backward()
                loss += part.detach()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(one, two) for one, two in zip(found[0][1], found[1][1], strict=True))


def test_recomputation_keeps_no_more_than_the_inputs_of_blocks():
    model = Olmo2(Olmo2Config(vocab_size=320, width=32, depth=3, n_heads=2))
    ids, sizes = torch.randint(320, (2, 16)), []
    for recompute in (False, True):
        model.recompute = recompute
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()), lambda x: x):
            model.hidden(ids)
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 5


# --------------------------------------------------------------------------------------------------- configurations


def test_json_carries_the_architecture_and_the_ids_of_olmo2_runs_stay():
    shape = {"vocab_size": 1024, "width": 32, "depth": 2, "n_heads": 2}
    fixed = {"scale": "pin", "size": "0.08M", "optimizer": "muon", "lr": 0.01, "seed": 200}
    olmo = RunConfig(**fixed, model=Olmo2Config(**shape), corpus=CorpusConfig(vocab_size=1024))
    assert olmo.run_id == "440b4ed5ce"  # computed before there was a second architecture
    assert "architecture" not in olmo.to_json()
    llama = olmo.replace(model=LlamaConfig(**shape, mlp_ratio=4, rope_base=1024.0))
    assert json.loads(llama.to_json())["model"]["architecture"] == "llama" and llama.run_id != olmo.run_id
    for config in (olmo, llama):
        again = RunConfig.from_json(config.to_json())
        assert again == config and type(again.model) is type(config.model) and again.run_id == config.run_id


# ------------------------------------------------------------------------------------------- Llama through the study


def test_training(run_config, tmp_path):
    shape = LlamaConfig(vocab_size=320, width=32, depth=1, n_heads=2, n_kv_heads=1)
    config = run_config.replace(model=shape, quantization={"scheme": "quest", "weights": "int4", "activations": "int4"})
    result = train(config, root=tmp_path, progress=False)
    losses = result.evaluations.val_loss
    assert result.row["status"] == "finished" and result.row["n_parameters"] == config.model.n_parameters
    assert losses.iloc[-1] < result.metrics.val_loss.iloc[0] - 0.3
    again = train(config, root=tmp_path, progress=False)  # loaded from the folder: config.json names the architecture
    assert again.config == config and isinstance(again.load_model(), Llama)
