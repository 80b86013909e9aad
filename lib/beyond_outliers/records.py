"""What a result row says beside its numbers: the resolved config, and where, when and with what it was made."""

import contextlib
import importlib.metadata
import json
import platform
import subprocess
from datetime import UTC, datetime

import numpy as np
import torch

from beyond_outliers import paths
from beyond_outliers.config import RunConfig


def flat_config(config: RunConfig) -> dict:
    """The resolved config as flat columns of a result table."""
    quantization = config.quantization or {}
    return {
        "scale": config.scale,
        "size": config.size,
        "optimizer": config.optimizer,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "hyper": json.dumps(config.hyper, sort_keys=True),
        "seed": config.seed,
        "scheme": quantization.get("scheme", "none"),
        "qat_weights": quantization.get("weights", "none"),
        "qat_activations": quantization.get("activations", "none"),
        "n_parameters": config.model.n_parameters,
        "width": config.model.width,
        "depth": config.model.depth,
        "n_heads": config.model.n_heads,
        "n_kv_heads": config.model.n_kv_heads,
        "vocab_size": config.model.vocab_size,
        "context": config.context,
        "batch_size": config.batch_size,
        "tokens_per_parameter": config.tokens_per_parameter,
        "corpus": config.corpus.source,
    }


def provenance(device: torch.device, compiled: bool) -> dict:
    """Where, when and with what a number was made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "version": importlib.metadata.version("beyond-outliers"),
        "commit": git_commit(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_commit() -> str:
    """Commit of the repository, with "+" when tracked sources differ from it; "unknown" outside a checkout."""
    git = ["git", "-C", str(paths.ROOT)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "lib", "data/scales"], capture_output=True)
        return commit.stdout.strip() + ("+" if changed.returncode else "")
    return "unknown"
