"""A run's folder and what it holds: configuration, metrics, weights, result. `train` writes it, all others read it.

config.json                the resolved RunConfig
metrics.csv                tidy: one row a logged step (train loss) or evaluation (validation loss)
weights/000120.safetensors the weights at every evaluation, the last of them final
result.json                one flat row, written when the run ends: finished or diverged
state.pt                   optimizer state of the last evaluation, removed when the run ends
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pandas as pd
import torch
from safetensors.torch import load_model
from torch import nn

from beyond_outliers import paths
from beyond_outliers.config.run import LlamaConfig, ModelConfig, Olmo2Config, RunConfig
from beyond_outliers.decoder import Decoder
from beyond_outliers.llama import Llama
from beyond_outliers.model import Olmo2
from beyond_outliers.quantizers.convert import prepare_qat
from beyond_outliers.quantizers.formats import QuantSpec

MODELS: dict[type[ModelConfig], Callable[..., Decoder]] = {Olmo2Config: Olmo2, LlamaConfig: Llama}


@dataclass(frozen=True)
class RunResult:
    """A finished (or diverged) run: its config, its folder, and `row`, what result tables show of it."""

    config: RunConfig
    folder: Path
    row: dict

    @property
    def metrics(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "metrics.csv")

    @property
    def evaluations(self) -> pd.DataFrame:
        """step, tokens, val_loss and the weights file of every evaluation that kept its weights."""
        table = self.metrics.dropna(subset="val_loss")
        table = table.assign(weights=[str(weights_path(self.folder, step)) for step in table.step])
        return table[[Path(file).exists() for file in table.weights]].reset_index(drop=True)

    def load_model(self, step: int | None = None) -> nn.Module:
        """The model with the weights of an evaluation, by default the last; on CPU, in eval mode."""
        model = build_model(self.config)
        load_model(model, weights_path(self.folder, self.row["steps"] if step is None else step))
        return model.eval()


def weights_path(folder: Path, step: int) -> Path:
    return folder / "weights" / f"{step:06d}.safetensors"


def run_folder(config: RunConfig, root: Path | None = None) -> Path:
    return (root or paths.RUNS) / config.scale / config.name


def load_result(folder: Path) -> RunResult | None:
    """The result in a run's folder, None when the run has not ended."""
    if not (folder / "result.json").exists():
        return None
    config = RunConfig.from_json((folder / "config.json").read_text())
    return RunResult(config, folder, json.loads((folder / "result.json").read_text()))


def model_of(config: RunConfig, weights: dict[str, torch.Tensor], source: object) -> nn.Module:
    """The run's model with these weights, on CPU, in eval mode. ValueError naming `source` where they do not fit."""
    model = build_model(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"head.weight"}:  # the head is the embedding's own tensor, stored once
        raise ValueError(f"{source} does not fit the model of {config.name}: {[*unexpected, *missing]}")
    return model.eval()


def build_model(config: RunConfig) -> Decoder:
    """The run's model at its initialisation: a function of (shape, seed), the same for every optimizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = MODELS[type(config.model)](config.model)
    if config.quantization:
        spec = {key: value for key, value in config.quantization.items() if key != "scheme"}
        model = cast(Decoder, prepare_qat(model, QuantSpec(**spec), scheme=config.quantization["scheme"]))
    return model


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
