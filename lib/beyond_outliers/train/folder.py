"""A run's folder and what it holds: configuration, metrics, weights, result. `train` writes it, all others read it.

config.json                the resolved RunConfig
metrics.csv                tidy: one row a logged step (train loss) or evaluation (validation loss)
weights/000120.safetensors the weights at every evaluation, the last of them final
result.json                one flat row, written when the run ends: finished or diverged
state-000120.pt            all that the run needs to go on from a step: the last two, removed when the run ends
SHA256SUMS                 what all these files must be; checked whenever one of them is read
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from beyond_outliers import checksums, lazily, paths
from beyond_outliers.config.run import RunConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

__getattr__, _ = lazily("beyond_outliers.train", **{".model.build": "build_model"})  # scripts import it from here


@dataclass(frozen=True)
class RunResult:
    """A finished (or diverged) run: its config, its folder, and `row`, what result tables show of it."""

    config: RunConfig
    folder: Path
    row: dict

    @property
    def metrics(self) -> pd.DataFrame:
        check(self.folder, "metrics.csv")
        return pd.read_csv(self.folder / "metrics.csv")

    @property
    def evaluations(self) -> pd.DataFrame:
        """step, tokens, val_loss and the weights file of every evaluation that kept its weights."""
        table = self.metrics.dropna(subset="val_loss")
        table = table.assign(weights=[str(weights_path(self.folder, step)) for step in table.step])
        return table[[Path(file).exists() for file in table.weights]].reset_index(drop=True)

    def load_model(self, step: int | None = None) -> "nn.Module":
        """The model with the weights of an evaluation, by default the last; on CPU, in eval mode."""
        step = self.row["steps"] if step is None else step
        return model_of(self.config, self.weights(step), weights_path(self.folder, step))

    def weights(self, step: int) -> "dict[str, torch.Tensor]":
        """The weights of an evaluation as they are stored."""
        check(self.folder, weights_name(step))
        from safetensors.torch import load_file

        return load_file(weights_path(self.folder, step))


def check(folder: Path, *names: str) -> None:
    """DamagedFile, with the remedy, unless these files of a run are as they were written; all by default."""
    checksums.check(folder, *names, remedy=f"delete the folder {folder} and run the same command again")


def weights_name(step: int) -> str:
    return f"weights/{step:06d}.safetensors"


def weights_path(folder: Path, step: int) -> Path:
    return folder / weights_name(step)


def run_folder(config: RunConfig, root: Path | None = None) -> Path:
    return (root or paths.RUNS) / config.scale / config.name


def load_result(folder: Path) -> RunResult | None:
    """The result in a run's folder, None when the run has not ended. DamagedFile when it is not what was written."""
    if not (folder / "result.json").exists():
        return None
    check(folder, "config.json", "result.json")
    config = RunConfig.from_json((folder / "config.json").read_text())
    return RunResult(config, folder, json.loads((folder / "result.json").read_text()))


def whole_result(folder: Path) -> RunResult | None:
    """As `load_result`, but None, with a warning, for a result that is not what was written."""
    try:
        return load_result(folder)
    except checksums.DamagedFile as damage:
        warnings.warn(f"left out: {damage}", stacklevel=3)
        return None


def model_of(config: RunConfig, weights: "dict[str, torch.Tensor]", source: object) -> "nn.Module":
    """The run's model with these weights, on CPU, in eval mode. ValueError naming `source` where they do not fit."""
    from beyond_outliers.model.build import build_model

    model = build_model(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"head.weight"}:  # the head is the embedding's own tensor, stored once
        raise ValueError(f"{source} does not fit the model of {config.name}: {[*unexpected, *missing]}")
    return model.eval()


def result_row(
    config: RunConfig, status: str, reason: str, rows: list[dict], steps: int, seconds: float, epochs: float
) -> dict:
    """What result tables show of a run that has ended ("finished" or "diverged"), by its logged `rows`."""
    last = next(row for row in reversed(rows) if "val_loss" in row)
    metrics, finished = pd.DataFrame(rows), status == "finished"
    speed = metrics.tokens_per_second if "tokens_per_second" in metrics else pd.Series(dtype=float)
    return {
        "run": config.name,
        "run_id": config.run_id,
        "status": status,
        "reason": reason,
        **flat_config(config),
        "val_loss": last["val_loss"] if finished else float("nan"),
        "val_standard_error": last["val_standard_error"],
        "bits_per_byte": last["bits_per_byte"] if finished else float("nan"),
        "steps": steps,
        "tokens": steps * config.tokens_per_step,
        "epochs": epochs,
        "seconds": seconds,
        "tokens_per_second": float(speed.median()),  # the median leaves out compilation and other stalls
    }


def flat_config(config: RunConfig) -> dict:
    """The resolved config as flat columns of a result table."""
    quantization, model = config.quantization or {}, config.model
    shape = ("n_parameters", "width", "depth", "n_heads", "n_kv_heads", "vocab_size")
    return {
        **{key: getattr(config, key) for key in ("scale", "size", "optimizer", "lr", "weight_decay")},
        "hyper": json.dumps(config.hyper, sort_keys=True),
        "seed": config.seed,
        "scheme": quantization.get("scheme", "none"),
        **{f"qat_{part}": quantization.get(part, "none") for part in ("weights", "activations")},
        **{key: getattr(model, key) for key in shape},
        **{key: getattr(config, key) for key in ("context", "batch_size", "tokens_per_parameter")},
        "corpus": config.corpus.source,
    }
