"""AdamW at the rate that its search did not find: what the local optimum costs the contrasts of scale confirm at 0.08M.

Asked on 2026-11-29, after the data; it stands beside the rules. `python tests/benchmarks/adamw_low_rate.py` makes the
table.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims import readings
from beyond_outliers.claims.comparison import label, written
from beyond_outliers.claims.contrasts import t_interval
from beyond_outliers.claims.effects import NATS, TIMES, titles
from beyond_outliers.claims.eligibility import eligible

SCALE, SIZE, OPTIMIZER = "confirm", "0.08M", "adamw"
FILE = paths.RESULTS / "confirm_adamw_low.csv"
SECTION = """## AdamW at the rate that its search did not find

At 0.08M the search for AdamW's rate ended in a local optimum. Of all rates tried since on the tuning seed the study's
rule names {rate:g} in place of {tuned:g}. The main seeds again at that rate (2026-11-29, after the data, on another
processor; no rate or verdict changes by it): differences are paired by seed, with their 95 % t interval; places count
from the lowest of the six."""
QAT = "loss after training in 4 bits (QAT)"
# what is compared -> column of the table, rows of the study, their column
COLUMNS: dict[str, tuple[str, Callable, str]] = {
    "loss": ("val_loss", readings.finished, "val_loss"),
    "common": ("increase_common", readings.damage, "increase"),
    "final": ("increase_end", lambda study: readings.damage(study, checkpoint="final"), "increase"),
    "qat": ("increase_qat", readings.finished_qat, "increase"),
    QAT: ("val_loss_qat", readings.finished_qat, "val_loss_qat"),
    "R_L": ("R_L_end", readings.output_error, "R_L"),
    "mmr": ("mmr_end", readings.mmr, "mmr"),
}


def runs() -> pd.DataFrame:
    """One row a seed: what the runs at the lower rate ended with, in full precision and (val_loss_qat) under QAT."""
    table = pd.read_csv(FILE, dtype={"size": str})
    full, qat = table[table.scheme == "none"], table[table.scheme != "none"]
    both = full.merge(qat[["seed", "val_loss"]].rename(columns={"val_loss": "val_loss_qat"}), on="seed")
    return both.assign(increase_qat=both.val_loss_qat - both.val_loss)


def compared(study, low: pd.DataFrame) -> pd.DataFrame:
    """AdamW as tuned beside AdamW of `low` (see `runs`), one row a quantity.

    quantity, as tuned and lower rate (means over the seeds of both), difference (lower rate less as tuned in nats, or
    their ratio, with its interval), n (seeds), place as tuned and with the lower rate among the study's optimizers, and
    the others' means.
    """
    named, found = titles(study), []
    for name, (own, read, value) in COLUMNS.items():
        title, unit = named.get(name, (name, NATS))
        rows = eligible(study, read(study))
        rows = rows[rows["size"] == SIZE]
        tuned = rows[rows.optimizer == OPTIMIZER].set_index("seed")[value].rename("tuned")
        pairs = low.set_index("seed")[[own]].join(tuned, how="inner").dropna()
        change = np.log(pairs[own] / pairs.tuned) if unit == TIMES else pairs[own] - pairs.tuned
        difference = t_interval(change.to_numpy())
        told = written(tuple(np.exp(difference)), 2) if unit == TIMES else written(difference)
        means = rows.groupby("optimizer")[value].mean()
        others = means.drop(OPTIMIZER)
        places = [1 + int((others < mean).sum()) for mean in (means[OPTIMIZER], low[own].mean())]
        beside = ", ".join(f"{label(one)} {mean:.3f}" for one, mean in others.sort_values().items())
        found.append((title, pairs.tuned.mean(), pairs[own].mean(), told, unit, len(pairs), *places, beside))
    columns = ["quantity", "as tuned", "lower rate", "difference", "unit", "n", "place as tuned", "place lower"]
    columns.append("the others")
    return pd.DataFrame(found, columns=columns)


def introduction(study, low: pd.DataFrame) -> str:
    """The section's heading and what was done."""
    return SECTION.format(rate=low.lr.iloc[0], tuned=study.rates[SIZE, OPTIMIZER].lr)
