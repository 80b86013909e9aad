"""Final weights of one seed a size and optimizer, small enough to commit, so that notebooks can be replayed untrained.

data/checkpoints/SCALE/RUN.safetensors holds the weights in bfloat16 and the run's config in its metadata. Rounding to
bfloat16 (relative error at most 2^-9) moves a loss by far less than a seed does, but not by nothing: what is read off a
checkpoint is not a row of the tables.
"""

from functools import partial
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from beyond_outliers import checksums, paths
from beyond_outliers.config.run import RunConfig
from beyond_outliers.metrics import without_down
from beyond_outliers.study.measure import measure_model
from beyond_outliers.study.study import Study
from beyond_outliers.train.folder import RunResult, model_of


def keep(study: Study) -> list[Path]:
    """Writes the checkpoints of the lowest main seed that has ended here, one a (size, optimizer, scheme).

    Returns the files written.
    """
    chosen: dict[tuple, RunResult] = {}
    main = [planned for planned in study.planned() if planned.purpose in ("full_precision", "qat")]
    for planned in sorted(main, key=lambda planned: planned.config.seed):
        config, result = planned.config, study.result(planned)
        if result and result.row["status"] == "finished":
            chosen.setdefault((config.size, config.optimizer, (config.quantization or {}).get("scheme")), result)
    written = []
    for result in chosen.values():
        target = paths.CHECKPOINTS / study.scale / f"{result.config.name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        weights = result.weights(result.row["steps"])
        halves = {name: value.to(torch.bfloat16) for name, value in weights.items()}
        metadata = {"config": result.config.to_json(), "run": result.config.name}
        checksums.write_files(target.parent, {target.name: partial(save_file, halves, metadata=metadata)})
        written.append(target)
    return written


def checkpoints(scale: str) -> dict[str, Path]:
    """Run name -> file of the committed checkpoints of a scale; empty where there are none."""
    return {file.stem: file for file in sorted((paths.CHECKPOINTS / scale).glob("*.safetensors"))}


def load_checkpoint(file: Path) -> tuple[RunConfig, nn.Module]:
    """The run's config and its model in float32 and evaluation mode. ValueError for a file without a config."""
    checksums.check(file.parent, file.name, remedy="take it from the repository again (git restore)")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    if "config" not in metadata:
        raise ValueError(f"{file} has no config in its metadata: not a checkpoint of this project")
    config = RunConfig.from_json(metadata["config"])
    return config, model_of(config, {name: value.float() for name, value in load_file(file).items()}, file)


def replay(study: Study) -> pd.DataFrame:
    """Measures the kept checkpoints in full precision again, and sets what comes out beside the rows of their runs.

    One row a run: size, optimizer, seed; loss, damage in the primary spec, MMR without `down` and R_L, each as in the
    tables (`loss`, ...) and of the checkpoint (`loss_replayed`, ...). ValueError where no checkpoint is kept, or the
    tables have no row of its run.
    """
    files, rows = checkpoints(study.scale), []
    if not files:
        raise ValueError(f"no checkpoint in {paths.CHECKPOINTS / study.scale}: run `beyond-outliers keep` first")
    final = {name: study.table(name).query("checkpoint == 'final'") for name in ("ptq", "outliers", "propagation")}
    for run, file in tqdm(files.items(), desc="replay", disable=None):
        config, model = load_checkpoint(file)
        if config.quantization:
            continue  # a QAT run has no damage to measure
        if run not in set(final["ptq"].run):
            raise ValueError(f"{file} belongs to no run of the tables of {study.scale}")
        again = measure_model(model, config, "light", study.protocol.measure)
        row = {"run": run, "size": config.size, "optimizer": config.optimizer, "seed": config.seed}
        before = {name: table[table.run == run] for name, table in final.items()}
        for end, tables in {"": before, "_replayed": again}.items():
            ptq, modules = tables["ptq"].set_index("spec"), tables["propagation"].query("attention == 'unit'")
            row["loss" + end], row["damage" + end] = ptq.val_loss["none"], ptq.increase[study.protocol.measure.primary]
            row["mmr" + end] = without_down(tables["outliers"]).mmr.mean()
            row["R_L" + end] = modules.sort_values("index").R.iloc[-1]
        rows.append(row)
    return pd.DataFrame(rows)
