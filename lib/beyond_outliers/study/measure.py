"""What is measured on a trained model: post-training quantization, zero-shot accuracy, outliers, error propagation.

`measure_run` writes one folder of tidy tables beside the run's weights, one checkpoint a folder. Measuring again does
nothing; an interrupted measurement leaves no folder.
"""

import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from beyond_outliers.corpus.tokens import Corpus, open_corpus
from beyond_outliers.evaluate.loss import validation_loss
from beyond_outliers.evaluate.multiple_choice import zero_shot
from beyond_outliers.evaluate.tasks import TASKS
from beyond_outliers.metrics import activation_metrics
from beyond_outliers.propagation.decomposition import decompose
from beyond_outliers.quantizers.convert import quantize_model
from beyond_outliers.quantizers.formats import QuantSpec
from beyond_outliers.train.folder import RunResult

MAIN = QuantSpec()  # the paper's format: int4 weights and activations, one scale a row
LEVELS = ("full", "light")


def specs(formats: list[str]) -> list[QuantSpec]:
    """The formats of notebook 03: each for weights alone and for both, then int4 rotated and with the tied head."""
    both = [QuantSpec(weights=f, activations=f) for f in formats]
    weights = [QuantSpec(weights=f, activations="none") for f in formats]
    return [*both, *weights, QuantSpec(rotate=True), QuantSpec(head=True)]


def validation_batches(corpus: Corpus, context: int, n_tokens: int, batch_size: int = 16) -> list[torch.Tensor]:
    """Windows of validation tokens spread evenly over the split: a list of (batch, context) int64."""
    count = max(1, n_tokens // context)
    starts = np.linspace(0, len(corpus.validation) - context, count).astype(int)
    ids = torch.from_numpy(np.stack([corpus.validation[s : s + context] for s in starts]).astype(np.int64))
    return list(ids.split(batch_size))


def measure_folder(folder: Path, step: int) -> Path:
    return folder / f"measure-{step:06d}"


def measure_run(result: RunResult, step: int, level: str, settings: dict) -> Path:
    """Measures the checkpoint of `step` and returns the folder of its tables.

    level "full": every format of `settings`, all zero-shot tasks; "light": the paper's format and `cloze` alone.
    A run of quantization-aware training is evaluated as it is, since it is quantized already.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; valid: {', '.join(LEVELS)}")
    target = measure_folder(result.folder, step)
    if (target / f"{level}.done").exists() or (target / "full.done").exists():
        return target
    corpus = open_corpus(result.config.corpus)
    model = result.load_model(step)
    if result.config.quantization:
        tables = {"zero_shot": _zero_shot(model, corpus, result.config.context, settings, TASKS).assign(spec="QAT")}
    else:
        tables = _tables(model, corpus, result.config.context, level, settings)
    temporary = Path(tempfile.mkdtemp(dir=result.folder, prefix=".measuring-"))
    for name, table in tables.items():
        table.insert(0, "run", result.config.name)
        table.insert(1, "step", step)
        table.to_csv(temporary / f"{name}.csv", index=False)
    (temporary / f"{level}.done").touch()
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    return target


def _tables(model: nn.Module, corpus: Corpus, context: int, level: str, settings: dict) -> dict[str, pd.DataFrame]:
    batches = validation_batches(corpus, context, settings["propagation_tokens"])
    tasks = TASKS if level == "full" else ("cloze",)
    accuracy = _zero_shot(model, corpus, context, settings, tasks).assign(spec="none")
    base = _loss(model, corpus, context, settings)
    main = quantize_model(model, MAIN)  # once: its loss, its accuracy and its error propagation
    ptq, accuracies = [{"spec": "none", **base}], [accuracy]
    for spec in specs(settings["formats"]) if level == "full" else [MAIN, QuantSpec(activations="none")]:
        quantized = main if spec == MAIN else quantize_model(model, spec)
        found = _loss(quantized, corpus, context, settings)
        ptq.append({"spec": spec.name, **asdict(spec), **found, "increase": found["val_loss"] - base["val_loss"]})
        chosen = tasks if spec == MAIN else ("cloze",)
        accuracies.append(_zero_shot(quantized, corpus, context, settings, chosen).assign(spec=spec.name))
    return {
        "ptq": pd.DataFrame(ptq),
        "zero_shot": pd.concat(accuracies, ignore_index=True),
        "outliers": activation_metrics(model, batches),
        "propagation": _propagation(model, main, batches),
    }


def _propagation(model: nn.Module, quantized: nn.Module, batches: list[torch.Tensor]) -> pd.DataFrame:
    """Attention as one module, as in the paper, and opened up, so that its linear layers have rows of their own."""
    parts = [decompose(model, quantized, batches, attention=view).assign(attention=view) for view in ("unit", "open")]
    return pd.concat(parts, ignore_index=True)


def _loss(model: nn.Module, corpus: Corpus, context: int, settings: dict) -> dict:
    found = validation_loss(model, corpus.validation, context, max_tokens=settings["validation_tokens"])
    return {"val_loss": found.loss, "val_standard_error": found.standard_error}


def _zero_shot(model: nn.Module, corpus: Corpus, context: int, settings: dict, tasks: tuple[str, ...]) -> pd.DataFrame:
    return zero_shot(
        model,
        corpus.tokenizer,
        tasks,
        limit=settings["questions"],
        heldout=corpus.heldout_documents(),
        context=context,  # these models are useless beyond the positions that they were trained on
        progress=False,
    )
