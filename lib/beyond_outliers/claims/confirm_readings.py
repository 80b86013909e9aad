"""The seven tables that the confirmatory rules judge, read off a study: of runs that ended after the rules were fixed.

The rules are data/claims-confirm.toml, their code `confirm_rules`, which says what each table holds.
"""

import tomllib
from datetime import datetime

import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims import rates, readings
from beyond_outliers.claims.confirm_rules import eligible, evaluate_sets

# commit 338bfd4: the last before the first main run of scale confirm; rules and settings have not changed since
FIXED_AT = datetime.fromisoformat("2026-11-25T07:19:26+00:00")
PRIMARY, BESIDE = "W4A4+head", "W4A4"
CELL = readings.CELL


def confirm_rules() -> dict[str, dict]:
    """The rule of every claim, from data/claims-confirm.toml."""
    return tomllib.loads((paths.DATA / "claims-confirm.toml").read_text())


def counted(study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Main runs (full precision and QAT) that the verdicts may count, and those they may not, with the reason."""
    runs = pd.concat([study.runs(purpose) for purpose in ("full_precision", "qat")], ignore_index=True)
    return eligible(runs, FIXED_AT)


def tables(study, spec: str = PRIMARY) -> dict[str, pd.DataFrame]:
    """What `confirm_rules.evaluate` takes; the damage is that of `spec`, everything else that of the primary one.

    A table whose runs are not there yet is left out.
    """
    kept = counted(study)[0]
    found: dict[str, pd.DataFrame] = {}

    def of_kept(rows: pd.DataFrame) -> pd.DataFrame:
        return rows[rows.run.isin(kept.run)].reset_index(drop=True)

    finished = kept[kept.status == "finished"]
    full = finished[finished.scheme == "none"][[*CELL, "val_loss"]].rename(columns={"val_loss": "loss"})
    quantized = finished[finished.scheme != "none"][[*CELL, "val_loss"]].rename(columns={"val_loss": "qat_loss"})
    found["runs"] = full.merge(quantized, on=CELL, how="left")
    found["sweep"] = _rate_line(study)
    found["final"] = of_kept(readings.mmr(study))[[*CELL, "mmr"]]
    found["common"] = at_common_loss(study, spec, kept)
    found["modules"] = of_kept(readings.modules(study, checkpoint="common"))
    found["linear"] = of_kept(readings.block_linears(study, checkpoint="common"))
    scaling = readings.scaling_runs(study)
    cells = finished.assign(bits=(finished.scheme == "none").map({True: 16, False: 4}))[[*CELL, "bits"]]
    found["scaling"] = scaling.merge(cells, on=[*CELL, "bits"]) if len(quantized) else scaling.iloc[:0]
    return {name: table for name, table in found.items() if len(table)}


def at_common_loss(study, spec: str, kept: pd.DataFrame) -> pd.DataFrame:
    """One row a counted run, at the Common Loss of its size and seed: increase (`spec`), mmr, kurtosis, R_L, gain."""
    damage = readings.damage(study, spec=spec)[[*CELL, "run", "increase"]]
    inputs = readings.measured(study, "outliers", checkpoint="common").groupby("run").kurtosis.mean()
    columns = {
        "mmr": readings.mmr(study, checkpoint="common").set_index("run").mmr,
        "kurtosis": inputs,
        "R_L": readings.output_error(study, checkpoint="common").set_index("run").R_L,
        "gain": readings.linear_gain(study, checkpoint="common").set_index("run").gain,
    }
    found = damage[damage.run.isin(kept.run)]
    return found.assign(**{name: found.run.map(values) for name, values in columns.items()}).reset_index(drop=True)


def _rate_line(study) -> pd.DataFrame:
    """MMR of the tuning runs on the line of matrix rates, those at the chosen auxiliary rate."""
    rows = readings.mmr(study, "sweep")
    return rows[rows.run.isin(rates.line(study).run)][[*CELL, "lr", "mmr"]].reset_index(drop=True)


def confirm_verdicts(study) -> pd.DataFrame:
    """Verdicts of every rule on the six and the three optimizers, for the primary format and, beside it, without head.

    Columns: spec, optimizers, then those of `confirm_rules.evaluate`.
    """
    parts = [evaluate_sets(tables(study, spec), confirm_rules()).assign(spec=spec) for spec in (PRIMARY, BESIDE)]
    table = pd.concat(parts, ignore_index=True)
    return table[["spec", *table.columns.drop("spec")]]
