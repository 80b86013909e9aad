"""An optimizer from outside beside the six: its runs and tables, made where the scale's own stay as they are.

    beyond-outliers compare --scale pocket --optimizer pytorch_optimizer:Lion     (make compare)

It is trained and measured as the scale's own are: sizes, seeds, formats, rule of the learning rate. Where no rates are
given, they are looked for from the class's own default, a factor of 3 apart, until the best lies between two others.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pandas as pd

from beyond_outliers.config.outside import Outside, optimizer_file, parted, read_outside
from beyond_outliers.config.protocol import Planned
from beyond_outliers.config.rates import line_search
from beyond_outliers.config.registry import REGISTRY
from beyond_outliers.optimizers.outside import load_optimizer
from beyond_outliers.study.study import Study
from beyond_outliers.study.tables import MissingResults
from beyond_outliers.study.workflow import build

FACTOR = 3.0
START = 1e-3  # for a class whose lr has no default
AUXILIARY_START = 0.01  # of the search at scales that tune, as the study's own have there


class Beside(Study):
    """The tables of a scale with those of an optimizer from outside behind them: for readings, which train nothing."""

    def __init__(self, scale: str):
        """scale: as in "pocket+lion". ValueError for a scale alone."""
        base, name = parted(scale)
        if not name:
            raise ValueError(f"scale {scale!r} names no optimizer from outside; valid: {scale}+name, made by compare")
        super().__init__(base)
        self.outside = Study(scale)
        (self.yours,) = self.outside.protocol.optimizers

    def table(self, name: str) -> pd.DataFrame:
        """As `Study.table`; a table that the outside optimizer has no row of yet is the scale's alone."""
        try:
            return pd.concat([super().table(name), self.outside.table(name)], ignore_index=True)
        except MissingResults:
            return super().table(name)


def source_of(optimizer: str) -> str:
    """ "torch.optim.SGD" and "torch.optim:SGD" alike -> "torch.optim:SGD"; ValueError for no such name."""
    if optimizer in REGISTRY:
        raise ValueError(f"{optimizer!r} is one of the study's own: its runs are in the tables of the scale")
    return optimizer if ":" in optimizer else ":".join(optimizer.rsplit(".", 1))


def define(
    study: Study,
    optimizer: str,
    name: str | None = None,
    label: str | None = None,
    hyper: Mapping[str, Any] = MappingProxyType({}),
    rates: tuple[float, ...] = (),
) -> tuple[str, Outside]:
    """(scale+name, definition) of an optimizer from outside: the one that is there already, or a new one.

    Without `rates` those of an existing definition are taken, or none yet but the class's default. ValueError where
    another optimizer, or the same with other hyperparameters, stands under that name.
    """
    source = source_of(optimizer)
    label = label or source.partition(":")[2]
    beside = f"{study.scale}+{name or re.sub('[^a-z0-9._-]', '', label.lower())}"
    default = load_optimizer(source)[1].get("lr")
    start = default.default if default and isinstance(default.default, (int, float)) else START
    known = read_outside(beside) if optimizer_file(beside).exists() else None
    if known and (known.source, known.hyper) != (source, hyper):
        raise ValueError(
            f"{optimizer_file(beside)} is {known.source} with {known.hyper}, not {source} with {hyper}; valid: another "
            "name for this one, or that folder removed"
        )
    return beside, Outside(
        source=source,
        label=label,
        learning_rates=rates or (known.learning_rates if known else (float(start),)),
        auxiliary=AUXILIARY_START if study.protocol.tuned else None,
        hyper=dict(hyper),
    )


def search_rates(study: Study, one: Outside) -> tuple[float, ...]:
    """Rates around the best of a scale with grids, ascending: at its smallest swept size, trained one after the other.

    The runs are those of a sweep. ValueError where the best is not found within a dozen,
    or where the rate has no effect.
    """
    first = study.protocol.sweep_runs(study.sizes_of("sweep")[0])[0].config

    def loss(lr: float) -> float:
        return study.run(Planned("sweep", first.replace(lr=lr))).row["val_loss"]

    return tuple(line_search(loss, one.learning_rates[0], FACTOR, 0.0)["tried"])


def begin(base: Study, beside: str, one: Outside) -> Study:
    """Writes the definition, and returns its study; MissingResults for a scale without tables to compare with."""
    base.table("runs")
    one.write(optimizer_file(beside))
    study = Study(beside)
    study.check()
    return study


def compare(study: Study, one: Outside) -> Study:
    """Trains and measures wherever the scale's own are, as far as it has not been, what `begin` returned as `study`."""
    if not study.protocol.tuned and len(one.learning_rates) == 1:
        study.prepare_corpus()
        grid = search_rates(study, one)
        replace(one, learning_rates=grid).write(optimizer_file(study.scale))
        study = Study(study.scale)
    return build(study)
