"""What is loaded is what was saved: states that do not fit, layouts, copies, cleared states, pauses of the gradient."""

import copy
import pickle

import pytest
import torch

from beyond_outliers.optimizers import REGISTRY, NonFiniteGradientError

ROLES = ("matrix", "embedding", "vector")


def make(name, role="matrix", n=4, **options):
    torch.manual_seed(0)
    p = torch.randn(n, n + 1, requires_grad=True) if role != "vector" else torch.randn(n, requires_grad=True)
    return p, REGISTRY[name].optimizer([{"params": [("w", p)], "role": role}], lr=0.01, **options)


def steps(p, optimizer, count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", REGISTRY)
def test_a_state_of_another_shape_is_refused_and_nothing_has_changed(name, role):
    small, saved = make(name, role)
    steps(small, saved)
    p, optimizer = make(name, role, n=7)
    steps(p, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"the state of w has \w+ of shape \(4"):
        optimizer.load_state_dict(saved.state_dict())
    after = optimizer.state_dict()
    for key, value in before["state"][0].items():
        assert torch.equal(torch.as_tensor(after["state"][0][key]), torch.as_tensor(value)), key
    steps(p, optimizer)
    assert p.isfinite().all()


def test_a_state_of_another_optimizer_or_of_other_groups_is_refused():
    p, adamw = make("adamw")
    steps(p, adamw)
    _, muon = make("muon")
    with pytest.raises(ValueError, match=r"lacks momentum|has 'exp_avg'"):
        muon.load_state_dict(adamw.state_dict())
    two = REGISTRY["muon"].optimizer([torch.zeros(2, 2, requires_grad=True), torch.zeros(3, 3, requires_grad=True)])
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, this optimizer of \[2\]"):
        two.load_state_dict(muon.state_dict())


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("cut", [lambda b: b[2:7, 3:6], lambda b: b.T[:4], lambda b: b[:, :1].expand(10, 5)])
def test_strided_transposed_and_expanded_parameters_are_refused(name, cut):
    view = cut(torch.randn(10, 10)).detach().requires_grad_()
    with pytest.raises(ValueError, match="no contiguous tensor"):
        REGISTRY[name].optimizer([view], lr=0.01)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", REGISTRY)
def test_copies_know_the_roles_of_parameters_that_are_added_later(name, copier):
    _, optimizer = make(name)
    twin = copier(optimizer)
    for one in (optimizer, twin):
        one.add_param_group({"params": [("v", torch.zeros(3, requires_grad=True))]})
    # torch gives every copy a setting "differentiable", which its own optimizers have from the start
    ours, theirs = (
        {key: value for key, value in one.param_groups[-1].items() if key not in ("params", "differentiable")}
        for one in (optimizer, twin)
    )
    assert ours == theirs


@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "psgd"])  # its generator runs on
def test_a_cleared_state_starts_anew(name):
    p, optimizer = make(name)
    steps(p, optimizer)
    with torch.no_grad():
        p.copy_(make(name)[0])
    optimizer.state.clear()
    steps(p, optimizer)
    q, fresh = make(name)
    steps(q, fresh)
    assert torch.equal(p, q)


