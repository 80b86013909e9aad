"""The matrix optimizers' work divided among workers: the same numbers, divided states, and states that move on."""

import json
import os
import subprocess
import sys

import pytest
import torch

from beyond_outliers.optimizers import OPTIMIZERS, build_optimizer
from beyond_outliers.optimizers.stacking import StackedOptimizer, cut_to_cache

SHARED = [name for name in OPTIMIZERS if name != "adamw"]
# Two workers: every optimizer shared beside alone, on the same gradients; a state goes from two workers to one and back
WORKER = """
import copy, json, pathlib, sys, torch
import torch.distributed as dist
from beyond_outliers.config import Olmo2Config
from beyond_outliers.model import Olmo2
from beyond_outliers.optimizers import build_optimizer
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
def made(name):
    torch.manual_seed(0)
    model = Olmo2(Olmo2Config(vocab_size=320, width=32, depth=2, n_heads=2, n_kv_heads=1))
    hyper = {"frequency": 3} if name in ("shampoo", "soap") else {"update_probability": 0.4} if name == "psgd" else {}
    return model, build_optimizer(model, name, 1e-2, **hyper)
def steps(runs, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        gradients = [torch.randn(p.shape, generator=generator) for p in runs[0][0].parameters()]
        for model, optimizer in runs:
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
def furthest(one, two):
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), two.parameters(), strict=True))
def kept(optimizer):
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return [sum(v.numel() for v in tensors if not v.is_meta), sum(v.numel() for v in tensors)]
for name in json.loads(sys.argv[1]):
    alone, shared = made(name), made(name)
    shared[1].share()
    steps([alone, shared], 0, 7)
    row = {"shared": furthest(alone[0], shared[0]), "kept": kept(shared[1])}
    states = [optimizer.state_dict() for _, optimizer in (alone, shared)]
    if rank == 0:
        leaves = [torch.utils._pytree.tree_leaves(state["state"]) for state in states]
        row["state"] = len(leaves[0]) == len(leaves[1]) and all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*leaves, strict=True)
        )
    given = [states[1]]
    dist.broadcast_object_list(given)
    from_two, to_two = made(name), made(name)  # a run of two workers goes on in one, one of one in two
    from_two[0].load_state_dict(shared[0].state_dict())
    from_two[1].load_state_dict(copy.deepcopy(given[0]))
    to_two[0].load_state_dict(alone[0].state_dict())
    to_two[1].share()
    to_two[1].load_state_dict(copy.deepcopy(states[0]))
    steps([alone, shared, from_two, to_two], 7, 15)
    row["resumed"] = [furthest(alone[0], model) for model, _ in (shared, from_two, to_two)]
    row["kept after"] = kept(to_two[1])
    found[name] = row
pathlib.Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharing")
    (folder / "worker.py").write_text(WORKER)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(folder / "worker.py")]
    command = [sys.executable, *launcher, json.dumps(SHARED), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_shared_steps_are_the_steps_of_one_worker(found, name):
    for rank in found:
        assert rank[name]["shared"] == 0.0
        assert rank[name]["resumed"] == [0.0, 0.0, 0.0]
    assert found[0][name]["state"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_a_worker_keeps_its_own_states_alone(found, name):
    """What is elementwise everybody keeps: Muon's embedding, vectors."""
    for when in ("kept", "kept after"):
        (one, whole), (two, _) = (rank[name][when] for rank in found)
        assert max(one, two) < 0.8 * whole and one + two >= whole


def test_parts_on_cpus_are_the_same_for_any_number_of_workers():
    params = [torch.zeros(8, 8) for _ in range(10)]
    assert cut_to_cache(params, {}, workers=4) == cut_to_cache(params, {}) == [params]
    on_meta = [p.to("meta") for p in params]
    assert [len(part) for part in cut_to_cache(on_meta, {}, workers=4)] == [3, 3, 3, 1]


def test_a_state_that_another_worker_keeps_cannot_be_taken_over():
    model = torch.nn.Linear(8, 8, bias=False)
    optimizer = build_optimizer(model, "shampoo", 0.1)
    assert isinstance(optimizer, StackedOptimizer)
    group, p = optimizer.param_groups[0], model.weight
    optimizer.state[p] = {"step": 3, **optimizer.init_state(group, p.detach().to("meta"))}
    with pytest.raises(RuntimeError, match="which parameters have a gradient has changed"):
        optimizer._keep_or_drop(group, p, True)
