"""The verdicts on a study's claims: judged from its tables by data/claims.toml, or as they were said at the time.

Scales `laptop` and `confirm` had rules of their own. Their committed verdicts are frozen: read as tables, not made
anew. `beyond-outliers claims` writes the verdicts by the rules of today to judged.csv.
"""

import sys
import tomllib
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from beyond_outliers import checksums, paths
from beyond_outliers.claims import readings
from beyond_outliers.claims.estimates import Estimate
from beyond_outliers.claims.readings import CELL
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
    qat = study.runs("qat").query("status == 'finished'").set_index(CELL).val_loss.rename("qat_loss")
    full = readings.finished(study)[["run", *CELL, "val_loss"]].rename(columns={"val_loss": "loss"})
    return full.join(qat, on=CELL)


def _sweep(study) -> pd.DataFrame:
    """The tuning runs with what they ended with."""
    rows = readings.swept(study)[[*CELL, "run", "lr", "auxiliary", "val_loss"]]
    rows = rows.merge(readings.predictor_table(study, "sweep")[["run", "mmr", "increase", "mean_gain"]], "left")
    return rows.rename(columns={"val_loss": "loss", "mean_gain": "gain"})


def _common(study) -> pd.DataFrame:
    """At the Common Loss, under every condition: damage, gain, outlier metrics, and what is read at the end.

    The mean gain of the linear layers has the head in it "with head", where the primary format quantizes it.
    """
    parts = [equal_schedule(study)]
    inputs = readings.measured(study, "outliers", checkpoint="common").groupby("run").kurtosis.mean()
    outliers = readings.mmr(study, checkpoint="common").set_index("run").mmr
    at = study.table("common_loss")[[*CELL, "run", "step"]]
    for condition, spec in reversed(CONDITIONS.items()):
        head = condition == "with head"
        damage = readings.damage(study, spec=spec).set_index("run").increase
        gain = readings.block_linears(study, checkpoint="common", head=head).groupby("run").gain.mean()
        if head and "+head" not in readings.primary(study):
            gain = gain[:0]
        of = {"increase": damage, "mmr": outliers, "kurtosis": inputs, "gain": gain}
        rows = at.assign(condition=condition, **{name: at.run.map(values) for name, values in of.items()})
        parts.append(rows.merge(at_the_end(study, spec), on=["run", "step"], how="left", suffixes=("", "_read")))
    return pd.concat(parts[::-1], ignore_index=True)


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
    table, found = _extra(study, "branches"), []
    for _, group in table.groupby(["size", "seed"], sort=False) if len(table) else ():
        loss = group.groupby("optimizer").val_loss.min().max()
        for cell, own in group.groupby(CELL, sort=False):
            if own.val_loss.max() >= loss:
                at = readings.at_loss(own.sort_values("tokens").rename(columns={"val_loss": "base_loss"}), loss)
                found.append(dict(zip(CELL, cell, strict=True)) | {"condition": "equal schedule"} | at)
    return pd.DataFrame(found)


def _recipes(study) -> pd.DataFrame:
    """The arm `recipes` of a scale at its Common Loss: a recipe is an optimizer and a variant. Empty without an arm."""
    if not arm_file(scale := f"{study.scale}+recipes").exists():
        return pd.DataFrame()
    arm = type(study)(scale)
    rows = _common(arm)
    recipes = rows.optimizer + ", " + rows.run.map(arm.table("runs").set_index("run").variant)
    return rows.assign(optimizer=recipes)[[*CELL, "condition", "increase", "R_L_token", "R_L_centred_token"]]


def _extra(study, name: str) -> pd.DataFrame:
    """A table that few scales have; empty where there is none."""
    return study.table(name) if study.has(name) else pd.DataFrame()


def _norms(study) -> pd.DataFrame:
    rows = at_the_end(study, readings.primary(study))
    at = study.table("common_loss")[[*CELL, "run", "step"]]
    return at.merge(rows, on=["run", "step"]).rename(columns={"norms_fall_token": "falls"})


READ = {
    "runs": _runs,
    "sweep": _sweep,
    "final": readings.mmr,
    "common": _common,
    "recipes": _recipes,
    "modules": lambda study: readings.modules(study, checkpoint="common"),
    "norms": _norms,
    "linear": lambda study: readings.block_linears(study, checkpoint="common"),
    "scaling": readings.scaling_runs,
}


