"""The pre-norm decoder against Llama of `transformers`, its invariants, and its way through the rest of the study."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beyond_outliers.config import CorpusConfig, LlamaConfig, Olmo2Config, RunConfig, model_config
from beyond_outliers.metrics import activation_metrics, mmr
from beyond_outliers.model import Olmo2
from beyond_outliers.model.decoder import _ROTARY_TABLES
from beyond_outliers.model.llama import Llama
from beyond_outliers.optimizers import OPTIMIZERS, build_optimizer, parameter_groups
from beyond_outliers.propagation import decompose, output_readings, summarise
from beyond_outliers.quantizers import QuantSpec, freeze_qat, prepare_qat, quantize_model, quantize_tensor
from beyond_outliers.train import build_model, train

CONFIGS = [
    LlamaConfig(vocab_size=37, width=24, depth=2, n_heads=3),
    LlamaConfig(vocab_size=37, width=24, depth=2, n_heads=6, n_kv_heads=2, mlp_ratio=2),
]
BLOCKED = LlamaConfig(vocab_size=96, width=32, depth=2, n_heads=4, n_kv_heads=2)  # widths that mxfp4 divides
both = pytest.mark.parametrize("config", CONFIGS, ids=["full", "grouped"])


def shaken(config: LlamaConfig, dtype=torch.float64) -> Llama:
    """A model whose gains are not at their initial values."""
    torch.manual_seed(0)
    model = Llama(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def token_ids(*shape: int, vocab_size: int = 37) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------- another library


class ExactRotary(nn.Module):
    """cos and sin as `transformers` hands them on, (1, T, head_size), but from float64 angles."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.rates = config.rope_base ** (-2 * np.arange(config.head_size // 2) / config.head_size)

    def forward(self, x, position_ids):
        turns = np.exp(1j * position_ids[0].numpy()[:, None] * self.rates)
        turns = np.concatenate([turns, turns], -1)[None]
        return torch.from_numpy(turns.real.copy()), torch.from_numpy(turns.imag.copy())


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


@both
def test_logits_agree_with_transformers_in_float32(config):
    model = shaken(config, torch.float32)
    ids = token_ids(2, 64)
    with torch.no_grad():
        ours, theirs = model(ids), of_transformers(model)(ids).logits
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5


@both
def test_logits_agree_with_transformers_in_float64(config):
    """Its norms and rotary angles are float32 in any dtype: torch's own norm and NumPy's angles stand in for them."""
    model = shaken(config)
    reference = of_transformers(model)
    for name, module in list(reference.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            exact = nn.RMSNorm(config.width, eps=config.norm_eps, dtype=torch.float64)
            exact.weight = module.weight
            reference.set_submodule(name, exact)
    reference.model.rotary_emb = ExactRotary(config)
    ids = token_ids(2, 64)
    with torch.no_grad():
        assert (model(ids) - reference(ids).logits).abs().max() < 1e-10


# ------------------------------------------------------------------------------------------------------- invariants


@both
def test_opened_attention_is_the_same_function(config):
    model = shaken(config)
    ids = token_ids(2, 9)
    fused = model(ids)
    for block in model.blocks:
        block.attention.mixing.opened = True
    assert torch.allclose(model(ids), fused, atol=1e-12)


def test_no_position_sees_the_future():
    model = shaken(CONFIGS[1])
    ids = token_ids(1, 12)
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 37
    before, after = model(ids), model(changed)
    assert torch.equal(before[0, :7], after[0, :7])
    assert not torch.allclose(before[0, 7:], after[0, 7:])


def test_initialisation():
    model = Llama(LlamaConfig(vocab_size=512, width=64, depth=2, n_heads=4))
    assert model.head.weight is model.embedding.weight
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert abs(parameter.std().item() - 0.02) < 0.002 and abs(parameter.mean().item()) < 0.002, name
        else:
            assert (parameter == 1).all(), name


@pytest.mark.parametrize("config", [*CONFIGS, BLOCKED])
def test_n_parameters_counts_the_tied_embedding_once(config):
    assert sum(p.numel() for p in Llama(config).parameters()) == config.n_parameters


def test_gradients_through_head_loss_are_those_of_plain_cross_entropy():
    model = shaken(CONFIGS[0])
    ids, targets = token_ids(2, 2, 300)  # 600 tokens: a whole slice of the sliced loss and a rest
    ours = model.head_loss(model.hidden(ids), targets)
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    assert torch.allclose(ours, expected, atol=1e-13) and torch.equal(ours, model.loss(ids, targets))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found, wanted = (torch.autograd.grad(loss, parameters) for loss in (ours, expected))
    for name, mine, theirs in zip(names, found, wanted, strict=True):
        assert theirs.abs().max() > 0 and torch.allclose(mine, theirs, atol=1e-13), name


@pytest.mark.parametrize("make", [lambda: Llama(CONFIGS[0]), lambda: Olmo2(Olmo2Config(37, 24, 1, 3))])
def test_a_model_that_first_ran_under_inference_mode_can_be_trained(make):
    _ROTARY_TABLES.clear()
    model, ids = make(), token_ids(1, 13)
    with torch.inference_mode():
        model(ids)
    model.loss(ids, ids).backward()
    assert model.blocks[0].attention.q.weight.grad.abs().max() > 0


@pytest.mark.slow
def test_the_compiled_model_is_the_same_function():
    model = Llama(CONFIGS[1])
    ids, targets = token_ids(2, 2, 10)
    model.loss(ids, targets).backward()
    eager = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model.loss)(ids, targets).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, eager[name], atol=1e-6), name


