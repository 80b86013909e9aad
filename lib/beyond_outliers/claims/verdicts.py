"""The verdicts on a study's claims: judged from its tables by data/claims.toml, or as they were said at the time.

Scales `laptop` and `confirm` had rules of their own. Their committed verdicts are frozen: read as tables, not made
anew. `beyond-outliers claims` writes the verdicts by the rules of today to judged.csv.
"""

import json
import tomllib
from collections.abc import Collection
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims import readings
from beyond_outliers.claims.rules import CLAIMS, SETS, WHOLE, evaluate
from beyond_outliers.config.outside import arm_file
from beyond_outliers.study.tables import MissingResults, check_table, read_table

CONDITIONS = {"with head": "W4A4+head", "without head": "W4A4"}  # of `rules`: the format of the damage
JUDGED = "judged"  # the table of the verdicts by data/claims.toml
# scale -> its frozen table, the file of its rules, and the commit and day of its last row
FROZEN = {
    "laptop": ("claims", "claims-laptop.toml", "7b1d211", "2026-11-25"),
    "confirm": ("verdicts", "claims-confirm.toml", "3a359d7", "2026-11-29"),
}
COLUMNS = ["id", "claim", "statistic", "paper", "value", "low", "high", "n", "unit", "verdict", "comment", "changes"]
COLUMNS += ["notebook"]


def rule_file(name: str = "claims.toml") -> dict[str, Any]:
    """A file of rules in data, as it stands there."""
    return tomllib.loads((paths.DATA / name).read_text())


def read_rules(name: str = "claims.toml") -> dict[str, dict]:
    """The rule of every claim, from a file in data."""
    return {claim: rule for claim, rule in rule_file(name).items() if claim in CLAIMS}


def texts() -> pd.Series:
    """What the paper claims, by id."""
    return pd.read_csv(paths.PAPER / "claims.csv").set_index("id").claim


# -------------------------------------------------------------------------------------------------- what rules judge


def tables(study) -> dict[str, pd.DataFrame]:
    """What `rules.evaluate` takes, of the planned main runs that count; a table that is not there yet is left out."""
    study.table("runs")  # MissingResults where there is nothing to judge
    found: dict[str, pd.DataFrame] = {}
    for name, read in READ.items():
        try:
            rows = read(study)
        except MissingResults:
            continue
        found[name] = rows if name == "sweep" else counted(study, rows)  # tuning came before the rules
    return found