def judge(
    study, claims: Collection[str] = tuple(CLAIMS), read: dict[str, pd.DataFrame] | None = None, sets=tuple(SETS)
) -> pd.DataFrame:
    """The verdicts on claims by data/claims.toml, on the six and on the paper's three (column `optimizers`).

    read: the tables to judge instead of `tables(study)`. The other columns are those of `rules.evaluate`.
    """
    plan = study.protocol.settings.runs("full_precision")
    sizes = {size: study.protocol.model(size).n_parameters for size in plan.sizes} if plan else {}
    planned = "/".join(str(len(plan.seeds_at(size))) for size in sizes) if plan else ""
    rules = {name: rule for name, rule in read_rules().items() if name in claims}
    read, tolerance = read or tables(study), rule_file()["study"]["tolerance"]
    parts = [evaluate(read, rules, sizes, SETS[which], planned, tolerance) for which in sets]
    return pd.concat(parts, keys=sets, names=["optimizers", None]).reset_index("optimizers").reset_index(drop=True)


def read_verdicts(study) -> pd.DataFrame:
    """The verdicts by data/claims.toml as judged.csv has them; computed now, and not written, where there is none."""
    file = study.results / f"{JUDGED}.csv"
    check_table(study.results, JUDGED)
    if not file.exists():
        return judge(study)
    return read_table(file, keep_default_na=True).fillna({"condition": "", "runs": "", "rival": "", "comment": ""})


def write_verdicts(study, checked: bool = False) -> Path:
    """Judges every claim and writes judged.csv beside the study's tables. MissingResults where there are none.

    Takes the tables as they are, however they came there: their SHA256SUMS are written anew, and what changed is named.
    checked: DamagedFile instead.
    """
    file = study.results / f"{JUDGED}.csv"
    if checked:
        checksums.check(study.results, remedy="without --checked the tables are taken as they are")
    elif study.results.exists() and (changed := checksums.seal(study.results)):
        print(f"taken as they are now: {', '.join(changed)}", file=sys.stderr)
    checksums.write_text(file, judge(study).to_csv(index=False))
    return file


# ------------------------------------------------------------------------------------------------ verdicts to be shown


def _of_the_six(table: pd.DataFrame) -> pd.DataFrame:
    """Verdicts on the six alone; n: the fewest runs of an optimizer at each size."""
    return table[table.optimizers == "six"].drop(columns="n").rename(columns={"runs": "n"})


def headlines(table: pd.DataFrame, rules: str = "claims.toml") -> pd.DataFrame:
    """One row a claim of verdicts (id, part, verdict, ...), as a whole, under the first of its conditions: COLUMNS."""
    rows = _of_the_six(table) if "optimizers" in table else table
    rows = rows[rows.part == WHOLE].drop_duplicates("id")
    told = pd.DataFrame.from_dict(read_rules(rules), orient="index").assign(claim=texts())
    return rows.join(told.drop(columns=rows.columns, errors="ignore"), on="id").reindex(columns=COLUMNS)


def frozen(study) -> pd.DataFrame | None:
    """What was said of a scale by the rules of its time, on the six, with the head, a row a claim and part; None where
    nothing is frozen."""
    name = FROZEN.get(study.scale, ("",))[0]
    if not name or not (study.results / f"{name}.csv").exists():
        return None
    check_table(study.results, name)
    table = read_table(study.results / f"{name}.csv")
    if "part" not in table:  # of `laptop`
        return table.assign(part=WHOLE, changes="")
    table = table[(table.spec == CONDITIONS["with head"]) & (table.optimizers == "six")]
    return table.drop(columns="optimizers").rename(columns={"estimate": "value"})


def judged(study) -> pd.DataFrame:
    """One row a claim: COLUMNS. What was said at the time where that is frozen, else by data/claims.toml."""
    said = frozen(study)
    rows = headlines(read_verdicts(study)) if said is None else headlines(said, FROZEN[study.scale][1])
    return rows.reset_index(drop=True)


def then_and_now(study) -> pd.DataFrame:
    """What the two frozen studies said beside this scale by the rules of today: id, claim, laptop, confirm, now, why.

    why: how the judging of a claim differs between the two, in words (data/claims-changes.toml).
    """
    now = headlines(read_verdicts(study)).set_index("id")
    then = {scale: judged(type(study)(scale, paths.RESULTS / scale)).set_index("id").verdict for scale in FROZEN}
    why = pd.DataFrame.from_dict(rule_file("claims-changes.toml"), orient="index").judged
    return now[["claim"]].assign(**then, now=now.verdict, why=why).reset_index()


