"""What is measured on a trained model: quantization, zero-shot accuracy, outliers, error propagation, readings.

`measure_run` writes one folder of tidy tables beside the run's weights, one checkpoint a folder. Measuring again does
nothing; an interrupted measurement counts for nothing.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from beyond_outliers import checksums
from beyond_outliers.config.parsing import choose
from beyond_outliers.config.run import RunConfig
from beyond_outliers.config.scale import Measure
from beyond_outliers.corpus.tokens import Corpus, open_corpus
from beyond_outliers.evaluate.loss import validation_loss, window_starts
from beyond_outliers.evaluate.multiple_choice import zero_shot
from beyond_outliers.evaluate.tasks import TASKS
from beyond_outliers.metrics import activation_metrics, average
from beyond_outliers.propagation.decomposition import decompose, summarise
from beyond_outliers.propagation.norms import REDUCTIONS
from beyond_outliers.propagation.output_error import output_readings
from beyond_outliers.quantizers.convert import quantize_model
from beyond_outliers.quantizers.spec import QuantSpec
from beyond_outliers.train.folder import RunResult

LEVELS = ("light", "common", "full")  # each measures what the one before it does


def specs(settings: Measure) -> list[QuantSpec]:
    """What models are measured in: the specs that the scale names, else every format of notebook 03.

    These are: each for weights and activations, each for weights alone, then int4 rotated and with the tied head.
    """
    if settings.specs:
        return [QuantSpec.named(name) for name in settings.specs]
    both = [QuantSpec(weights=f, activations=f) for f in settings.formats]
    weights = [QuantSpec(weights=f, activations="none") for f in settings.formats]
    return [*both, *weights, QuantSpec(rotate=True), QuantSpec(head=True)]


def fitting(found: Sequence[QuantSpec], config: RunConfig) -> Iterator[QuantSpec]:
    """Those of the specs whose blocks divide every width of the run's model."""
    model = config.model
    for spec in found:
        with contextlib.suppress(ValueError):
            spec.check_width(model.width)
            spec.check_width(model.mlp_ratio * model.width)
            yield spec


def validation_batches(corpus: Corpus, context: int, n_tokens: int, batch_size: int = 16) -> list[torch.Tensor]:
    """The windows of the validation loss, without their last token: a list of (batch, context) int64."""
    return list(_windows(corpus.validation, context, n_tokens).split(batch_size))


def calibration(corpus: Corpus, context: int, n_tokens: int) -> torch.Tensor:
    """Windows of training tokens for GPTQ, cut likewise: one batch (windows, context) int64."""
    return _windows(corpus.train, context, n_tokens)


def _windows(tokens: np.ndarray, context: int, n_tokens: int) -> torch.Tensor:
    starts = window_starts(len(tokens), context, max(n_tokens, context))
    return torch.from_numpy(tokens[starts[:, None] + np.arange(context)].astype(np.int64))


def measure_run(result: RunResult, step: int, level: str, settings: Measure) -> Path:
    """Measures the checkpoint of `step` and returns the folder of its tables.

    level "light": the primary spec, for both and for weights alone, and `cloze`; "common": the specs of
    `settings.readings`, too, with all that is read at the end; "full": every spec, and all zero-shot tasks.
    A run of quantization-aware training is evaluated as it is, since it is quantized already.
    DamagedFile where it is measured and its sums cannot be read.
    """
    choose("level", level, LEVELS)
    target = result.folder / f"measure-{step:06d}"
    if any((target / f"{done}.done").exists() for done in LEVELS[LEVELS.index(level) :]):
        checksums.read_sums(target)  # torn ones are told here, before anything is made of the tables
        return target
    tables = measure_model(result.load_model(step), result.config, level, settings)
    for table in tables.values():
        table.insert(0, "run", result.config.name)
        table.insert(1, "step", step)
    files = {f"{name}.csv": partial(table.to_csv, index=False) for name, table in tables.items()}
    checksums.write_files(target, {**files, f"{level}.done": Path.touch})
    return target


