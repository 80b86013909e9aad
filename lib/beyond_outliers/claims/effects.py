"""How large the differences are: every optimizer against AdamW at equal size and seed.

A pair is a run and AdamW's of the same size and seed, which saw the same batches; effects are differences within pairs,
averaged over seeds, then over sizes (intervals as in `comparison`: sizes are strata, pairs replicates).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from beyond_outliers.claims import readings
from beyond_outliers.claims.estimates import (
    PAPER_OPTIMIZERS,
    REFERENCE,
    Comparison,
    Estimate,
    NothingToCompare,
    label,
    listed,
    of_the_paper,
)
from beyond_outliers.claims.readings import CELL
from beyond_outliers.study.tables import MissingResults

NATS, TIMES = "nats", "times"  # how an effect is measured: a difference, or a ratio
NOT_YET = "not measured yet"


@dataclass(frozen=True)
class Quantity:
    """What optimizers are compared by: rows with size, optimizer, seed and `value`, one a run, read off a study."""

    title: str  # {spec}: the format in which the scale is judged
    unit: str
    rows: Callable
    value: str

    def told(self, difference: Estimate) -> str:
        """A difference of scaled values in words: "-0.076 [-0.094, -0.057]" in nats, or "0.81 [0.76, 0.87]" times."""
        return difference.text() if self.unit == NATS else difference.map(np.exp).text(2)


def scaled(values: pd.Series, unit: str) -> pd.Series:
    """The values as differences are taken of them: their logarithms where ratios are told (TIMES)."""
    return np.log(values) if unit == TIMES else values


def at_size(study, quantity: Quantity, size: str) -> pd.DataFrame:
    """The eligible rows of a quantity at one size."""
    rows = of_the_paper(quantity.rows(study))
    return rows[rows["size"] == size]


QUANTITIES = {
    "loss": Quantity("loss in full precision", NATS, readings.finished, "val_loss"),
    "common": Quantity("{spec} increase at the Common Loss", NATS, readings.damage, "increase"),
    "final": Quantity(
        "{spec} increase at the end", NATS, lambda study: readings.damage(study, checkpoint="final"), "increase"
    ),
    "qat": Quantity("increase by training in 4 bits (QAT)", NATS, readings.finished_qat, "increase"),
    "R_L": Quantity("R_L at the end", TIMES, readings.output_error, "R_L"),
    "mmr": Quantity("MMR at the end", TIMES, readings.mmr, "mmr"),
}


def titles(study) -> dict[str, tuple[str, str]]:
    """Quantity -> what a reader calls it at this scale, and its unit."""
    return {name: (of.title.format(spec=readings.primary(study)), of.unit) for name, of in QUANTITIES.items()}


def against(rows: pd.DataFrame, value: str, unit: str = NATS, reference: str = REFERENCE) -> pd.DataFrame:
    """The pairs, one row a run of another optimizer than the reference: size, optimizer, seed and effect.

    effect: the value less that of the reference at the same size and seed (TIMES: the logarithm of their ratio). Runs
    without a partner or a value are left out.
    """
    values = rows.assign(effect=scaled(rows[value], unit))[[*CELL, "effect"]]
    own = values[values.optimizer == reference].drop(columns="optimizer").rename(columns={"effect": "partner"})
    pairs = values[values.optimizer != reference].merge(own, on=["size", "seed"])
    return pairs.assign(effect=pairs.effect - pairs.partner).drop(columns="partner").dropna(subset="effect")


def effects(study) -> pd.DataFrame:
    """One row a quantity and optimizer that has pairs: quantity, optimizer, effect, low, high, n (pairs), over (sizes).

    low and high are NaN where an optimizer has fewer than three pairs at a size. A quantity that has not been measured
    of any optimizer has no row.
    """
    found = []
    for name, quantity in QUANTITIES.items():
        try:
            rows = of_the_paper(quantity.rows(study))
        except MissingResults:
            continue
        pairs = against(rows, quantity.value, quantity.unit)
        optimizers = [one for one in PAPER_OPTIMIZERS if one in set(pairs.optimizer)]
        try:
            compared = Comparison(pairs, "effect", optimizers)
        except NothingToCompare:
            continue
        for one in optimizers:
            mean = compared.mean(one)
            ends = mean.map(np.exp) if quantity.unit == TIMES else mean
            found.append((name, one, *ends.interval, mean.n, listed(compared.sizes)))
    return pd.DataFrame(found, columns=["quantity", "optimizer", "effect", "low", "high", "n", "over"])


def effect_table(study) -> pd.DataFrame:
    """`effects` as a reader takes them in: a row an optimizer of its scale, a column a quantity, or NOT_YET."""
    table, named = effects(study), titles(study)
    others = [one for one in PAPER_OPTIMIZERS if one != REFERENCE and one in study.protocol.optimizers]
    columns = {}
    for name, (title, unit) in named.items():
        of = table[table.quantity == name].set_index("optimizer")
        texts = {
            one: f"{Estimate(row.effect, row.low, row.high).text(3 if unit == NATS else 2)}, n {row.n}"
            for one, row in of.iterrows()
        }
        head = f"{title} ({unit if unit == NATS else 'times AdamW'})"
        columns[head] = [texts.get(one, NOT_YET) for one in others]
    return pd.DataFrame({"optimizer": [label(one) for one in others]} | columns)
