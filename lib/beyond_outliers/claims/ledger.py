"""The paper's fourteen claims against a study's tables: a number, an interval, and a verdict by a rule set beforehand.

data/paper/claims.csv has the claims, data/claims.toml the rule of each. A claim below says which rows are read (a
reading of `claims.readings`) and which `Estimate` is made of them; `verdicts(study)` applies the rules. The claims are
about the paper's six optimizers: rows of others are left out first, and without one of the six nothing is decided.
"""

import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims import readings
from beyond_outliers.claims.predictors import predictor_table
from beyond_outliers.claims.readings import PAPER_OPTIMIZERS
from beyond_outliers.claims.statistics import LEAST_UNITS, Estimate, correlations, mean, share, unknown, verdict
from beyond_outliers.study.tables import check_table


@dataclass(frozen=True)
class Claim:
    """What is read off a study, what is made of it, and the columns that matter (beside size, optimizer and seed)."""

    read: Callable[..., pd.DataFrame]
    estimate: Callable[[pd.DataFrame], Estimate]
    columns: tuple[str, ...]

    def rows(self, study) -> pd.DataFrame:
        """The rows behind the number: those of the paper's optimizers."""
        return of_the_paper(self.read(study))

    def __call__(self, study) -> Estimate:
        rows = self.rows(study)
        if lacking := [name for name in PAPER_OPTIMIZERS if name not in set(rows.optimizer)]:
            return unknown(0, f"No rows of {', '.join(lacking)}: the claim is about all six optimizers of the paper.")
        return self.estimate(rows)


CLAIMS: dict[str, Claim] = {}


def judged_on(read: Callable[..., pd.DataFrame], *columns: str):
    """Enters a function of rows into CLAIMS, under its name in capitals, as the estimate from what `read` reads."""

    def enter(estimate: Callable[[pd.DataFrame], Estimate]) -> Claim:
        CLAIMS[estimate.__name__.upper()] = claim = Claim(read, estimate, columns)
        return claim

    return enter


def of_the_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the paper's six optimizers."""
    return rows[rows.optimizer.isin(PAPER_OPTIMIZERS)].reset_index(drop=True)


def ranked(rows: pd.DataFrame, value: str) -> list[list[str]]:
    """The six from the lowest to the highest `value`, one list a (size, seed) that has all of them."""
    units = of_the_paper(rows).sort_values(value).groupby(["size", "seed"], sort=False).optimizer.agg(list)
    return [order for order in units if set(order) == set(PAPER_OPTIMIZERS)]


def extreme(values: pd.Series, optimizers: pd.Series, pick: Callable[..., Estimate]) -> Estimate:
    """The lowest or highest (pick: min, max) of the optimizers' means."""
    return pick((mean(own) for _, own in values.groupby(optimizers)), key=lambda estimate: estimate.value)


@judged_on(readings.full_precision, "lr", "status", "val_loss")
def c1(rows) -> Estimate:
    return share(order[0] == "muon" for order in ranked(rows, "val_loss"))


@judged_on(readings.mmr_trend, "trend")
def c2(rows) -> Estimate:
    return extreme(rows.trend, rows.optimizer, min)


@judged_on(readings.mmr, "mmr")
def c3(rows) -> Estimate:
    return share(order[0] == "muon" and order[-1] == "shampoo" for order in ranked(rows, "mmr"))


@judged_on(readings.damage, "checkpoint", "spec", "increase")
def c4(rows) -> Estimate:
    return share(order[0] == "shampoo" for order in ranked(rows, "increase"))


@judged_on(readings.damage, "checkpoint", "spec", "increase")
def c5(rows) -> Estimate:
    return share(order[-1] == "muon" for order in ranked(rows, "increase"))


def _correlations(rows: pd.DataFrame, target: str, candidates: tuple[str, ...]) -> Iterable[Estimate]:
    found = correlations(rows, within="size", candidates=candidates, targets=(target,))
    return (Estimate(row.pearson, row.pearson_low, row.pearson_high, row.n) for row in found.itertuples())


@judged_on(predictor_table, "lr", "mmr", "kurtosis", "increase")
def c6(rows) -> Estimate:
    return max(_correlations(rows, "increase", ("mmr", "kurtosis")), key=lambda estimate: estimate.value)


@judged_on(predictor_table, "lr", "R_L", "accuracy")
def c7(rows) -> Estimate:
    return next(iter(_correlations(rows, "accuracy", ("R_L",))))


def _modules(study) -> pd.DataFrame:
    return readings.with_input_error(readings.modules(study))


def _norms(study) -> pd.DataFrame:
    return _modules(study).query("kind == 'norm'")


@judged_on(_modules, "name", "kind", "A", "B", "C")
def c8(rows) -> Estimate:
    return mean(readings.accumulated_dominates(rows).groupby(rows.run).mean())