def measure_model(model: nn.Module, config: RunConfig, level: str, settings: Measure) -> dict[str, pd.DataFrame]:
    """The tables of one model, by name, without the columns `run` and `step`; `config`: of the run that made it."""
    corpus = open_corpus(config.corpus)
    if config.quantization:
        return {"zero_shot": _zero_shot(model, corpus, config.context, settings, TASKS).assign(spec="QAT")}
    context, primary = config.context, QuantSpec.named(settings.primary)
    batches = validation_batches(corpus, context, settings.propagation_tokens)
    tasks = TASKS if level == "full" else ("cloze",)
    accuracy = _zero_shot(model, corpus, context, settings, tasks).assign(spec="none")
    base = _loss(model, corpus, context, settings)
    ptq, accuracies, copies = [{"spec": "none", **base}], [accuracy], {}
    read = [QuantSpec.named(name) for name in settings.readings or () if level != "light"]
    light = [primary, dataclasses.replace(primary, activations="none")]
    for spec in dict.fromkeys([*(fitting(specs(settings), config) if level == "full" else light), *read]):
        inputs = calibration(corpus, context, settings.calibration_tokens) if spec.method == "gptq" else None
        quantized = quantize_model(model, spec, inputs)
        loss = _loss(quantized, corpus, context, settings)
        ptq.append({"spec": spec.name, **asdict(spec), **loss, "increase": loss["val_loss"] - base["val_loss"]})
        if spec in (primary, *read):
            copies[spec] = quantized
        if settings.formats or spec == primary:  # a scale that names its specs wants accuracies of the primary alone
            chosen = tasks if spec == primary and settings.formats else ("cloze",)
            accuracies.append(_zero_shot(quantized, corpus, context, settings, chosen).assign(spec=spec.name))
    found = {spec.name: network_readings(model, copies[spec], spec, batches) for spec in read}
    readings = [(spec, *reading) for spec, values in found.items() for reading in values.items()]
    return {
        "ptq": pd.DataFrame(ptq),
        "zero_shot": pd.concat(accuracies, ignore_index=True),
        "outliers": activation_metrics(model, batches, primary),
        "propagation": _propagation(model, copies[primary], batches),
    } | ({"readings": pd.DataFrame(readings, columns=["spec", "reading", "value"])} if read else {})


def network_readings(
    model: nn.Module, quantized: nn.Module, spec: QuantSpec, batches: list[torch.Tensor]
) -> dict[str, float]:
    """The readings at the network's end (see `output_readings`), and single numbers of its layers and modules.

    expected_error: mean over linear inputs. mean_B: mean over modules. norms_fall: share of the sublayer norms at which
    R falls, the final norm apart (claim C9). The last two by sums over tokens, and, with `_token`, by tokens' ratios.
    """
    found = output_readings(model, quantized, batches).value.to_dict()
    found["expected_error"] = average(activation_metrics(model, batches, spec))["expected_error"]
    for reduction, end in zip(REDUCTIONS, ("_token", ""), strict=True):
        modules = decompose(model, quantized, batches, reduction=reduction)
        norms = modules[(modules.kind == "norm") & (modules.name != "final_norm")]
        found |= {"mean_B" + end: summarise(modules)["mean_B"], "norms_fall" + end: (norms.R < norms.R_in).mean()}
    return found


def _propagation(model: nn.Module, quantized: nn.Module, batches: list[torch.Tensor]) -> pd.DataFrame:
    """Attention as one module, as in the paper, and opened up, so that its linear layers have rows of their own.

    R is the ratio of sums over all tokens, as in all committed tables.
    """
    views = [
        decompose(model, quantized, batches, "module", at, "global").assign(attention=at) for at in ("unit", "open")
    ]
    return pd.concat(views, ignore_index=True)


def _loss(model: nn.Module, corpus: Corpus, context: int, settings: Measure) -> dict:
    found = validation_loss(model, corpus.validation, context, max_tokens=settings.validation_tokens)
    return {"val_loss": found.loss, "val_standard_error": found.standard_error}


def _zero_shot(
    model: nn.Module, corpus: Corpus, context: int, settings: Measure, tasks: tuple[str, ...]
) -> pd.DataFrame:
    return zero_shot(
        model,
        corpus.tokenizer,
        tasks,
        limit=settings.questions,
        heldout=corpus.heldout,
        context=context,  # these models are useless beyond the positions that they were trained on
        progress=False,
    )
