"""Step time of every optimizer on a model's hidden matrices beside public implementations, paired in one process.

Only implementations of the same algorithm in the same dtype are compared: torch's Muon and pytorch_optimizer's SCION
iterate in bfloat16, so that "Muon, bfloat16" stands beside them, and float32, which the study's runs on CPU take, has
no public counterpart. Of Shampoo pytorch_optimizer has another algorithm (it preconditions before averaging and grafts
another rule), the nearest public kin. heavyball's variants compute something else each; when last
measured (6x256, one thread) they took 1.1 (SOAP) to 4.0 times (PSGD) what those compared here take.
"""

import time

import pandas as pd
import pytest
import torch

from benchmarking import compared, on_threads, paired
from beyond_outliers.config import Olmo2Config, Protocol
from beyond_outliers.model import Olmo2
from beyond_outliers.optimizers import OPTIMIZERS, PSGD, REGISTRY, build_optimizer, parameter_groups
from plain_model import PlainModel

SIZES = {
    "6x256": Olmo2Config(vocab_size=2048, width=256, depth=6, n_heads=4),
    "2x64": Olmo2Config(vocab_size=512, width=64, depth=2, n_heads=2),
    "4x128": Olmo2Config(vocab_size=2048, width=128, depth=4, n_heads=4),
}
# Steps between refreshes; PSGD's update probability is held at 0.1 for both, so that a cycle has both kinds of steps.
PERIOD = {"shampoo": 20, "soap": 10, "psgd": 10}


def implementations(name: str) -> dict:
    """label -> constructor over a list of matrices; the public one last."""
    import pytorch_optimizer as public

    ours, hyper = REGISTRY[name].optimizer, {"update_probability": 0.1} if name == "psgd" else {}
    label = REGISTRY[name].label
    found = {label: lambda p: ours(p, lr=0.01, **hyper)}
    if name in ("muon", "scion"):
        found = {f"{label}, float32": found[label]}
        found[f"{label}, bfloat16"] = lambda p: ours(p, lr=0.01, ns_dtype=torch.bfloat16)
    spectral = 2  # pytorch_optimizer's LMONorm.SPECTRAL
    others = {
        "adamw": ("torch.optim.AdamW, fused", lambda p: torch.optim.AdamW(p, 0.01, fused=True)),
        "muon": ("torch.optim.Muon, bfloat16", lambda p: torch.optim.Muon(p, 0.01)),
        "psgd": (
            "pytorch_optimizer Kron",
            lambda p: public.Kron(p, 0.01, pre_conditioner_update_probability=0.1),
        ),
        "scion": ("pytorch_optimizer SCION, bfloat16", lambda p: public.SCION(p, 0.01, norm_type=spectral)),
        "shampoo": (
            "pytorch_optimizer Shampoo (another algorithm)",
            lambda p: public.Shampoo(p, 0.01, preconditioning_compute_steps=20),
        ),
        "soap": ("pytorch_optimizer SOAP", lambda p: public.SOAP(p, 0.01, weight_decay=0.0)),
    }
    return found | dict([others[name]])


def matrices(config: Olmo2Config) -> list[torch.Tensor]:
    """Fresh copies of a model's hidden matrices, with gradients."""
    torch.manual_seed(0)
    found = next(g["params"] for g in parameter_groups(Olmo2(config)) if g["role"] == "matrix")
    params = [p.detach().clone().requires_grad_() for _, p in found]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def compare_optimizers(sizes=("6x256", "4x128"), names=tuple(OPTIMIZERS), threads=1, cycles: int = 3) -> list[dict]:
    """A row for each size, optimizer and dtype: time of a step, the mean over a cycle from refresh to refresh.

    The implementations take turns, step by step; a ratio is that of one cycle. CPU time of the process over `threads`.
    """
    rows = []
    for size in sizes:
        for name in names:
            calls = {label: make(matrices(SIZES[size])).step for label, make in implementations(name).items()}
            period = PERIOD.get(name, 5)
            count = 5 * cycles if name not in PERIOD else -(-cycles // 2) if period == 20 else cycles
            steps = paired(calls, period * count, clock=time.process_time) / threads  # any window of a period has one
            cycle = steps.groupby(steps.index // period).mean()
            *ours, public = calls
            rows += [compared(cycle, label, public, "optimizer step", size, threads) for label in ours]
    return rows


def updates_in_a_run(steps: int) -> float:
    """Share of a run's steps in which PSGD updates its factors: all of the first 500, every 34th in the end."""
    optimizer = PSGD([torch.zeros(1, 1, requires_grad=True)])
    waited = updates = 0
    for step in range(steps):
        waited += 1
        if waited >= optimizer.period(optimizer.param_groups[0], step):
            waited, updates = 0, updates + 1
    return updates / steps


def share_of_training_step(sizes=("0.08M", "0.26M", "0.54M"), threads: int = 1, cycles: int = 5) -> list[dict]:
    """A step of all parameters beside a plain eager forward and backward pass of 8 x 128 tokens, in CPU time.

    Sizes and preconditioned sides are those of scale confirm2, which are the paper's; steps are means over whole cycles
    from refresh to refresh. PSGD updates its factors ever more rarely: one row with an update in every step, one of a
    whole run.
    """
    rows, protocol, beside = [], Protocol.load("confirm2"), "forward and backward pass"
    for size in sizes:
        config, hyper = protocol.model(size), protocol.settings.hyper
        ids = torch.randint(config.vocab_size, (8, 129))
        plain = PlainModel(config)

        def passes(plain=plain, ids=ids):
            plain.zero_grad(set_to_none=True)
            plain.loss(ids[:, :-1], ids[:, 1:]).backward()

        def shares(name, label, period, count, config=config, hyper=hyper, ids=ids, passes=passes, **more):
            torch.manual_seed(0)
            model = Olmo2(config)
            optimizer = build_optimizer(model, name, 1e-3, **hyper.get(name, {}), **more)
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            calls = {beside: passes, label: optimizer.step}
            steps = paired(calls, period * count, warm_up=period, clock=time.process_time) / threads
            return steps.groupby(steps.index // period).mean()

        for name, entry in REGISTRY.items():
            if name != "psgd":
                times = {entry.label: shares(name, entry.label, PERIOD.get(name, 5), cycles)}
            else:
                always, label = "PSGD, an update in every step", "PSGD, over a run"
                times = {always: shares(name, always, 5, cycles, update_probability=1.0)}
                rare = shares(name, label, 34, cycles, update_probability=1 / 34)
                step = protocol.config(size, "adamw", 1e-3, 0).steps
                often = (updates_in_a_run(step) - 1 / 34) / (1 - 1 / 34)
                times[label] = rare.assign(
                    **{label: (1 - often) * rare[label] + often * times[always][always].median()}
                )
            rows += [
                compared(table, label, beside, "optimizer's share", size, threads) for label, table in times.items()
            ]
    return rows


def measure() -> pd.DataFrame:
    with on_threads(1):
        return pd.DataFrame([*compare_optimizers(), *share_of_training_step()])


@pytest.mark.slow
def test_every_optimizer_stands_beside_a_public_one():
    rows = pd.DataFrame(compare_optimizers(("2x64",), cycles=1))
    assert len(rows) == len(OPTIMIZERS) + 2  # Muon and Scion in two dtypes
    assert ((rows.low <= rows.value) & (rows.value <= rows.high)).all() and (rows.seconds > 0).all()


def test_psgd_updates_ever_more_rarely_over_a_run():
    assert updates_in_a_run(500) == 1 and 0.6 < updates_in_a_run(1606) < 0.65 and 0.1 < updates_in_a_run(10_577) < 0.2