def scorecard(study) -> pd.DataFrame:
    """A row per claim, a column per way to judge it: by the rules of today, and what the frozen studies said then."""
    whole = read_verdicts(study).query("part == @WHOLE")
    six, three = whole[whole.optimizers == "six"], whole[whole.optimizers == "three"]
    ways = {"six optimizers": six, "the paper's three": three}
    ways |= {name: six[six.condition == name] for name in ("without head", "equal schedule")}
    columns = {name: rows.drop_duplicates("id").set_index("id").verdict for name, rows in ways.items()}
    then = then_and_now(study).set_index("id")
    columns |= {f"{scale}, then": then[scale] for scale in FROZEN}
    return pd.DataFrame(columns).reindex(then.index).replace("", np.nan)


def parts(study, claim: str) -> pd.DataFrame:
    """Part, value, low, high and verdict of the parts of a claim, on the six, by the rules that judge the study."""
    said = frozen(study)
    table = _of_the_six(read_verdicts(study)) if said is None else said
    return table.loc[(table.id == claim) & (table.part != WHOLE), ["part", "value", "low", "high", "verdict"]]


AT_FOUND_RATES = ("C1", "C3", "C4", "C5", "C12", "C13", "C14")  # claims whose numbers were measured there


def scenarios(study) -> pd.DataFrame:
    """What the verdicts on the six would be under other circumstances, by data/claims.toml, a row a claim: id, claim,
    `as it is`, `found rates` (of `readings.found_rates`, "not measured" where nothing was), and `without 0.08M`."""
    read = tables(study)
    large = {name: table[table["size"] != "0.08M"] for name, table in read.items() if "size" in table}
    rows = headlines(read_verdicts(study)).set_index("id")[["claim", "verdict"]].rename(columns={"verdict": "as it is"})
    for name, tried, claims in (
        ("found rates", at_found_rates(read), AT_FOUND_RATES),
        ("without 0.08M", large, CLAIMS),
    ):
        rows[name] = headlines(judge(study, claims, tried, ("six",))).set_index("id").verdict
    return rows.fillna("not measured").reset_index()


def at_found_rates(read: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """`tables` with the runs at the found rates in place of those at the rates that the searches chose."""
    found = readings.found_rates()
    ends = found.rename(columns={"val_loss": "loss", "val_loss_qat": "qat_loss", "mmr_end": "mmr"})
    common = found.rename(columns={"increase_common": "increase", "mmr_common": "mmr"}).assign(condition="with head")
    laws = pd.concat([ends.assign(bits=16), ends.assign(bits=4, loss=ends.qat_loss)])
    changed = {"runs": (ends, ["loss", "qat_loss"]), "final": (ends, ["mmr"]), "common": (common, ["increase", "mmr"])}
    for name, (rows, columns) in (changed | {"scaling": (laws, ["loss"])}).items():
        keys = [*CELL, *({"condition", "bits"} & set(read[name]))]
        table = read[name].set_index(keys)
        table.update(rows.set_index(keys)[columns])
        read = read | {name: table.reset_index()}
    return read


def show(study, name: str, limit: int | None) -> str:
    """Verdict, what would change it, rule, figure and the first `limit` rows (None: all) behind a claim, as text.

    Where a scale's verdicts are frozen, what was said at the time stands below.
    """
    rule, table = read_rules()[name], judge(study, (name,))
    row, rows = headlines(table).iloc[0], READ[rule["table"]](study)
    shown = rows.head(len(rows) if limit is None else limit)
    told = {
        "verdict": f"{row.verdict}. {row.comment}",
        "changes": row.changes,
        "statistic": row.statistic,
        "estimate": f"{_estimate(row)}, n {row.n} ({row.unit})",
        "rule": f"docs/rules.md#{name.lower()}",
        "paper": row.paper,
        "figure": f"{paths.pages(study.scale) / rule['figure']}.png",
        "notebook": row.notebook,
    }
    lines = [f"{name} at scale {study.scale}: {row.claim}", *(f"{what:10} {text}" for what, text in told.items())]
    for part in _of_the_six(table).query("part != @WHOLE").itertuples():
        lines.append(f"part       {f'{part.part} {part.condition}'.strip()}: {part.verdict}, {_estimate(part)}")
    if frozen(study) is not None:
        then = judged(study).set_index("id").loc[name]
        lines.append(f"then       {then.verdict}, {_estimate(then)}, n {then.n}")
    lines += ["", shown.to_string(index=False, float_format="{:.4g}".format)]
    more = len(rows) - len(shown)
    return "\n".join(lines + [f"... and {more:,} rows more (--rows 0: all)"] * (more > 0))


def _estimate(row) -> str:
    return Estimate(row.value, row.low, row.high).text(4) if row.value == row.value else "none over all sizes"
