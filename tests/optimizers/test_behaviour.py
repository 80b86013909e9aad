"""Registry, parameter groups, errors, state round trips and invariants of the optimizers."""

import copy
import io
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from beyond_outliers.config import Olmo2Config
from beyond_outliers.model import Olmo2
from beyond_outliers.optimizers import (
    OPTIMIZERS,
    PSGD,
    REGISTRY,
    Muon,
    NonFiniteGradientError,
    Scion,
    Shampoo,
    build_optimizer,
    parameter_groups,
)
from beyond_outliers.optimizers.outside import Outside

# Refreshes fall inside a dozen steps.
HYPER = {"shampoo": {"frequency": 3}, "soap": {"frequency": 3}, "psgd": {"update_probability": 0.4}}
HYPER["torch.optim:SGD"] = {"momentum": 0.9, "roles": ["matrix"], "rest_lr": 3e-3}
ALL = [*REGISTRY, "torch.optim:SGD"]  # a class from outside among them
ODD_SHAPES = [(5, 7), (5, 7), (1, 9), (9, 1), (3, 200), (1, 1), (11,), (1,), ()]


def small_model():
    torch.manual_seed(0)
    return Olmo2(Olmo2Config(vocab_size=30, width=8, depth=2, n_heads=2))


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def make(name, params):
    kind = REGISTRY[name].optimizer if name in REGISTRY else partial(Outside, source=name)
    return kind(params, lr=0.01, **HYPER.get(name, {}))


def odd_parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in ODD_SHAPES]


# --- registry and groups ------------------------------------------------------------------------------------------


def test_the_six_are_listed_in_the_papers_order():
    assert list(OPTIMIZERS) == ["adamw", "muon", "psgd", "scion", "shampoo", "soap"]
    assert [entry.label for entry in OPTIMIZERS.values()] == ["AdamW", "Muon", "PSGD", "Scion", "Shampoo", "SOAP"]


@pytest.mark.parametrize("name", REGISTRY)
def test_groups_by_role(name):
    model = small_model()
    optimizer = build_optimizer(model, name, 0.01, weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert list(groups) == ["matrix", "embedding", "vector"]
    assert groups["embedding"]["param_names"] == ["embedding.weight"]  # the tied head is the same tensor, once
    assert all(name.rpartition(".")[2] in ("gain", "scale") for name in groups["vector"]["param_names"])
    assert len(groups["matrix"]["params"]) == 2 * 6
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    assert groups["matrix"]["lr"] == 0.01
    assert [groups[role]["weight_decay"] for role in groups] == [0.1, 0.1, 0.0]


def test_an_untied_head_counts_as_embedding():
    model = nn.Module()
    model.table, model.hidden, model.lm_head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
    model.hidden.bias.requires_grad_(False)
    roles = {g["role"]: [name for name, _ in g["params"]] for g in parameter_groups(model)}
    assert roles == {"matrix": ["hidden.weight"], "embedding": ["table.weight", "lm_head.weight"]}


def test_roles_have_their_own_learning_rates():
    muon = {g["role"]: g["lr"] for g in build_optimizer(small_model(), "muon", 0.02, adamw_lr=0.004).param_groups}
    assert muon == {"matrix": 0.02, "embedding": 0.004, "vector": 0.004}
    scion = {g["role"]: g["lr"] for g in build_optimizer(small_model(), "scion", 0.02, embedding_lr=0.5).param_groups}
    assert scion == {"matrix": 0.02, "embedding": 0.5, "vector": 3e-3}


def test_unknown_names_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"'adam'.*adamw, muon, psgd, scion, shampoo, soap, sgd"):
        build_optimizer(small_model(), "adam", 0.01)
    with pytest.raises(ValueError, match=r"Muon.*beta9.*momentum.*adamw_lr"):
        build_optimizer(small_model(), "muon", 0.01, beta9=0.5)


def test_unusable_parameters_are_refused_by_name():
    with pytest.raises(ValueError, match=r"kernel has shape \(2, 3, 4\)"):
        Muon([("kernel", torch.zeros(2, 3, 4))])
    with pytest.raises(ValueError, match=r"half is torch.bfloat16"):
        Muon([("half", torch.zeros(2, 3, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match=r"unknown role 'head'.*matrix, embedding, vector"):
        Muon([{"params": [torch.zeros(2, 3)], "role": "head"}])
    with pytest.raises(ValueError, match=r"seed must be a whole number .*not 2\.5"):
        PSGD([torch.zeros(2, 3)], seed=2.5)
    with pytest.raises(ValueError, match=r"weight_decay must be 0 when constrained, not 0\.1"):
        Scion([torch.zeros(2, 3)], weight_decay=0.1, constrained=True)


# --- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_odd_shapes_move_and_gradients_stay(name, dtype):
    params = odd_parameters(dtype)
    optimizer = make(name, params)
    before = [p.detach().clone() for p in params]
    for seed in range(7):  # an odd number of sign steps cannot cancel
        set_gradients(params, seed)
        gradients = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True))
    for p, old in zip(params, before, strict=True):
        assert p.isfinite().all() and p.dtype == dtype and (p != old).all()


@pytest.mark.parametrize("name", ALL)
def test_an_absent_gradient_leaves_its_parameter_alone_and_the_others_as_if_alone(name):
    """The middle one of three same-shaped matrices pauses: the rest must match a run without it."""

    def run(shapes, pausing):
        params = [torch.full((4, 6), float(i + 1)).requires_grad_() for i in shapes]
        optimizer = make(name, params)
        for step in range(8):
            for i, p in zip(shapes, params, strict=True):
                p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + i))
            if pausing is not None and step in (2, 3, 4):
                params[pausing].grad = None
                kept = params[pausing].detach().clone()
            optimizer.step()
            if pausing is not None and step in (2, 3, 4):
                assert torch.equal(params[pausing], kept)
        return [p.detach() for p in params]

    if name == "psgd":  # its probes are drawn for the stack: another stack, other probes
        assert all(p.isfinite().all() for p in run([0, 1, 2], 1))
        return
    full, others, paused = run([0, 1, 2], 1), run([0, 2], None), run([1], 0)
    for found, expected in zip(full, [others[0], paused[0], others[1]], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ALL)
