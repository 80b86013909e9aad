"""Rates that the searches of scale confirm at 0.08M did not try, and AdamW and PSGD at those that the rule then names.

Asked on 2026-11-25 and 2026-11-29, after the data; they stand beside the rules. `tests/benchmarks/wider_rates.py` and
`low_rates.py` make the tables.
"""

import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims import rates, readings
from beyond_outliers.claims.compare import label, listed, t_interval
from beyond_outliers.claims.effects import NATS, QUANTITIES, Quantity, at_size, scaled

SCALE, SIZE = "confirm", "0.08M"
FILE = paths.RESULTS / "confirm_low_rates.csv"
TRIED_SINCE = [paths.RESULTS / "confirm_adamw_rates.csv", paths.RESULTS / "confirm_wider_rates.csv"]
WIDER = """## Did the searches end in local optima?

Rates of the hidden matrices beyond both ends of every line that was searched at 0.08M (two and two, or more
where the lowest is named), on the tuning seed, a factor of two apart, tried after the data (2026-11-25 and 2026-11-29).
Which of all is lowest, and which rate the study's rule, the smallest within {tolerance:g} nats of the best, names now.
Seeds alone move a loss by {spread:.3f} (standard deviation, mean over optimizers)."""
SECTION = """## The main seeds at the rates that the searches did not find

Where the rule names another rate now, the main seeds again at that rate (2026-11-29, after the data, on another
processor; no rate or verdict changes by it): {rates}. Differences are paired by seed, with their 95 % t interval;
places count from the lowest of the six, the five others as tuned."""

# what is compared, as in `effects` -> the column of `runs`
OWN = {"loss": "val_loss", "common": "increase_common", "final": "increase_end", "qat": "increase_qat"}
OWN |= {"loss_qat": "val_loss_qat", "R_L": "R_L_end", "mmr": "mmr_end"}
COMPARED = QUANTITIES | {
    "loss_qat": Quantity("loss after training in 4 bits (QAT)", NATS, readings.finished_qat, "val_loss_qat")
}


def runs() -> pd.DataFrame:
    """One row an optimizer and seed: what the runs at the lower rate ended with; val_loss_qat: those under QAT."""
    table = pd.read_csv(FILE, dtype={"size": str})
    full, qat = table[table.scheme == "none"], table[table.scheme != "none"]
    ends = qat[["optimizer", "seed", "val_loss"]].rename(columns={"val_loss": "val_loss_qat"})
    both = full.merge(ends, on=["optimizer", "seed"])
    return both.assign(increase_qat=both.val_loss_qat - both.val_loss)


def compared(study, low: pd.DataFrame) -> pd.DataFrame:
    """Optimizers of `low` (see `runs`) as tuned and at the lower rate, one row an optimizer and quantity.

    optimizer, quantity, as tuned and lower rate (means over the seeds of both), difference (lower rate less as tuned in
    nats, or their ratio, with its interval), n (seeds), place as tuned and with the lower rate among the study's
    optimizers, and the others' means.
    """
    spec, found = readings.primary(study), []
    rows = {name: at_size(study, COMPARED[name], SIZE) for name in OWN}
    for optimizer, mine in low.groupby("optimizer", sort=False):
        for name, own in OWN.items():
            of, every = COMPARED[name], rows[name]
            tuned = every[every.optimizer == optimizer].set_index("seed")[of.value].rename("tuned")
            pairs = mine.set_index("seed")[[own]].join(tuned, how="inner").dropna()
            difference = t_interval((scaled(pairs[own], of.unit) - scaled(pairs.tuned, of.unit)).to_numpy())
            means = every.groupby("optimizer")[of.value].mean()
            others = means.drop(optimizer)
            places = [1 + int((others < mean).sum()) for mean in (means[optimizer], mine[own].mean())]
            beside = ", ".join(f"{label(one)} {mean:.3f}" for one, mean in others.sort_values().items())
            both = pairs.tuned.mean(), pairs[own].mean()
            row = (label(str(optimizer)), of.title.format(spec=spec), *both, of.told(difference), of.unit)
            found.append((*row, len(pairs), *places, beside))
    columns = ["optimizer", "quantity", "as tuned", "lower rate", "difference", "unit", "n"]
    return pd.DataFrame(found, columns=[*columns, "place as tuned", "place lower", "the others"])


def introduction(study, low: pd.DataFrame) -> str:
    """The section's heading and what was done."""
    changed = [
        f"{label(str(name))} at {own.lr.iloc[0]:g} in place of {study.rates[SIZE, name].lr:g}"
        for name, own in low.groupby("optimizer", sort=False)
    ]
    return SECTION.format(rates=listed(changed))


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