@judged_on(_norms, "name", "R_in", "R")
def c9(rows) -> Estimate:
    return mean(readings.error_falls(rows).groupby(rows.run).mean())


@judged_on(readings.block_linears, "name", "spectral_ratio")
def c10(rows) -> Estimate:
    distance = (rows.spectral_ratio - 1).abs().groupby([rows.optimizer, rows.run]).mean()
    return extreme(distance, distance.index.get_level_values("optimizer"), max)


@judged_on(readings.linear_gain, "gain")
def c11(rows) -> Estimate:
    orders = ranked(rows, "gain")
    return share(order[-1] == "muon" and set(order[:2]) == {"adamw", "shampoo"} for order in orders)


@judged_on(readings.qat_losses, "val_loss_fp", "val_loss_qat")
def c12(rows) -> Estimate:
    pairs = zip(ranked(rows, "val_loss_fp"), ranked(rows, "val_loss_qat"), strict=True)
    return share(full[0] != qat[0] for full, qat in pairs)


@judged_on(readings.qat_losses, "val_loss_fp", "val_loss_qat", "relative_increase")
def c13(rows) -> Estimate:
    return share(order[0] == "shampoo" for order in ranked(rows, "relative_increase"))


@judged_on(readings.scaling_runs, "bits", "N", "D", "loss")
def c14(rows) -> Estimate:
    sizes = rows.N.nunique()
    if sizes < LEAST_UNITS or set(rows.optimizer[rows.bits == 16]) < set(PAPER_OPTIMIZERS):
        return unknown(sizes)
    rho = readings.efficiencies(readings.scaling_laws(rows)).set_index("optimizer")
    if not all(rho.identified.get(name, False) for name in PAPER_OPTIMIZERS):  # no entry: every QAT run diverged
        return unknown(sizes)
    ours, rival = rho.loc["shampoo"], rho.loc[rho.drop("shampoo").rho.idxmax()]
    difference = ours.rho - rival.rho
    down = np.hypot(ours.rho - ours.low, rival.high - rival.rho)
    up = np.hypot(ours.high - ours.rho, rival.rho - rival.low)
    return Estimate(difference, difference - down, difference + up, sizes)


def rules() -> dict[str, dict]:
    """The rule of every claim, from data/claims.toml."""
    return tomllib.loads((paths.DATA / "claims.toml").read_text())


def complete_cells(study) -> int:
    """Sizes times seeds at which the full-precision runs of all six optimizers have ended, diverged or not."""
    return len(ranked(readings.full_precision(study), "val_loss"))


def verdicts(study) -> pd.DataFrame:
    """One row a claim: id, section, claim, statistic, paper, value, low, high, n, unit, holds, verdict, comment,
    notebook. Computed from the study's tables; `beyond-outliers claims` writes them to claims.csv.
    """
    texts = pd.read_csv(paths.PAPER / "claims.csv").set_index("id")
    cells = complete_cells(study)
    rows = []
    for name, rule in rules().items():
        found = CLAIMS[name](study)
        judged = verdict(found, rule["side"], rule["threshold"], cells)
        rows.append(
            {
                "id": name,
                "section": texts.section[name],
                "claim": texts.claim[name],
                "statistic": rule["statistic"],
                "paper": rule["paper"],
                "value": found.value,
                "low": found.low,
                "high": found.high,
                "n": found.n,
                "unit": rule["unit"],
                "holds": f"{rule['side']} {rule['threshold']:g}",
                "verdict": judged,
                "comment": comment(found, rule, judged, cells),
                "notebook": rule["notebook"],
            }
        )
    return pd.DataFrame(rows)


def read_verdicts(study) -> pd.DataFrame:
    """The verdicts as the workflow wrote them to claims.csv; computed now, and not written, where it has not."""
    file = study.results / "claims.csv"
    check_table(study.results, file.stem)
    return pd.read_csv(file) if file.exists() else verdicts(study)


def comment(found: Estimate, rule: dict, judged: str, cells: int) -> str:
    """One sentence on why the verdict is what it is."""
    if found.reason:
        return found.reason
    if found.n < LEAST_UNITS:
        return f"Only {found.n} of the {LEAST_UNITS} units ({rule['unit']}) that a verdict needs."
    if not np.isfinite(found.value):
        return "The data do not identify this number."
    if cells < LEAST_UNITS:
        return f"{found.n} runs, but of {cells} sizes and seeds only; a verdict needs {LEAST_UNITS}."
    leans = (found.value > rule["threshold"]) == (rule["side"] == "above")
    if judged == "undecided":
        return f"The number itself {'agrees' if leans else 'disagrees'}, but its interval reaches across the threshold."
    side = "claimed" if judged == "reproduced" else "other"
    return f"The whole interval lies on the {side} side of {rule['threshold']:g}."
