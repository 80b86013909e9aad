"""Several checkpoints, or one in several formats: a row each.

    found = probe_all(["gpt2", "model@step1000", "model@step2000", "/a/folder"], "notes.txt", [QuantSpec(), ...])
    found.table

A name of a hub may carry a revision behind "@": the checkpoints of one training run.
"""

import itertools
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from beyond_outliers import paths
from beyond_outliers.anymodel.probe import Probe, probe
from beyond_outliers.quantizers.spec import QuantSpec


@dataclass(frozen=True)
class Probes:
    """`table`: one row a model and format. `found`: the probes of the rows that have no `reason`, in their order."""

    table: pd.DataFrame
    found: tuple[Probe, ...]


EXAMPLES = (("SmolLM2", "A4"), ("SmolLM2", "A8"), ("MiniLM", "W4A4"))
FOLDER = paths.ROOT / "data" / "probes"


def examples(measure: bool = False) -> Probes:
    """The probes of EXAMPLES, as FOLDER has them; with `measure` measured here and written there."""
    for name, spec in EXAMPLES if measure else ():
        probe(name, None, QuantSpec.named(spec)).save(FOLDER / f"{name}-{spec}")
    found = [Probe.read(FOLDER / f"{name}-{spec}") for name, spec in EXAMPLES]
    return Probes(pd.DataFrame([_row(probe.name, probe) for probe in found]), tuple(found))


def _row(name: str, one: Probe) -> dict[str, Any]:
    row = {"model": name, "step": step_of(name), "spec": one.spec.name}
    return row | {"share": one.quantization.share, **one.summary().to_dict(), "reason": ""}


def step_of(name: str) -> int | None:
    """The number that a checkpoint's name ends with: 1000 of "run@step1000" or "checkpoint-1000"; None without one."""
    found = re.search(r"(?:step|checkpoint|iter)[-_]?(\d+)|[@-](\d+)$", name)
    return int(next(filter(None, found.groups()))) if found else None


def short_names(models: Sequence[nn.Module | str | Path]) -> list[str]:
    """The last parts of the models' paths, as many as tell them apart; of a loaded module its class."""
    names = [type(model).__name__ if isinstance(model, nn.Module) else str(model).rstrip("/") for model in models]
    by_depth = (["/".join(name.split("/")[-depth:]) for name in names] for depth in itertools.count(1))
    return next(short for short in by_depth if len(set(short)) == len(set(names)))


def probe_all(
    models: Sequence[nn.Module | str | Path],
    text: str | Path | None = None,
    specs: Sequence[QuantSpec] = (QuantSpec(),),
    *,
    progress: bool = True,
    **options: Any,
) -> Probes:
    """`probe` of every model in every format. options: as `probe` takes them.

    Columns: model, step (see `step_of`), spec, share (of the matrix-multiply weights' entries that are rounded),
    what `Probe.summary` has (R_L, R_L_low, R_L_high, mmr, kurtosis, ...), seconds, reason. A model that cannot be
    probed has a reason instead of numbers, and a warning says so; where none can, that is a ValueError.
    With `progress`, a bar.
    """
    if not models or not specs:
        raise ValueError("there is no model, or no format, to probe; valid: one or more of each")
    rows: list[dict[str, Any]] = []
    found: list[Probe] = []
    with tqdm(total=len(models) * len(specs), desc="probe", disable=None if progress else True) as bar:
        for model, name in zip(models, short_names(models), strict=True):
            for spec in specs:
                bar.set_postfix_str(f"{name} {spec.name}")
                row: dict[str, Any] = {"model": name, "step": step_of(name), "spec": spec.name}
                clock = time.perf_counter()
                try:
                    one = probe(model, text, spec, **options)
                except ValueError as error:
                    row["reason"] = str(error)
                else:
                    found.append(replace(one, name=name))
                    row = _row(name, found[-1])
                rows.append({**row, "seconds": time.perf_counter() - clock})
                bar.update()
    table = pd.DataFrame(rows)
    left_out = [f"{row.model} {row.spec}: {row.reason}" for row in table.itertuples() if row.reason]
    if len(left_out) == len(table):
        raise ValueError("no model could be probed: " + "; ".join(left_out))
    if left_out:
        warnings.warn(f"not probed: {'; '.join(left_out)}", stacklevel=2)
    return Probes(table, tuple(found))
