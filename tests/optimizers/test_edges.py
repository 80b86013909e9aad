"""What surrounds an optimizer changes nothing in its steps: torch's defaults, autocast, schedulers, no entries."""

import pytest
import torch
from torch.optim import lr_scheduler

from beyond_outliers.optimizers import REGISTRY, build_optimizer
from beyond_outliers.optimizers.outside import Outside

SHAPES = [(6, 4), (6, 4), (9, 5), (7,)]
# refreshes fall inside a few steps
OFTEN = {"shampoo": {"frequency": 2}, "soap": {"frequency": 2}, "psgd": {"update_probability": 1.0}}


def trained(name, shapes=SHAPES, steps=4, dtype=torch.float32):
    """Weights after some steps from fixed numbers."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
    optimizer = REGISTRY[name].optimizer(params, lr=0.01, **OFTEN.get(name, {}))
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        optimizer.step()
    return params


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_bit(name, default):
    expected = trained(name)
    torch.set_default_dtype(default)
    try:
        found = trained(name)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", [*REGISTRY, "torch.optim:Muon"])
def test_a_step_under_autocast_is_the_step_without(name):
    def steps():
        if name in REGISTRY:
            return trained(name)
        p = torch.eye(6).requires_grad_()
        optimizer = Outside([p], name, lr=0.01)
        p.grad = torch.arange(36.0).view(6, 6).sin()
        optimizer.step()
        return [p]

    expected = steps()
    with torch.autocast("cpu", torch.bfloat16):
        found = steps()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", REGISTRY)
def test_parameters_without_entries_are_stepped_over(name):
    """Of zero rows, of zero columns, and an empty vector; the others step as if alone (psgd: but for its probes)."""
    found = trained(name, [(0, 4), (6, 4), (9, 0), (0,), (7,)])
    assert [p.shape for p in found if not p.numel()] == [(0, 4), (9, 0), (0,)]
    alone = trained(name, [(6, 4), (7,)])  # the same random numbers: those of nothing are none
    assert all(map(torch.equal, (p for p in found if p.numel()), alone))
    optimizer = REGISTRY[name].optimizer([torch.zeros(0, 3, requires_grad=True)], lr=0.01)
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(0, 3)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", REGISTRY)
def test_a_scheduler_gives_the_rates_that_it_gives_torchs_own(name):
    def rates(kind):
        p = torch.ones(4, 4, requires_grad=True)
        optimizer = kind([p], lr=0.02)
        optimizer.param_groups[0]["lr"] = 0.005  # set by hand before the scheduler comes
        schedule, found = lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=4), []
        for _ in range(6):
            found.append(optimizer.param_groups[0]["lr"])
            p.grad = torch.ones(4, 4)
            optimizer.step()
            schedule.step()
        return found

    assert rates(REGISTRY[name].optimizer) == pytest.approx(rates(torch.optim.AdamW), rel=1e-12)


@pytest.mark.parametrize("name", ["adamw", "muon", "shampoo", "soap"])
def test_an_eps_that_the_dtype_takes_for_zero_is_refused(name):
    key = "adamw_eps" if name == "muon" else "eps"
    for dtype, eps in ((torch.float32, 1e-40), (torch.float64, 1e-310)):
        with pytest.raises(ValueError, match=r"eps must be .*at least"):
            REGISTRY[name].optimizer([torch.ones(3, dtype=dtype, requires_grad=True)], lr=0.01, **{key: eps})
    REGISTRY[name].optimizer([torch.ones(3, dtype=torch.float64, requires_grad=True)], lr=0.01, **{key: 1e-40})


@pytest.mark.parametrize("name", REGISTRY)
def test_a_sparse_gradient_is_refused_in_words(name):
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = build_optimizer(table, name, 0.01)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="gradient is sparse; valid: dense"):
        optimizer.step()


@pytest.mark.parametrize("name", REGISTRY)
def test_a_rate_may_be_a_tensor_as_in_torch(name):
    """What a compiled step, or a scheduler of a captured graph, writes into."""
    found = [torch.ones(4, 4).requires_grad_() for _ in range(2)]
    for p, lr in zip(found, (0.01, torch.tensor(0.01, dtype=torch.float64)), strict=True):
        optimizer = REGISTRY[name].optimizer([p], lr=lr)
        for step in range(3):
            p.grad = torch.full((4, 4), 1.0 + step)
            optimizer.step()
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
