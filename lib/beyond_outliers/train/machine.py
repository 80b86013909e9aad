"""Where, when and with what a number was made: device, versions, commit."""

import contextlib
import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime

import numpy as np
import torch

from beyond_outliers import paths


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
