"""The rules of the confirmatory study: which runs count, and the verdict on each of the paper's fourteen claims.

`data/claims-confirm.toml` states the rules and their numbers; this is their code: pure functions on tidy tables, one
row a run (or module), of which `evaluate` takes a dict:

    runs      size, optimizer, seed, loss, qat_loss (NaN where there is none yet)             C1, C12, C13
    sweep     size, optimizer, seed, lr, mmr: tuning runs of one line of rates                C2
    final     size, optimizer, seed, mmr: at the end of training                              C3
    common    size, optimizer, seed, increase, mmr, kurtosis, R_L, gain: at the Common Loss   C4 to C7, C11
    modules   size, optimizer, seed, name, kind, R_in, R, A, B, C: there, attention one unit  C8, C9
    linear    size, optimizer, seed, name, spectral_ratio: there, attention open, no head     C10
    scaling   size, optimizer, seed, N, bits, loss                                            C14
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime

import pandas as pd

from beyond_outliers.claims.confirm_kinds import (
    WHOLE,
    Finding,
    extreme,
    near_one,
    share,
    slopes,
)
from beyond_outliers.claims.confirm_prediction import prediction
from beyond_outliers.claims.confirm_qat import efficiency, reversal
from beyond_outliers.claims.contrasts import UNDECIDED

PAPER_OPTIMIZERS = ("adamw", "muon", "psgd", "scion", "shampoo", "soap")
PAPER_THREE = ("adamw", "muon", "shampoo")  # those that the paper trains at every size
SETS = {"six": PAPER_OPTIMIZERS, "three": PAPER_THREE}

SCALE, FIRST_SEED = "confirm", 200
SEEDS = {"0.08M": range(200, 210), "0.16M": range(200, 210), "0.26M": range(200, 206)}  # the strata and replicates

READINGS = {
    "runs": {"loss", "qat_loss"},
    "sweep": {"lr", "mmr"},
    "final": {"mmr"},
    "common": {"increase", "mmr", "kurtosis", "R_L", "gain"},
    "modules": {"name", "kind", "R_in", "R", "A", "B", "C"},
    "linear": {"name", "spectral_ratio"},
    "scaling": {"N", "bits", "loss"},
}
KINDS: dict[str, Callable[..., list[Finding]]] = {
    "extreme": extreme,
    "slopes": slopes,
    "prediction": prediction,
    "share": share,
    "near one": near_one,
    "reversal": reversal,
    "efficiency": efficiency,
}


def eligible(runs: pd.DataFrame, committed_at: datetime) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Main runs that the verdicts may count, and those they may not, with a column `excluded` that says why.

    Counted are rows of the scale `confirm` with seeds from 200 whose `finished_at` (ISO 8601 with a time zone) is
    later than `committed_at`, the time of the commit that brought the rules. ValueError for a time without a zone.
    """
    if committed_at.tzinfo is None:
        raise ValueError(f"the time of the rules' commit needs a time zone: {committed_at}")
    reasons = []
    for row in runs.itertuples():
        ended = datetime.fromisoformat(row.finished_at) if isinstance(row.finished_at, str) else None
        if ended is not None and ended.tzinfo is None:
            raise ValueError(f"finished_at needs a time zone: {row.finished_at}")
        why = []
        if row.scale != SCALE:
            why.append(f"scale {row.scale}, not {SCALE}")
        if row.seed < FIRST_SEED:
            why.append(f"seed {row.seed}, below {FIRST_SEED}")
        if ended is None:
            why.append("no time of its end")
        elif ended <= committed_at:
            why.append(f"ended {row.finished_at}, not after the rules ({committed_at.isoformat()})")
        reasons.append("; ".join(why))
    reasons = pd.Series(reasons, index=runs.index, dtype=object)
    return runs[reasons == ""], runs.assign(excluded=reasons)[reasons != ""]