# --------------------------------------------------------------------------------------------------- configurations


def test_the_shape_from_its_architecture():
    shape = {"vocab_size": 96, "width": 32, "depth": 2, "n_heads": 4, "n_kv_heads": 2}
    assert model_config("llama", **shape) == BLOCKED
    assert model_config(**shape) == Olmo2Config(**shape) != BLOCKED
    assert (BLOCKED.mlp_ratio * BLOCKED.width, BLOCKED.rope_base) == (96, 10_000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "lama"}, "unknown architecture 'lama'; valid: olmo2, llama"),
        ({"deep": 2}, r"architecture 'llama' has no \['deep'\]; valid: vocab_size, width, depth"),
        ({"mlp_ratio": 2.5}, r"mlp_ratio must be a whole number in \[1, 64\], not 2.5"),
        ({"width": 30, "n_heads": 4}, "width 30"),
        ({"n_heads": 6, "n_kv_heads": 4}, "n_kv_heads 4"),
    ],
)
def test_bad_shapes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        model_config(**{"architecture": "llama"} | settings)


def test_json_carries_the_architecture_and_the_ids_of_olmo2_runs_stay():
    olmo = RunConfig(
        scale="pin",
        size="0.08M",
        optimizer="muon",
        lr=0.01,
        seed=200,
        model=Olmo2Config(vocab_size=1024, width=32, depth=2, n_heads=2),
        corpus=CorpusConfig(vocab_size=1024),
    )
    quest = {"scheme": "quest", "weights": "int4", "activations": "int4"}
    assert olmo.run_id == "440b4ed5ce"  # computed before there was a second architecture
    assert olmo.replace(quantization=quest).run_id == "b675d3246d"
    assert "architecture" not in olmo.to_json()
    same_shape = {"vocab_size": 1024, "width": 32, "depth": 2, "n_heads": 2, "mlp_ratio": 4, "rope_base": 1024.0}
    llama = olmo.replace(model=LlamaConfig(**same_shape))
    assert json.loads(llama.to_json())["model"]["architecture"] == "llama" and llama.run_id != olmo.run_id
    for config in (olmo, llama):
        again = RunConfig.from_json(config.to_json())
        assert again == config and type(again.model) is type(config.model) and again.run_id == config.run_id


# -------------------------------------------------------------------------------- optimizers, quantizers, measurements


def test_parameter_roles():
    roles = {group["role"]: {name for name, _ in group["params"]} for group in parameter_groups(Llama(CONFIGS[1]))}
    matrices = [f"attention.{name}.weight" for name in ("q", "k", "v", "out")]
    matrices += [f"mlp.{name}.weight" for name in ("gate", "up", "down")]
    assert roles["matrix"] == {f"blocks.{b}.{name}" for b in range(2) for name in matrices}
    gains = {f"blocks.{b}.{name}_norm.gain" for b in range(2) for name in ("attention", "mlp")}
    assert roles["vector"] == gains | {"final_norm.gain"} and roles["embedding"] == {"embedding.weight"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name):
    torch.manual_seed(0)
    model, ids = Llama(BLOCKED), token_ids(4, 17, vocab_size=96)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, name, 3e-3)
    losses = []
    for _ in range(20):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("form", ["int4", "mxfp4", "nvfp4"])
def test_post_training_quantization_with_the_head(form):
    model = shaken(BLOCKED)
    quantized = quantize_model(model, QuantSpec(form, "none", head=True))
    by_hand = Llama(BLOCKED).double()
    by_hand.load_state_dict(model.state_dict())
    by_hand.head.weight = nn.Parameter(model.head.weight.detach().clone())  # the embedding lookup stays as it is
    with torch.no_grad():
        for module in by_hand.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(quantize_tensor(module.weight, form))
    ids = token_ids(2, 16, vocab_size=96)
    assert torch.allclose(quantized(ids), by_hand(ids), atol=1e-12)
    assert not torch.allclose(quantized(ids), model(ids), atol=1e-2)


