"""The transformer against a plain float64 re-derivation in NumPy, and its invariants."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beyond_outliers.config import LlamaConfig, Olmo2Config
from beyond_outliers.model import MODELS, Olmo2
from beyond_outliers.model.decoder import Rotary, rotary_tables
from beyond_outliers.model.loss import linear_cross_entropy
from beyond_outliers.quantizers import QuantSpec, prepare_qat
from beyond_outliers.quantizers.convert import weights_held


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


CONFIGS = [
    Olmo2Config(vocab_size=37, width=24, depth=2, n_heads=3),
    Olmo2Config(vocab_size=37, width=24, depth=2, n_heads=6, n_kv_heads=2),
]


def shaken(config: Olmo2Config) -> Olmo2:
    """A float64 model whose gains and scales are not at their initial values."""
    torch.manual_seed(0)
    model = Olmo2(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=["full", "grouped"])
def test_logits_agree_with_the_reference(config):
    model = shaken(config)
    ids = torch.randint(37, (2, 11))
    expected = reference_logits(dict(model.named_parameters()), config, ids.numpy())
    assert np.abs(model(ids).detach().numpy() - expected).max() < 1e-10
    single = model.float()(ids).detach().numpy()
    assert np.abs(single - expected).max() < 1e-4


def test_opened_attention_is_the_same_function():
    model = shaken(CONFIGS[1])
    ids = torch.randint(37, (2, 9))
    fused = model(ids)
    for block in model.blocks:
        block.attention.mixing.opened = True
    assert torch.allclose(model(ids), fused, atol=1e-12)


def test_no_position_sees_the_future():
    model = shaken(CONFIGS[0])
    ids = torch.randint(37, (1, 12))
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 37
    before, after = model(ids), model(changed)
    assert torch.equal(before[0, :7], after[0, :7])
    assert not torch.allclose(before[0, 7:], after[0, 7:])


def test_initialisation():
    model = Olmo2(Olmo2Config(vocab_size=512, width=64, depth=2, n_heads=4))
    assert model.head.weight is model.embedding.weight
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert abs(parameter.std().item() - 0.02) < 0.002 and abs(parameter.mean().item()) < 0.002, name
        elif name.endswith("scale"):
            assert (parameter == math.sqrt(16)).all()
        else:
            assert (parameter == 1).all(), name


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_positions_are_relative(interleaved):
    """The product of a query at position i and a key at j depends on i - j alone."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    rotary = Rotary(16, 1024.0, interleaved)
    turned_q, turned_k = (rotary(x.expand(1, 1, 20, 16))[0, 0] for x in (q, k))
    products = turned_q @ turned_k.T
    for offset in range(1, 19):
        assert torch.allclose(products.diagonal(offset), products.diagonal(offset)[:1], atol=1e-12)
    cos, _ = rotary_tables(3, 16, 1024.0, torch.device("cpu"), torch.float64)
    assert torch.equal(cos[0], torch.ones(8, dtype=torch.float64))


def test_rotary_tables_are_a_constant_to_the_compiler_as_its_own_decorator_makes_one():
    def other():
        pass

    assert vars(torch.compiler.assume_constant_result(other)).items() <= vars(rotary_tables).items()
    assert vars(other)


@pytest.mark.parametrize("config", CONFIGS, ids=["full", "grouped"])
def test_n_parameters_counts_the_tied_embedding_once(config):
    assert sum(p.numel() for p in Olmo2(config).parameters()) == config.n_parameters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 30, "n_heads": 4}, "width 30"),
        ({"n_heads": 6, "n_kv_heads": 4}, "n_kv_heads 4"),
        ({"depth": 0}, "depth"),
    ],
)
def test_bad_shapes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Olmo2Config(**settings)


# ---------------------------------------------------------------------------------------------------------------- loss


def test_linear_cross_entropy_agrees_with_torch():
    torch.manual_seed(0)
    hidden = torch.randn(3, 411, 8, dtype=torch.float64, requires_grad=True)  # 1233 tokens: slices and a rest
    weight = torch.randn(29, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(29, (3, 411))
    ours = linear_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
    assert torch.allclose(ours, expected, atol=1e-14)
    found = torch.autograd.grad(3 * ours, [hidden, weight])
    for mine, theirs in zip(found, torch.autograd.grad(3 * expected, [hidden, weight]), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-14)
    with torch.no_grad():
        assert torch.allclose(linear_cross_entropy(hidden, weight, targets), expected, atol=1e-14)


def test_linear_cross_entropy_survives_huge_logits():
    hidden = torch.tensor([[1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2e4 and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_model_loss_is_the_cross_entropy_of_its_logits():
    model = shaken(CONFIGS[0])
    ids, targets = torch.randint(37, (2, 2, 10))
    expected = F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten())
    assert torch.allclose(model.loss(ids, targets).float(), expected, atol=1e-6)


@pytest.mark.slow
def test_the_compiled_model_is_the_same_function():
    model = Olmo2(CONFIGS[0])
    ids, targets = torch.randint(37, (2, 2, 10))
    model.loss(ids, targets).backward()
    eager = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model.loss)(ids, targets).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, eager[name], atol=1e-6), name


@pytest.mark.parametrize("config", [Olmo2Config, LlamaConfig])
@pytest.mark.parametrize("scheme", [None, "quest", "lsq"])
def test_recomputation_changes_no_bit_of_a_gradient(config, scheme):
    torch.manual_seed(0)
    model = MODELS[config](config(vocab_size=320, width=32, depth=3, n_heads=2))
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
