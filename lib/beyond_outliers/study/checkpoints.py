"""Final weights of one seed a size and optimizer, small enough to commit, so that notebooks can be replayed untrained.

data/checkpoints/SCALE/RUN.safetensors holds the weights in bfloat16 and the run's config in its metadata. Rounding to
bfloat16 (relative error at most 2^-9) moves a loss by far less than a seed does, but not by nothing: what is read off a
checkpoint is not a row of the tables.
"""

from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from beyond_outliers import checksums, paths
from beyond_outliers.config.run import RunConfig
from beyond_outliers.study.study import Study
from beyond_outliers.train.folder import RunResult, model_of

LARGEST = 20_000_000  # bytes a scale


def folder(scale: str) -> Path:
    return paths.CHECKPOINTS / scale


def keep(study: Study) -> list[Path]:
    """Writes the checkpoints of the lowest main seed that has ended here, one a (size, optimizer, scheme).

    Returns the files written. ValueError when the scale's checkpoints would exceed LARGEST bytes.
    """
    chosen: dict[tuple, RunResult] = {}
    for planned in study.planned():
        config = planned.config
        result = study.result(planned) if planned.purpose in ("full_precision", "qat") else None
        if result is None or result.row["status"] != "finished":
            continue
        key = config.size, config.optimizer, (config.quantization or {}).get("scheme")
        if key not in chosen or config.seed < chosen[key].config.seed:
            chosen[key] = result
    written = []
    for result in chosen.values():
        target = folder(study.scale) / f"{result.config.name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        weights = result.weights(result.row["steps"])
        halves = {name: value.to(torch.bfloat16) for name, value in weights.items()}
        metadata = {"config": result.config.to_json(), "run": result.config.name}
        checksums.write_files(target.parent, {target.name: partial(save_file, halves, metadata=metadata)})
        written.append(target)
    if (size := sum(file.stat().st_size for file in folder(study.scale).glob("*.safetensors"))) > LARGEST:
        raise ValueError(f"the checkpoints of {study.scale} take {size:,} bytes, more than {LARGEST:,}")
    return written


def checkpoints(scale: str) -> dict[str, Path]:
    """Run name -> file of the committed checkpoints of a scale; empty where there are none."""
    return {file.stem: file for file in sorted(folder(scale).glob("*.safetensors"))}


def load_checkpoint(file: Path) -> tuple[RunConfig, nn.Module]:
    """The run's config and its model in float32 and evaluation mode. ValueError for a file without a config."""
    checksums.check(file.parent, file.name, remedy="take it from the repository again (git restore)")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    if "config" not in metadata:
        raise ValueError(f"{file} has no config in its metadata: not a checkpoint of this project")
    config = RunConfig.from_json(metadata["config"])
    return config, model_of(config, {name: value.float() for name, value in load_file(file).items()}, file)
