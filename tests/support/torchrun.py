"""Runs trained by one process or by several under torchrun (gloo), and how far apart their weights end."""

import json
import os
import socket
import subprocess
import sys
import time

from safetensors.torch import load_file

from beyond_outliers.train import load_result, run_folder, weights_path

# torchrun's store takes one process group a process: the next run's is the first one's
ONE_GROUP = """
import torch.distributed as dist
first = dist.init_process_group
dist.init_process_group = lambda backend: None if dist.is_initialized() else first(backend)
dist.destroy_process_group = lambda: dist.barrier()
"""
WORKER = (
    ONE_GROUP
    + """
import contextlib, json, os, pathlib, sys, torch
torch.set_num_threads(1)
from beyond_outliers.config import RunConfig
from beyond_outliers.model import build
from beyond_outliers.train import loop, train
configs, root, wide = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "float64"
fails_at, options = int(sys.argv[4]), json.loads(sys.argv[5])
if wide:
    torch.set_default_dtype(torch.float64)
    # which would train in float32 all the same
    loop.plain_settings = build.plain_settings = lambda training: contextlib.nullcontext()
step = loop._Run._step
def failing(run):
    if run.step == fails_at and run.workers.rank == run.workers.count - 1:
        os._exit(3)
    return step(run)
loop._Run._step = failing
for config in configs:
    train(RunConfig.from_json(config), root=root, compile=False, progress=False, **options)
"""
)


def launched(script, root, workers, *arguments):
    """A script run with so many processes; the finished process and the seconds that it took."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "worker.py").write_text(script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={workers}", f"--master-port={port}"]
    command = [sys.executable, *(launcher if workers > 1 else []), str(root / "worker.py"), *arguments]
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    return done, time.monotonic() - started


def trained(configs, root, workers, dtype="float32", fails_at=-1, options=None):
    """Trains runs one after the other with so many processes; the finished process and the seconds that it took.

    options: of `train`.
    """
    given = [json.dumps([c.to_json() for c in configs]), str(root), dtype, str(fails_at), json.dumps(options or {})]
    return launched(WORKER, root, workers, *given)


def weights(config, root):
    result = load_result(run_folder(config, root))
    return load_file(weights_path(result.folder, result.row["steps"]))


def furthest(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)