def test_non_finite_gradients_are_named_and_change_nothing(name, bad):
    model = small_model()
    optimizer = build_optimizer(model, name, 0.01, **HYPER.get(name, {}))
    for seed in range(4):
        set_gradients(model.parameters(), seed)
        optimizer.step()
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    set_gradients(model.parameters(), 9)
    model.blocks[1].mlp.up.weight.grad[2, 3] = bad
    with pytest.raises(NonFiniteGradientError, match=r"gradient of blocks.1.mlp.up.weight$"):
        optimizer.step()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert_states_equal(optimizer.state_dict(), state)


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_any_strides_count_alike(name):
    """Transposed and expanded (stride zero) gradients: torch's fused AdamW alone would read past their memory."""
    results = []
    for same in (lambda g: g, torch.Tensor.contiguous):
        params = [torch.ones(4, 6).requires_grad_(), torch.ones(5, 3).requires_grad_(), torch.ones(7).requires_grad_()]
        optimizer = make(name, params)
        for seed in range(4):
            params[0].grad = same(torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).mT)
            params[1].grad, params[2].grad = same(torch.ones(1, 1).expand(5, 3)), same(torch.ones(1).expand(7))
            optimizer.step()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_closure_is_evaluated_with_gradients_on(name):
    p = torch.ones(3, 3, requires_grad=True)
    optimizer = REGISTRY[name].optimizer([p], lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9


# --- state --------------------------------------------------------------------------------------------------------


def assert_states_equal(a, b):
    (leaves, tree), (others, other_tree) = map(tree_flatten, (a, b))
    assert tree == other_tree
    for value, other in zip(leaves, others, strict=True):
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("name", ALL)
def test_state_resumes_bit_identically_at_every_step_of_a_cycle(name):
    """Save after k steps, load into a fresh optimizer (through bytes), go on: all as in the run that never stopped."""

    def build():
        params = odd_parameters()
        return params, make(name, params)

    params, straight = build()
    snapshots = []
    for step in range(9):
        snapshots.append(([p.detach().clone() for p in params], saved(straight.state_dict())))
        set_gradients(params, step)
        straight.step()
    final = [p.detach().clone() for p in params]
    for step, (weights, state) in enumerate(snapshots):
        torch.rand(step + 1)  # the global generator must not matter
        resumed_params, resumed = build()
        with torch.no_grad():
            for p, w in zip(resumed_params, weights, strict=True):
                p.copy_(w)
        resumed.load_state_dict(torch.load(io.BytesIO(state)))
        for later in range(step, 9):
            set_gradients(resumed_params, later)
            resumed.step()
        assert all(torch.equal(p, w) for p, w in zip(resumed_params, final, strict=True)), f"resumed at {step}"
        assert_states_equal(resumed.state_dict(), straight.state_dict())


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ALL)
def test_a_copy_goes_the_same_way_and_leaves_the_original_alone(name):
    params = odd_parameters()
    optimizer = make(name, params)
    for seed in range(4):
        set_gradients(params, seed)
        optimizer.step()
    other_params, other = copy.deepcopy((params, optimizer))
    before = [p.detach().clone() for p in params]
    for seed in range(4, 8):
        set_gradients(other_params, seed)
        other.step()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    for seed in range(4, 8):
        set_gradients(params, seed)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, other_params, strict=True))


def test_the_seed_of_psgd_matters():
    results = []
    for seed in (0, 1):
        p = torch.ones(6, 6, requires_grad=True)
        optimizer = PSGD([p], seed=seed)
        for step in range(5):
            set_gradients([p], step)
            optimizer.step()
        results.append(p.detach())
    assert not torch.equal(*results)


# --- invariants ---------------------------------------------------------------------------------------------------


def test_shampoo_whitens_a_constant_gradient():
    """With G constant, L = G G^T and R = G^T G: P_L G P_R is the orthogonal factor U V^T."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(6, 6)) * np.logspace(0, 2, 6)
    p = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    optimizer = Shampoo([p], lr=1.0, frequency=1, eps=1e-14)
    p.grad = torch.tensor(g)
    optimizer.step()
    values = np.linalg.svd(p.detach().numpy(), compute_uv=False)
    assert values.max() / values.min() < 1 + 1e-5


def test_psgd_balances_its_factors_at_every_hundredth_update():
    p = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    optimizer = PSGD([p], lr=0.0)
    for step in range(100):
        left, right = optimizer.state[p].get("left"), optimizer.state[p].get("right")
        if step in (50, 99):
            left.mul_(64)
            right.div_(64)
        set_gradients([p], step)
        optimizer.step()
        if step == 50:
            assert left.abs().max() > 1000 * right.abs().max()
    assert 0.5 < left.abs().max() / right.abs().max() < 2
