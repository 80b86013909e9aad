"""Several processes under torchrun (gloo): the same run as one process, and an end when one of them fails."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from beyond_outliers.optimizers import OPTIMIZERS
from beyond_outliers.train import evaluation_steps, load_result, run_folder, train, weights_path

pytestmark = pytest.mark.slow

WORKER = """
import json, os, pathlib, sys, torch
torch.set_num_threads(1)
from beyond_outliers.config import RunConfig
from beyond_outliers.train import loop, train
configs, root, wide = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "float64"
fails_at = int(sys.argv[4])
if wide:
    torch.set_default_dtype(torch.float64)
first, dist = loop.dist.init_process_group, loop.dist  # torchrun's store takes one group a process
dist.init_process_group = lambda backend: None if dist.is_initialized() else first(backend)
dist.destroy_process_group = lambda: dist.barrier()
step = loop._Run._step
def failing(run):
    if run.step == fails_at and run.rank == run.world - 1:
        os._exit(3)
    return step(run)
loop._Run._step = failing
for config in configs:
    train(RunConfig.from_json(config), root=root, compile=False, progress=False)
"""


def run(configs, root, workers, dtype="float32", fails_at=-1):
    """Trains runs one after the other with so many processes; the finished process and the seconds that it took."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "worker.py").write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={workers}", f"--master-port={port}"]
    given = [str(root / "worker.py"), json.dumps([c.to_json() for c in configs]), str(root), dtype, str(fails_at)]
    command = [sys.executable, *(launcher if workers > 1 else []), *given]
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    return done, time.monotonic() - started


def weights(config, root):
    result = load_result(run_folder(config, root))
    return load_file(weights_path(result.folder, result.row["steps"]))


def furthest(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)


def test_two_workers_equal_one_in_float64_for_every_optimizer(run_config, tmp_path):
    """Over fifty steps, weights of size one: what differs is rounding alone.

    SOAP amplifies it, however many workers there are: the embedding's first covariance has fewer directions than rows,
    the basis of the rest is rounding, and later gradients are scaled in that basis. Its control is one process with
    another micro-batch.
    """
    base = run_config.replace(tokens_per_parameter=0.57, evaluations=1, lr=1e-3)
    assert base.steps == 50
    configs = [base.replace(optimizer=name) for name in OPTIMIZERS]
    control = base.replace(optimizer="soap", micro_batch=4)
    for workers, runs in ((1, [*configs, control]), (2, configs)):
        done, _ = run(runs, tmp_path / f"{workers}", workers, "float64")
        assert done.returncode == 0, done.stderr[-3000:]
    found = {c.optimizer: furthest(weights(c, tmp_path / "1"), weights(c, tmp_path / "2")) for c in configs}
    print(found)
    assert weights(configs[0], tmp_path / "1")["embedding.weight"].dtype == torch.float64
    assert max(value for name, value in found.items() if name != "soap") < 1e-9, found
    assert found["soap"] < 3 * furthest(weights(configs[-1], tmp_path / "1"), weights(control, tmp_path / "1"))


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_workers(run_config, tmp_path, first, then):
    config = run_config.replace(lr=1e-3)
    whole = train(config, root=tmp_path / "whole", progress=False)
    stopped, _ = run([config], tmp_path / "parts", first, fails_at=evaluation_steps(config)[1] + 2)
    assert stopped.returncode != 0 and load_result(run_folder(config, tmp_path / "parts")) is None
    assert len(list(run_folder(config, tmp_path / "parts").glob("state-*.pt"))) == 2
    done, _ = run([config], tmp_path / "parts", then)
    assert done.returncode == 0, done.stderr[-3000:]
    assert furthest(weights(config, tmp_path / "whole"), weights(config, tmp_path / "parts")) < 1e-4
    assert load_result(run_folder(config, tmp_path / "parts")).row["val_loss"] == pytest.approx(
        whole.row["val_loss"], abs=1e-4
    )


def test_a_worker_that_fails_ends_the_job_within_a_minute(run_config, tmp_path):
    done, seconds = run([run_config], tmp_path, 2, fails_at=5)
    assert done.returncode != 0 and "exitcode  : 3" in done.stderr
    assert seconds < 60