@pytest.mark.parametrize("shape", [(1,), (1, 9), (4, 4), (40, 3)])
def test_psgd_survives_a_pause_without_gradient(shape):
    """Zeros before the first gradient, and zeros after some: the factors stay, and ordinary steps go on."""
    p = torch.zeros(shape, requires_grad=True)
    optimizer = REGISTRY["psgd"].optimizer([p], lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for pause in (1500, 1500):
        for _ in range(pause):
            p.grad = torch.zeros(shape)
            optimizer.step()
        assert optimizer.state[p]["left"].abs().max() < 1e6
        for _ in range(5):
            p.grad = torch.randn(shape, generator=generator)
            optimizer.step()
        assert p.isfinite().all() and p.abs().max() < 1


def test_one_matrix_of_a_stack_may_pause():
    """Two of one shape share a stack: the one without gradient keeps its factors, the other learns as if alone."""
    torch.manual_seed(0)
    pair = [torch.randn(6, 4).requires_grad_() for _ in range(2)]
    optimizer = REGISTRY["psgd"].optimizer(pair, lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        pair[0].grad = torch.randn(6, 4, generator=generator)
        pair[1].grad = torch.zeros(6, 4) if step else torch.ones(6, 4)
        if step == 1:
            kept = optimizer.state[pair[1]]["left"].clone()
        optimizer.step()
    assert torch.allclose(optimizer.state[pair[1]]["left"], kept * (optimizer.state[pair[1]]["left"] / kept).nanmean())
    assert not torch.allclose(optimizer.state[pair[0]]["left"], torch.eye(6))


def test_psgd_without_its_generator_loads_with_a_word():
    """So torch.distributed.checkpoint hands it over; the probes are then those of the optimizer that loads."""
    p, optimizer = make("psgd")
    steps(p, optimizer)
    state = {key: value for key, value in optimizer.state_dict().items() if key != "generator"}
    q, fresh = make("psgd")
    with pytest.warns(UserWarning, match="no 'generator'"):
        fresh.load_state_dict(state)
    assert torch.equal(fresh.state[q]["left"], optimizer.state[p]["left"])
    assert torch.equal(fresh.generator.get_state(), torch.Generator().manual_seed(0).get_state())
    steps(q, fresh)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_grad_scaler_skips_an_overflow_whatever_the_optimizer(name):
    p, optimizer = make(name)
    before = p.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, before) and scaler.get_scale() == 2.0


BAD = {
    "adamw": [
        ("lr", -1.0),
        ("lr", float("inf")),
        ("betas", (0.9, 1.0)),
        ("eps", -1e-8),
        ("weight_decay", float("nan")),
        ("betas", [0.9]),
    ],
    "sgd": [("lr", float("nan")), ("momentum", 1.5), ("weight_decay", float("nan"))],
    "muon": [
        ("momentum", 1.0),
        ("ns_steps", 0),
        ("ns_steps", 2.5),
        ("ns_steps", True),
        ("nesterov", "no"),
        ("ns_dtype", torch.float16),
        ("betas", (-0.1, 0.9)),
        ("eps", float("nan")),
    ],
    "scion": [("momentum", 0.0), ("scale", 0.0), ("embedding_lmo", "row"), ("constrained", "no")],
    "shampoo": [("betas", (0.9, 1.0)), ("eps", 0.0), ("frequency", 0), ("max_block_size", True)],
    "soap": [("lr", "0.1"), ("shampoo_beta", 1.0), ("eps", -1.0), ("frequency", 0), ("max_preconditioned_size", 0)],
    "psgd": [
        ("momentum", 1.0),
        ("preconditioner_lr", 0.0),
        ("update_probability", "often"),
        ("max_size_triangular", -1),
    ],
}


@pytest.mark.parametrize(("name", "key", "value"), [(name, *bad) for name, bads in BAD.items() for bad in bads])
def test_every_group_is_checked_whichever_way_it_comes(name, key, value):
    p, optimizer = make(name)
    other = torch.zeros(3, 3, requires_grad=True)
    group = {"params": [("v", other)], "role": "matrix", key: value}
    with pytest.raises(ValueError, match=key):
        REGISTRY[name].optimizer([{"params": [("w", p)], "role": "matrix"}, group], lr=0.01)
    with pytest.raises(ValueError, match=rf"group 1 \(role matrix\): {key} must be"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=f"the state's group of 1 parameters: {key} must be"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0][key] != value
    steps(p, optimizer)


@pytest.mark.parametrize("shape", [(12, 8), (5,), (1,)])
@pytest.mark.parametrize("name", REGISTRY)
def test_a_finite_gradient_whose_squares_overflow_is_refused_or_forgotten(name, shape):
    """Refused before anything has changed; else the weights stay finite and go on moving."""
    torch.manual_seed(0)
    p = torch.randn(shape, requires_grad=True)
    optimizer = REGISTRY[name].optimizer([("w", p)], lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    steps(p, optimizer, 12)
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    p.grad = torch.randn(shape, generator=generator).sign() * 1e20
    try:
        optimizer.step()
    except NonFiniteGradientError as error:
        assert "squares overflow float32, of w" in str(error) and torch.equal(p, before)
        for key, value in optimizer.state_dict()["state"][0].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[0][key]))
    else:
        assert name not in ("adamw", "shampoo", "soap")
    for _ in range(3):
        last = p.detach().clone()
        steps(p, optimizer, 40)
        assert p.isfinite().all() and not torch.equal(p, last)
    p.grad = torch.full(shape, 1e15)  # large, yet no square overflows
    optimizer.step()
    assert p.isfinite().all()
