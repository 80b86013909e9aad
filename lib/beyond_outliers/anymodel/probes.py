"""Several checkpoints, or one in several formats: a row each, and what it will take before anything is loaded.

    found = probe_all(["gpt2", "model@step1000", "model@step2000", "/a/folder"], "notes.txt", [QuantSpec(), ...])
    found.table

A name of a hub may carry a revision behind "@": the checkpoints of one training run.
"""

import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from beyond_outliers.anymodel.probe import Probe, configuration, probe, quiet
from beyond_outliers.modules import find_head, is_linear, linear_weight
from beyond_outliers.quantizers.spec import QuantSpec

MATRICES_IN_MEMORY = 3  # the model, its quantized copy, and as much again while a layer is rounded or compared
PASSES = 16  # forward passes of a probe: metrics, decomposition with attention opened, R_L


@dataclass(frozen=True)
class Probes:
    """`table`: one row a model and format. `found`: the probes of the rows that have no `reason`, in their order."""

    table: pd.DataFrame
    found: tuple[Probe, ...]


def located(source: str | Path) -> str | Path:
    """A folder or hub name as it is; of "name@revision" the folder of that revision, fetched where it is not there.

    ValueError where there is no such revision.
    """
    name, _, revision = str(source).rpartition("@")
    if not name or Path(source).exists():
        return source
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision)
    except (OSError, ValueError) as error:  # no network, no such repository, no such revision
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load {str(source)!r}: no revision {revision!r} of {name!r} ({reason})") from error


def step_of(name: str) -> int | None:
    """The number that a checkpoint's name ends with: 1000 of "run@step1000" or "checkpoint-1000"; None without one."""
    found = re.search(r"(?:step|checkpoint|iter)[-_]?(\d+)|[@-](\d+)$", name)
    return int(next(filter(None, found.groups()))) if found else None


def short_names(models: Sequence[nn.Module | str | Path]) -> list[str]:
    """The last parts of the models' paths, as many as tell them apart; of a loaded module its class."""
    names = [type(model).__name__ if isinstance(model, nn.Module) else str(model).rstrip("/") for model in models]
    parts = [name.split("/") for name in names]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if len(set(short)) == len(set(names)):
            break
    return short


def probe_all(
    models: Sequence[nn.Module | str | Path],
    text: str | Path,
    specs: Sequence[QuantSpec] = (QuantSpec(),),
    *,
    progress: bool = True,
    **options: Any,
) -> Probes:
    """`probe` of every model in every format. options: as `probe` takes them.

    Columns: model, step (see `step_of`), spec, share (of the matrix-multiply weights' entries that are rounded),
    what `Probe.summary` has (R_L, R_L_low, R_L_high, mmr, kurtosis, ...), seconds, reason. A model that cannot be
    probed has a reason instead of numbers, and a warning says so; where none can, that is a ValueError.
    With `progress`, a bar, and what it will take (see `estimate`) printed first.
    """
    if not models or not specs:
        raise ValueError("there is no model, or no format, to probe; valid: one or more of each")
    if progress:
        sizes = {name: options[name] for name in ("context", "sequences") if name in options}
        print(estimate(models, specs, **sizes), flush=True)
    rows: list[dict[str, Any]] = []
    found: list[Probe] = []
    with tqdm(total=len(models) * len(specs), desc="probe", disable=None if progress else True) as bar:
        for model, name in zip(models, short_names(models), strict=True):
            for spec in specs:
                bar.set_postfix_str(f"{name} {spec.name}")
                row: dict[str, Any] = {"model": name, "step": step_of(name), "spec": spec.name}
                clock = time.perf_counter()
                try:
                    one = probe(model if isinstance(model, nn.Module) else located(model), text, spec, **options)
                except ValueError as error:
                    row["reason"] = str(error)
                else:
                    one = replace(one, name=name)
                    row |= {"share": one.quantization.share, **one.summary().to_dict(), "reason": ""}
                    found.append(one)
                rows.append({**row, "seconds": time.perf_counter() - clock})
                bar.update()
    table = pd.DataFrame(rows)
    left_out = [f"{row.model} {row.spec}: {row.reason}" for row in table.itertuples() if row.reason]
    if len(left_out) == len(table):
        raise ValueError("no model could be probed: " + "; ".join(left_out))
    if left_out:
        warnings.warn(f"not probed: {'; '.join(left_out)}", stacklevel=2)
    return Probes(table, tuple(found))


# ------------------------------------------------------------------------------------------------------- what it takes


@dataclass(frozen=True)
class Estimate:
    """Time and memory of `probe_all`: `gigabytes` of the largest model, `minutes` of all on this machine."""

    gigabytes: float
    minutes: float
    unknown: tuple[str, ...]  # models of which nothing can be said before they are loaded

    def __str__(self) -> str:
        text = f"about {self.minutes:.1f} minutes, and {self.gigabytes:.2g} GB of memory for the largest model"
        return f"{text}; not counted, since nothing is known yet: {', '.join(self.unknown)}" if self.unknown else text


def estimate(
    models: Sequence[nn.Module | str | Path], specs: Sequence[QuantSpec], context: int = 256, sequences: int = 32
) -> Estimate:
    """What `probe_all` will take: a guess, good to a factor of about three, from the models' shapes alone.

    Shapes come from their configurations; no weight is loaded. Time counts the products of the forward passes, and of
    GPTQ the factorisations, at the speed of a product that is timed here.
    """
    speed = _speed()
    most, operations, unknown = 0.0, 0.0, []
    for model in models:
        try:
            shapes, parameters = _shapes(model)
        except (OSError, ValueError) as error:
            unknown.append(f"{str(model)[-60:]} ({str(error).strip().splitlines()[0][:80]})")
            continue
        products = 2 * context * sequences * sum(rows * width for rows, width in shapes)
        most = max(most, 4 * MATRICES_IN_MEMORY * parameters)
        for spec in specs:
            operations += PASSES * products
            if spec.method == "gptq":  # a pass for every layer at worst; factor, invert and update in float64
                operations += products * len(shapes) / 2 + 2 * sum(2 * w**3 + 2 * r * w**2 for r, w in shapes)
    return Estimate(most / 1e9, operations / speed / 60, tuple(unknown))


def _shapes(model: nn.Module | str | Path) -> tuple[list[tuple[int, int]], int]:
    """(out, in) of every linear layer but the head, and the number of parameters."""
    shell = model if isinstance(model, nn.Module) else _shell(located(model))
    head = find_head(shell)
    linears = [module for name, module in shell.named_modules() if is_linear(module) and name != head]
    shapes = [(int(rows), int(width)) for rows, width in (linear_weight(module).shape for module in linears)]
    return shapes, sum(p.numel() for p in shell.parameters())


def _shell(source: str | Path) -> nn.Module:
    """The model of a configuration, without weights."""
    import transformers as tf

    config = configuration(source)
    names = " ".join(getattr(config, "architectures", None) or ())
    kind = tf.AutoModelForCausalLM if "CausalLM" in names or "LMHeadModel" in names else tf.AutoModel
    with torch.device("meta"), quiet():
        shell: nn.Module = kind.from_config(config)
    return shell


def _speed() -> float:
    """Operations a second of a float32 product here, at a size that fits the caches."""
    a = torch.rand(384, 384, dtype=torch.float32)
    a @ a
    clock, n = time.perf_counter(), 8
    for _ in range(n):
        a @ a
    return n * 2 * 384**3 / (time.perf_counter() - clock)