def evaluate(readings: dict[str, pd.DataFrame], rules: dict, optimizers: Sequence[str]) -> pd.DataFrame:
    """The verdicts on one set of optimizers: one row a claim (`part` "whole") and one for each part of it.

    Columns: id, part, verdict, estimate, low, high (95 %), low_99, high_99, unit, n (the fewest runs of an optimizer
    at each size), rival (the nearest, or the optimizer that decides), complete (every planned run is there), comment.
    Other optimizers, sizes and seeds than the planned ones are left out, so a seventh optimizer changes nothing.
    `rules` is the content of claims-confirm.toml. A reading that is not there yet leaves its claims undecided.
    """
    unknown = sorted(set(readings) - set(READINGS))
    if unknown:
        raise ValueError(f"unknown readings {unknown}; valid: {', '.join(READINGS)}")
    strangers = sorted(set(optimizers) - set(PAPER_OPTIMIZERS))
    if strangers:
        raise ValueError(f"unknown optimizers {strangers}; valid: {', '.join(PAPER_OPTIMIZERS)}")
    rows = []
    for claim, rule in rules.items():
        if rule["kind"] not in KINDS:
            raise ValueError(f"{claim}: unknown kind {rule['kind']!r}; valid: {', '.join(KINDS)}")
        table = of_design(readings.get(rule["reading"]), rule["reading"])
        complete = table is not None and is_complete(table, rule, optimizers)
        if table is None or table.empty:
            findings = [Finding(UNDECIDED, f"Undecided: nothing has been measured yet ({rule['reading']}).")]
        else:
            findings = KINDS[rule["kind"]](table, rule, tuple(optimizers), tuple(SEEDS))
        if len(findings) == 1:  # a claim of one part is that part
            findings = [Finding(**{**asdict(findings[0]), "part": WHOLE})]
        rows += [{"id": claim, "unit": rule["unit"], "complete": complete, **asdict(found)} for found in findings]
    order = ["id", "part", "verdict", "estimate", "low", "high", "low_99", "high_99", "unit", "n", "rival", "complete"]
    return pd.DataFrame(rows)[[*order, "comment"]]


def evaluate_sets(readings: dict[str, pd.DataFrame], rules: dict) -> pd.DataFrame:
    """`evaluate` on the six and on the paper's own three, with a first column `optimizers`: six or three."""
    parts = [evaluate(readings, rules, names).assign(optimizers=which) for which, names in SETS.items()]
    table = pd.concat(parts, ignore_index=True)
    return table[["optimizers", *table.columns.drop("optimizers")]]


def of_design(table: pd.DataFrame | None, reading: str) -> pd.DataFrame | None:
    """The rows of the planned sizes and seeds, QAT's drop added to `runs`. ValueError for a missing column."""
    if table is None:
        return None
    missing = sorted(({"size", "optimizer", "seed"} | READINGS[reading]) - set(table.columns))
    if missing:
        raise ValueError(f"the reading {reading} lacks the columns {missing}; there are: {list(table.columns)}")
    planned = [
        size in SEEDS and (reading == "sweep" or seed in SEEDS[size])
        for size, seed in zip(table["size"], table["seed"], strict=True)
    ]
    table = table[planned].reset_index(drop=True)
    if reading == "runs":
        table = table.assign(drop=100 * (table["qat_loss"] - table["loss"]) / table["loss"])
    return table


def is_complete(table: pd.DataFrame, rule: dict, optimizers: Sequence[str]) -> bool:
    """Whether every planned run has the values that a rule reads; before that a verdict is provisional."""
    values = [rule["value"]] if "value" in rule else []
    kept = table[table["optimizer"].isin(optimizers)].dropna(subset=[*values, *rule.get("metrics", [])])
    if rule["reading"] == "sweep":
        return kept.groupby(["optimizer", "size"]).ngroups == len(optimizers) * len(SEEDS)
    keys = ["optimizer", "size", "seed"] + ["bits"] * (rule["reading"] == "scaling")
    planned = len(optimizers) * sum(map(len, SEEDS.values())) * (2 if rule["reading"] == "scaling" else 1)
    return kept.groupby(keys).ngroups == planned