def counted(study, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of planned seeds; of the scale that the rules judge, only of runs that ended after these were committed."""
    if not {"seed", "run"} <= set(rows):
        return rows
    settings = rule_file()["study"]
    if study.scale == settings["judges"]:
        ended = study.table("runs").set_index("run").finished_at.map(datetime.fromisoformat)
        rows = rows[rows.run.map(ended) > settings["counted_after"]]
    return rows.reset_index(drop=True)


def _runs(study) -> pd.DataFrame:
    qat = study.runs("qat").query("status == 'finished'")[[*readings.CELL, "val_loss"]]
    full = readings.finished(study)[["run", *readings.CELL, "val_loss"]].rename(columns={"val_loss": "loss"})
    return full.merge(qat.rename(columns={"val_loss": "qat_loss"}), on=readings.CELL, how="left")


def _sweep(study) -> pd.DataFrame:
    """The tuning runs with what they ended with; `auxiliary` is the rate of the embedding, NaN where it has none."""
    runs = study.runs("sweep").query("status == 'finished'")
    auxiliary = [json.loads(text).get("embedding_lr", np.nan) for text in runs.hyper]
    rows = runs[[*readings.CELL, "run", "lr"]].assign(auxiliary=auxiliary, loss=runs.val_loss)
    return rows.merge(readings.predictor_table(study, "sweep")[["run", "mmr", "increase", "mean_gain"]], "left").rename(
        columns={"mean_gain": "gain"}
    )


def _common(study) -> pd.DataFrame:
    """At the Common Loss, under every condition: damage, gain, outlier metrics, and what is read at the end."""
    parts = []
    inputs = readings.measured(study, "outliers", checkpoint="common").groupby("run").kurtosis.mean()
    outliers = readings.mmr(study, checkpoint="common").set_index("run").mmr
    at = study.table("common_loss")[[*readings.CELL, "run", "step"]]
    for condition, spec in CONDITIONS.items():
        damage = readings.damage(study, spec=spec).set_index("run").increase
        of = {"increase": damage, "mmr": outliers, "kurtosis": inputs, "gain": _gain(study, condition)}
        rows = at.assign(condition=condition, **{name: at.run.map(values) for name, values in of.items()})
        parts.append(rows.merge(at_the_end(study, spec), on=["run", "step"], how="left", suffixes=("", "_read")))
    return pd.concat([*parts, equal_schedule(study)], ignore_index=True)


def _gain(study, condition: str) -> pd.Series:
    """Mean gain of the linear layers by run; with the head, where the scale's primary format quantizes it."""
    head = condition == "with head"
    rows = readings.block_linears(study, checkpoint="common", head=head)
    return rows.groupby("run").gain.mean() if not head or "+head" in readings.primary(study) else pd.Series(dtype=float)


def at_the_end(study, spec: str) -> pd.DataFrame:
    """A column a reading at the network's end (see `propagation`), by run and step; empty without the table."""
    table = _extra(study, "readings")
    if table.empty:
        return pd.DataFrame({"run": pd.Series(dtype=str), "step": pd.Series(dtype=int)})
    rows = table[table.spec == spec].drop_duplicates(["run", "step", "reading"])  # "common" may be "final", too
    return rows.pivot(index=["run", "step"], columns="reading", values="value").reset_index()


def equal_schedule(study) -> pd.DataFrame:
    """Fully decayed branches of every run, read at one loss: CELL, condition, and every number of the table `branches`.

    The loss of a size and seed is the highest of its runs' lowest; a number there comes by linear interpolation in the
    loss between the two branches around it. Optimizers of which no branch is above it are left out.
    """
    table = _extra(study, "branches")
    found = []
    for _, group in table.groupby(["size", "seed"], sort=False) if len(table) else ():
        loss = group.groupby("optimizer").val_loss.min().max()
        for (size, optimizer, seed), own in group.groupby(readings.CELL, sort=False):
            if own.val_loss.max() < loss:
                continue
            at = readings.at_loss(own.sort_values("tokens").rename(columns={"val_loss": "base_loss"}), loss)
            found.append({"size": size, "optimizer": optimizer, "seed": seed, "condition": "equal schedule"} | at)
    return pd.DataFrame(found)


def _recipes(study) -> pd.DataFrame:
    """The arm `recipes` of a scale at its Common Loss: a recipe is an optimizer and a variant. Empty without an arm."""
    if not arm_file(scale := f"{study.scale}+recipes").exists():
        return pd.DataFrame()
    arm = type(study)(scale)
    rows = _common(arm)
    recipes = rows.optimizer + ", " + rows.run.map(arm.table("runs").set_index("run").variant)
    return rows.assign(optimizer=recipes)[[*readings.CELL, "condition", "increase", "R_L_token", "R_L_centred_token"]]


def _extra(study, name: str) -> pd.DataFrame:
    """A table that few scales have; empty where there is none."""
    return study.table(name) if study.has(name) else pd.DataFrame()


def _norms(study) -> pd.DataFrame:
    rows = at_the_end(study, readings.primary(study))
    at = study.table("common_loss")[[*readings.CELL, "run", "step"]]
    return at.merge(rows, on=["run", "step"]).rename(columns={"norms_fall_token": "falls"})


def _scaling(study) -> pd.DataFrame:
    return readings.scaling_runs(study)


READ = {
    "runs": _runs,
    "sweep": _sweep,
    "final": readings.mmr,
    "common": _common,
    "recipes": _recipes,
    "modules": lambda study: readings.modules(study, checkpoint="common"),
    "norms": _norms,
    "linear": lambda study: readings.block_linears(study, checkpoint="common"),
    "scaling": _scaling,
}


def judge(study, claims: Collection[str] = tuple(CLAIMS)) -> pd.DataFrame:
    """The verdicts on claims by data/claims.toml, on the six and on the paper's three (column `optimizers`).

    The other columns are those of `rules.evaluate`.
    """
    plan = study.protocol.settings.runs("full_precision")
    sizes = {size: study.protocol.model(size).n_parameters for size in plan.sizes} if plan else {}
    planned = "/".join(str(len(plan.seeds_at(size))) for size in sizes) if plan else ""
    rules = {name: rule for name, rule in read_rules().items() if name in claims}
    read, tolerance = tables(study), rule_file()["study"]["tolerance"]
    parts = [
        evaluate(read, rules, sizes, names, planned, tolerance).assign(optimizers=which)
        for which, names in SETS.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    return table[["optimizers", *table.columns.drop("optimizers")]]


def read_verdicts(study) -> pd.DataFrame:
    """The verdicts by data/claims.toml as judged.csv has them; computed now, and not written, where there is none."""
    file = study.results / f"{JUDGED}.csv"
    check_table(study.results, JUDGED)
    if not file.exists():
        return judge(study)
    return read_table(file, keep_default_na=True).fillna({"condition": "", "runs": "", "rival": "", "comment": ""})


# --------------------------------------------------------------------------------------------------- one row a claim


def headlines(table: pd.DataFrame) -> pd.DataFrame:
    """One row a claim of `judge`: on the six, as a whole, under the first of its conditions; COLUMNS."""
    rows = table[(table.optimizers == "six") & (table.part == WHOLE)].drop_duplicates("id")
    rule = pd.DataFrame.from_dict(read_rules(), orient="index")[["statistic", "paper", "changes", "notebook"]]
    return (
        rows.drop(columns="n")
        .rename(columns={"runs": "n"})
        .join(rule, on="id")
        .assign(claim=rows.id.map(texts()))[COLUMNS]
    )


def frozen(study) -> pd.DataFrame | None:
    """What was said of a scale by the rules of its time, a row a claim: COLUMNS; None where nothing is frozen."""
    name, file, *_ = FROZEN.get(study.scale, ("", ""))
    if not name or not (study.results / f"{name}.csv").exists():
        return None
    check_table(study.results, name)
    table, rule = read_table(study.results / f"{name}.csv"), pd.DataFrame.from_dict(read_rules(file), orient="index")
    if "part" in table:  # of `confirm`: the verdict is that on the six, with the head
        table = table[(table.part == WHOLE) & (table.optimizers == "six") & (table.spec == CONDITIONS["with head"])]
        rule = rule[["statistic", "paper", "changes", "notebook"]]
        table = table.rename(columns={"estimate": "value"}).join(rule, on="id").assign(claim=table.id.map(texts()))
    return table.reindex(columns=COLUMNS).fillna({"changes": ""}).reset_index(drop=True)


def judged(study) -> pd.DataFrame:
    """One row a claim: COLUMNS. What was said at the time where that is frozen, else by data/claims.toml."""
    said = frozen(study)
    return headlines(read_verdicts(study)) if said is None else said


LEDGER = "id part verdict value low high unit n threshold side"  # of a figure of verdicts


def ledger(study) -> pd.DataFrame:
    """Rows of the figure of verdicts, in the order of the claims: LEDGER, `side` 1 where the claim holds above
    threshold.

    Of what was said at the time where that is frozen, else of `read_verdicts`; the whole of a claim stands first.
    """
    said = frozen(study)
    if study.scale == "laptop" and said is not None:
        rule = read_rules(FROZEN["laptop"][1])
        lines = [(rule[name]["threshold"], 1 if rule[name]["side"] == "above" else -1) for name in said.id]
        table = said.assign(part=WHOLE)
    else:
        table = read_verdicts(study) if said is None else frozen_parts(study)
        table = table[(table.optimizers == "six")].drop(columns="n").rename(columns={"runs": "n"})
        lines = [line(read_rules()[row.id], row.part) for row in table.itertuples()]
    return table.assign(threshold=[at for at, _ in lines], side=[side for _, side in lines])[LEDGER.split()]


def line(rule: dict, part: str) -> tuple[float, int]:
    """Where the verdict on a part changes, and the side (1 above, -1 below) on which the claim holds."""
    if "half" in rule:
        sides = [half["side"] for half in rule["half"] if part.startswith(half["name"])] or [rule["half"][0]["side"]]
        return 0.0, 1 if sides[0] == "highest" else -1
    if "claim" in rule:
        return (rule["predicts"], 1) if rule["claim"] == "predicts" else (rule["silent"], -1)
    return rule.get("threshold", 0.0), -1 if "spectral" in rule["unit"] else 1


def then_and_now(study) -> pd.DataFrame:
    """What the two frozen studies said beside this scale by the rules of today: id, claim, laptop, confirm, now, why.

    why: how the judging of a claim differs between the two, in words (data/claims-changes.toml).
    """
    now = headlines(read_verdicts(study)).set_index("id")
    table = now[["claim"]]
    for scale in FROZEN:
        said = frozen(type(study)(scale, paths.RESULTS / scale))
        table[scale] = "" if said is None else said.set_index("id").verdict
    why = {claim: of["judged"] for claim, of in rule_file("claims-changes.toml").items()}
    return table.assign(now=now.verdict, why=table.index.map(why)).reset_index()


def frozen_parts(study) -> pd.DataFrame:
    """The frozen verdicts of `confirm` on the six with the head, every part, with the names of `evaluate`."""
    table = read_table(study.results / f"{FROZEN['confirm'][0]}.csv")
    table = table[table.spec == CONDITIONS["with head"]]
    return table.rename(columns={"estimate": "value", "n": "runs"}).assign(n=0, condition="")


def rule_place(scale: str, claim: str) -> str:
    """ "data/claims.toml#L58": where the rule of a claim stands; ValueError for a claim without one."""
    name = FROZEN[scale][1] if scale in FROZEN else "claims.toml"
    for number, line in enumerate((paths.DATA / name).read_text().splitlines(), start=1):
        if line.strip() == f"[{claim}]":
            return f"data/{name}#L{number}"
    raise ValueError(f"no rule for {claim!r} in data/{name}")
