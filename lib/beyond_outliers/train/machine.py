"""What a run is computed on and how: device, compilation; and where, when and with what its numbers were made."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

from beyond_outliers.config.parsing import choose
from beyond_outliers.config.run import RunConfig
from beyond_outliers.model.decoder import Decoder
from beyond_outliers.paths import git_commit

# nats by which losses of one run differ between processors: in the median of the runs that were made again on others
# (data/results/*/machines.csv: eight of confirm, at most 0.040; 46 of pocket, 0.072), and what is still taken for it
MACHINE_EFFECT = 0.012, 0.1
COMPILING_PAYS_ABOVE = 6e11  # floating-point operations of a run on CPU; below, compiling costs more than it saves


def device_named(name: str) -> torch.device:
    choose("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': torch sees no CUDA device here; valid: cpu, auto")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def should_compile(compile: bool | str, config: RunConfig, device: torch.device) -> bool:
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto', not {compile!r}")
    compiler = any(map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")))  # for its kernels
    if compile is True and not compiler:
        raise ValueError(
            "compile=True needs a C++ compiler, and there is none: install one, set CXX, or say compile='auto'"
        )
    operations = 6 * config.model.n_parameters * config.steps * config.tokens_per_step
    pays = compiler and (device.type == "cuda" or operations > COMPILING_PAYS_ABOVE)
    return pays if compile == "auto" else bool(compile)


class LossModule(nn.Module):
    """forward = loss, so that data parallelism wraps one call. Compiled on CUDA as a whole; on CPU all but the head,
    whose loss is library calls on slices of tokens, nothing to fuse (`losses`).
    """

    def __init__(self, model: Decoder, compiled: bool):
        super().__init__()
        self.model = model
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.hidden = torch.compile(model.hidden) if compiled and on_cpu else model.hidden
        if compiled and not on_cpu:
            self.compile()

    def forward(self, ids, targets):
        return self.model.head_loss(self.hidden(ids), targets)


def check_shares(config: RunConfig, world: int) -> None:
    """ValueError unless every worker's share of a batch is whole micro-batches, or smaller than one.

    Other shares would be cut into parts of unequal weight, or of another number than the gradients are summed after.
    """
    share, rest = divmod(config.batch_size, world)
    if rest or (share > config.micro_batch and share % config.micro_batch):
        raise ValueError(
            f"batch_size {config.batch_size} over {world} workers is {config.batch_size / world:g} sequences each, no "
            f"multiple of micro_batch {config.micro_batch}; valid: a batch_size that is a multiple of "
            f"{world * config.micro_batch}, or a micro_batch that divides every worker's share"
        )


def provenance(device: torch.device, compiled: bool) -> dict:
    """Where, when and with what a number was made."""
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "version": importlib.metadata.version("beyond-outliers"),
        "commit": git_commit(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The CPU, as exactly as the system tells, and the vector instructions that torch uses on it.

    Numbers differ between processors in their last digits, and training amplifies that (MACHINE_EFFECT).
    """
    fields = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [
        f"{key.removeprefix('cpu ')} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields
    ]
    return ", ".join([name, *numbers, torch.backends.cpu.get_cpu_capability()])
