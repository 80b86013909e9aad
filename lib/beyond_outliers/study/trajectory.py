"""What happens to a run along its training: loss, damage, R_L and outliers at every checkpoint that it kept.

One row a (checkpoint, format). Weights averaged over the last checkpoints are rows too, so that two accounts of the
damage can be told apart: the decay of the learning rate makes it and averaging undoes it (arXiv 2510.06213), or it
comes with convergence (arXiv 2604.15167). The Common Loss is read off this table, whatever runs it is taken over.
"""

from pathlib import Path

import pandas as pd
import torch
from torch import nn

from beyond_outliers import checksums
from beyond_outliers.config.scale import Measure
from beyond_outliers.corpus.tokens import open_corpus
from beyond_outliers.evaluate.loss import validation_loss
from beyond_outliers.metrics import activation_metrics, average, without_down
from beyond_outliers.propagation.output_error import output_readings
from beyond_outliers.quantizers.convert import quantize_model
from beyond_outliers.quantizers.spec import QuantSpec
from beyond_outliers.study.measure import validation_batches
from beyond_outliers.train.folder import RunResult, model_of

AVERAGED = 4  # checkpoints: a fifth of a run of twenty


def averaged_model(result: RunResult, steps: list[int]) -> nn.Module:
    """The model whose every weight is the mean (in float64) of the weights of several checkpoints; evaluation mode."""
    states = [result.weights(step) for step in steps]
    mean = {name: torch.stack([s[name].double() for s in states]).mean(0).to(states[0][name]) for name in states[0]}
    return model_of(result.config, mean, f"the mean of the checkpoints {steps}")


def trajectory_table(
    result: RunResult, spec: QuantSpec, validation_tokens: int, propagation_tokens: int
) -> pd.DataFrame:
    """Two rows a checkpoint of a full-precision run: unquantized, as format "none", and rounded as `spec` says.

    Columns: run, step, averaged (checkpoints whose mean the weights are; 1: the checkpoint itself, AVERAGED at the end
    of the constant learning rate and at the end of the run), spec, val_loss, increase (nats over the same weights
    unquantized), R_L, R_L_centred, R_final_norm (see `output_readings`); for "none": mmr (mean over linear inputs
    without `down`, whose median is near zero) and kurtosis (mean over all linear inputs).
    """
    config = result.config
    corpus = open_corpus(config.corpus)
    batches = validation_batches(corpus, config.context, propagation_tokens)
    steps = [int(step) for step in result.evaluations.step]
    constant = [step for step in steps if step <= (1 - config.decay) * result.row["steps"]]
    points = [[step] for step in steps] + [some[-AVERAGED:] for some in (constant, steps) if len(some) >= AVERAGED]
    rows = []
    for over in points:
        model = averaged_model(result, over)

        def loss(one: nn.Module) -> float:
            return validation_loss(one, corpus.validation, config.context, max_tokens=validation_tokens).loss

        inputs, base, quantized = activation_metrics(model, batches), loss(model), quantize_model(model, spec)
        point = {"run": config.name, "step": over[-1], "averaged": len(over)}
        rows.append({**point, "spec": "none", "val_loss": base, "increase": 0.0})
        rows[-1] |= {"mmr": average(without_down(inputs))["mmr"], "kurtosis": average(inputs)["kurtosis"]}
        errors = output_readings(model, quantized, batches).value[["R_L", "R_L_centred", "R_final_norm"]]
        found = loss(quantized)
        rows.append({**point, "spec": spec.name, "val_loss": found, "increase": found - base, **errors})
    return pd.DataFrame(rows)


def measure_trajectory(result: RunResult, settings: Measure) -> Path:
    """Writes the table of a run in the primary spec, if it is not there.

    At half the tokens of a final measurement, since there are twenty times as many models.
    """
    file = result.folder / "trajectory.csv"
    if not file.exists():
        tokens = max(settings.validation_tokens // 2, result.config.context), settings.propagation_tokens // 2
        checksums.write_text(
            file, trajectory_table(result, QuantSpec.named(settings.primary), *tokens).to_csv(index=False)
        )
    return file
