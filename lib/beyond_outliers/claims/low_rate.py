"""Rates that the searches of scale confirm at 0.08M did not try, and AdamW at the one that its search did not find.

Asked on 2026-11-25 and 2026-11-29, after the data; they stand beside the rules. `tests/benchmarks/wider_rates.py` and
`adamw_low_rate.py` make the tables.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims import rates, readings
from beyond_outliers.claims.comparison import label, written
from beyond_outliers.claims.contrasts import t_interval
from beyond_outliers.claims.effects import NATS, TIMES, titles
from beyond_outliers.claims.eligibility import eligible

SCALE, SIZE, OPTIMIZER = "confirm", "0.08M", "adamw"
FILE = paths.RESULTS / "confirm_adamw_low.csv"
TRIED_SINCE = [paths.RESULTS / "confirm_adamw_rates.csv", paths.RESULTS / "confirm_wider_rates.csv"]
WIDER = """## Did the searches end in local optima?

Rates of the hidden matrices beyond both ends of every line that was searched at 0.08M (two and two, or more
where the lowest is named), on the tuning seed, a factor of two apart, tried after the data (2026-11-25 and 2026-11-29).
Which of all is lowest, and which rate the study's rule, the smallest within {tolerance:g} nats of the best, names now.
Seeds alone move a loss by {spread:.3f} (standard deviation, mean over optimizers)."""
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


def tried(study) -> pd.DataFrame:
    """Finished runs on the tuning seed at the chosen auxiliary rate, of the search and since: a row a run."""
    line = rates.line(study).query("size == @SIZE")
    every = pd.concat([line, *(pd.read_csv(file, dtype={"size": str}) for file in TRIED_SINCE)])
    return every[every.status == "finished"].reset_index(drop=True)


def named(study) -> pd.Series:
    """Optimizer -> the rate that the study's rule names among all that were `tried`."""
    within = tried(study)
    best = within.groupby("optimizer").val_loss.transform("min")
    within = within[within.val_loss <= best + study.protocol.tuning.tolerance]
    return within.groupby("optimizer", sort=False).lr.min()


def wider(study) -> pd.DataFrame:
    """One row an optimizer: the rate that its search chose, and the lowest of all that were `tried`.

    rates, how many; chosen and its loss; lowest at, and that loss; lower by (nats); the rule names (see `named`).
    """
    found, rule = [], named(study)
    for name, own in tried(study).groupby("optimizer", sort=False):
        losses = own.groupby("lr").val_loss.mean()
        chosen, best = study.rates[SIZE, name].lr, losses.idxmin()
        lower = losses[chosen] - losses[best]
        found.append((label(str(name)), len(losses), chosen, losses[chosen], best, losses[best], lower, rule[name]))
    columns = ["optimizer", "rates", "chosen", "its loss", "lowest at", "that loss", "lower by", "the rule names"]
    return pd.DataFrame(found, columns=columns)


def wider_introduction(study) -> str:
    """The section's heading, what was tried, and the spread over seeds beside which its losses stand."""
    spread = readings.spread(study).query("size == @SIZE").between_seeds.mean()
    return WIDER.format(tolerance=study.protocol.tuning.tolerance, spread=spread)