def test_decomposition_sees_every_step():
    model = shaken(BLOCKED)
    quantized = quantize_model(model, QuantSpec(activations="none", head=True))
    ids = token_ids(3, 12, vocab_size=96)
    tables = {view: decompose(model, quantized, ids, attention=view, reduction="global") for view in ("unit", "open")}
    for table in tables.values():
        np.testing.assert_allclose(table["R"], table["A"] + table["B"] + table["C"], rtol=0, atol=1e-14)
        assert not table["kind"].str.contains("functional").any()
    attention = [f"attention.{name}" for name in ("q", "k", "v", "rotary", "rotary#2")]
    attention += [f"attention.mixing.{name}" for name in ("scores", "softmax", "mix")] + ["attention.out"]
    mlp = [f"mlp.{name}" for name in ("gate", "activation", "up", "gating", "down")]
    for view, inside in (("unit", ["attention"]), ("open", attention)):
        parts = ["attention_norm", *inside, "attention_add", "mlp_norm", *mlp, "mlp_add"]
        blocks = [f"blocks.{b}.{part}" for b in range(2) for part in parts]
        assert list(tables[view]["name"]) == ["embedding", *blocks, "final_norm", "head"]
    linear = tables["open"][(tables["open"]["kind"] == "linear") & (tables["open"]["R_in"] > 0)]
    assert len(linear) == 2 * 7 + 1 - 3  # the first q, k and v read what quantization has not changed
    np.testing.assert_allclose(linear["gain"], linear["spectral_ratio"] * linear["alignment_ratio"], rtol=1e-9)
    unit, opened = (table.set_index("name") for table in tables.values())
    assert unit["R"]["blocks.1.attention"] == pytest.approx(opened["R"]["blocks.1.attention.out"], rel=1e-9)
    assert opened["gain"]["blocks.1.attention.rotary"] == pytest.approx(1.0, rel=1e-12)
    assert opened["kind"]["blocks.0.mlp.activation"] == "activation"
    assert output_readings(model, quantized, ids).value["R_L"] == pytest.approx(
        summarise(tables["unit"])["R_L"], rel=1e-9
    )


def test_activation_metrics_read_every_linear_input():
    model = shaken(BLOCKED)
    ids = token_ids(2, 16, vocab_size=96)
    table = activation_metrics(model, ids).set_index("name")
    layers = [f"attention.{name}" for name in ("q", "k", "v", "out")] + [
        f"mlp.{name}" for name in ("gate", "up", "down")
    ]
    assert list(table.index) == [f"blocks.{b}.{name}" for b in range(2) for name in layers] + ["head"]
    with torch.no_grad():
        x = model.embedding(ids)
        x = x + model.blocks[0].attention(model.blocks[0].attention_norm(x))
        x = F.rms_norm(x, (32,), model.blocks[0].mlp_norm.gain, BLOCKED.norm_eps)
        gate, up = (F.linear(x, getattr(model.blocks[0].mlp, name).weight) for name in ("gate", "up"))
    assert table.mmr["blocks.0.mlp.gate"] == table.mmr["blocks.0.mlp.up"] == pytest.approx(mmr(x).item(), rel=1e-10)
    assert table.mmr["blocks.0.mlp.down"] == pytest.approx(mmr(F.silu(gate) * up).item(), rel=1e-10)


def test_quantization_aware_training_keeps_names_and_ties():
    model = Llama(BLOCKED)
    trained = prepare_qat(model, QuantSpec(head=True))
    trained.load_state_dict(model.state_dict())
    assert trained.head.weight is trained.embedding.weight
    ids, targets = token_ids(2, 2, 16, vocab_size=96)
    trained.loss(ids, targets).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.parameters())
    assert trained.blocks[0].mlp.gate.weight.grad.abs().max() > 0
    table = decompose(model, freeze_qat(trained), ids)
    assert table["R"].iloc[-1] > 1e-3


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def llama_run(run_config):
    return run_config.replace(model=LlamaConfig(vocab_size=320, width=32, depth=1, n_heads=2, n_kv_heads=1))


@pytest.mark.parametrize("quantization", [None, {"scheme": "quest", "weights": "int4", "activations": "int4"}])
def test_training(llama_run, tmp_path, quantization):
    config = llama_run.replace(quantization=quantization)
    result = train(config, root=tmp_path, progress=False)
    losses = result.evaluations.val_loss
    assert result.row["status"] == "finished" and result.row["n_parameters"] == config.model.n_parameters
    assert losses.iloc[-1] < result.metrics.val_loss.iloc[0] - 0.3
    again = train(config, root=tmp_path, progress=False)  # loaded from the folder: config.json names the architecture
    assert again.config == config and isinstance(again.load_model(), Llama)


def test_the_model_is_that_of_the_configuration(run_config, llama_run):
    assert type(build_model(run_config)) is Olmo2 and type(build_model(llama_run)) is Llama


@pytest.mark.slow
def test_compiled_training(llama_run, tmp_path):
    eager, compiled = (
        train(llama_run, root=tmp_path / str(choice), compile=choice, progress=False).row for choice in (False, True)
    )
    assert compiled["compiled"] and not eager["compiled"]
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], abs=1e-4)
