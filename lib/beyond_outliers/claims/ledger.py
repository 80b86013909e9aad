"""The paper's fourteen claims against a study's tables: a number, an interval, and a verdict by a rule set beforehand.

data/paper/claims.csv has the claims, data/claims.toml the rule of each. One function a claim below returns an
`Estimate`; `verdicts(study)` applies the rules.
"""

import tomllib
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from beyond_outliers import paths
from beyond_outliers.claims.predictors import predictor_table
from beyond_outliers.claims.statistics import LEAST_UNITS, Estimate, correlations, mean, share, verdict
from beyond_outliers.config.protocol import OPTIMIZER_NAMES


def _ranked(table: pd.DataFrame, value: str) -> list[list[str]]:
    """Optimizers from the lowest to the highest `value`, one list a (size, seed) that has all six of them."""
    units = [rows.sort_values(value).optimizer.tolist() for _, rows in table.groupby(["size", "seed"], sort=False)]
    return [order for order in units if set(order) == set(OPTIMIZER_NAMES)]


def _mmr(study, purpose: str = "full_precision") -> pd.DataFrame:
    rows = study.measured("outliers", purpose)
    rows = rows[(rows.checkpoint == "final") & (rows.kind != "down")]  # the median of relu^2 is near zero
    return rows.groupby(["run", "size", "optimizer", "seed", "lr"], sort=False).mmr.mean().reset_index()


def c1(study) -> Estimate:
    return share(order[0] == "muon" for order in _ranked(study.runs("full_precision"), "val_loss"))


def c2(study) -> Estimate:
    sweeps = _mmr(study, "sweep").groupby(["optimizer", "size", "seed"], sort=False)
    rho = sweeps.apply(lambda rows: spearmanr(rows.lr, rows.mmr).statistic, include_groups=False)
    return min((mean(values) for _, values in rho.groupby("optimizer")), key=lambda estimate: estimate.value)


def c3(study) -> Estimate:
    orders = _ranked(_mmr(study), "mmr")
    return share(order[0] == "muon" and order[-1] == "shampoo" for order in orders)


def _damage(study) -> list[list[str]]:
    ptq = study.measured("ptq").query("checkpoint == 'common' and spec == 'W4A4'")
    return _ranked(ptq, "increase")


def c4(study) -> Estimate:
    return share(order[0] == "shampoo" for order in _damage(study))


def c5(study) -> Estimate:
    return share(order[-1] == "muon" for order in _damage(study))


def _correlation(study, target: str, candidates: tuple[str, ...]) -> list[Estimate]:
    found = correlations(predictor_table(study), within="size", candidates=candidates, targets=(target,))
    return [Estimate(row.pearson, row.pearson_low, row.pearson_high, row.n) for row in found.itertuples()]


def c6(study) -> Estimate:
    return max(_correlation(study, "increase", ("mmr", "kurtosis")), key=lambda estimate: estimate.value)


def c7(study) -> Estimate:
    return _correlation(study, "accuracy", ("R_L",))[0]


def _modules(study, attention: str = "unit") -> pd.DataFrame:
    table = study.measured("propagation").query("checkpoint == 'final' and attention == @attention")
    return table[(table.R_in > 0) & (table.R > 0)]


def c8(study) -> Estimate:
    modules = _modules(study)
    return mean(((modules.A > modules.B) & (modules.A > modules.C.abs())).groupby(modules.run).mean())


def c9(study) -> Estimate:
    norms = _modules(study).query("kind == 'norm'")
    return mean((norms.R < norms.R_in).groupby(norms.run).mean())


def _linear(study) -> pd.DataFrame:
    return _modules(study, "open").query("kind == 'linear' and name != 'head'").dropna(subset="gain")


def c10(study) -> Estimate:
    linear = _linear(study)
    distance = (linear.spectral_ratio - 1).abs().groupby([linear.optimizer, linear.run]).mean()
    return max((mean(values) for _, values in distance.groupby("optimizer")), key=lambda estimate: estimate.value)


def c11(study) -> Estimate:
    gain = _linear(study).groupby(["run", "size", "optimizer", "seed"], sort=False).gain.mean().reset_index()
    orders = _ranked(gain, "gain")
    return share(order[-1] == "muon" and set(order[:2]) == {"adamw", "shampoo"} for order in orders)


def _fp_and_qat(study) -> pd.DataFrame:
    keys = ["size", "optimizer", "seed"]
    full, qat = (study.runs(purpose)[[*keys, "val_loss"]] for purpose in ("full_precision", "qat"))
    both = full.merge(qat, on=keys, suffixes=("", "_qat"))
    return both.assign(drop=(both.val_loss_qat - both.val_loss) / both.val_loss)


def c12(study) -> Estimate:
    both = _fp_and_qat(study)
    pairs = zip(_ranked(both, "val_loss"), _ranked(both, "val_loss_qat"), strict=True)
    return share(full[0] != qat[0] for full, qat in pairs)


def c13(study) -> Estimate:
    return share(order[0] == "shampoo" for order in _ranked(_fp_and_qat(study), "drop"))


def c14(study) -> Estimate:
    from beyond_outliers.scaling.fit import fit_scaling_law
    from beyond_outliers.scaling.law import IdentificationWarning

    runs = scaling_runs(study)
    sizes = runs.N.nunique()
    if sizes < LEAST_UNITS:
        return Estimate(np.nan, np.nan, np.nan, sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdentificationWarning)
        laws = {name: fit_scaling_law(rows) for name, rows in runs.groupby("optimizer")}
    if not all(law.identified["rho"].get(4) for law in laws.values()):  # no entry: every QAT run diverged
        return Estimate(np.nan, np.nan, np.nan, sizes)
    ours = laws.pop("shampoo")
    rival = max(laws.values(), key=lambda law: law.rho[4])
    (low, high), (rival_low, rival_high) = ours.intervals["rho"][4], rival.intervals["rho"][4]
    difference = ours.rho[4] - rival.rho[4]
    down = np.hypot(ours.rho[4] - low, rival_high - rival.rho[4])
    up = np.hypot(high - ours.rho[4], rival.rho[4] - rival_low)
    return Estimate(difference, difference - down, difference + up, sizes)


def scaling_runs(study) -> pd.DataFrame:
    """Finished main runs for `fit_scaling_law`: N, D, bits (16, or 4 for QAT), loss, optimizer, size, seed."""
    parts = [study.runs("full_precision").assign(bits=16), study.runs("qat").assign(bits=4)]
    runs = pd.concat(parts, ignore_index=True).query("status == 'finished'")
    runs = runs.rename(columns={"n_parameters": "N", "tokens": "D", "val_loss": "loss"})
    return runs[["N", "D", "bits", "loss", "optimizer", "size", "seed"]].reset_index(drop=True)


CLAIMS: dict[str, Callable[..., Estimate]] = {
    f"C{i}": f for i, f in enumerate((c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14), start=1)
}


def rules() -> dict[str, dict]:
    """The rule of every claim, from data/claims.toml."""
    return tomllib.loads((paths.DATA / "claims.toml").read_text())


def complete_cells(study) -> int:
    """Sizes times seeds at which the full-precision runs of all optimizers have ended, diverged or not."""
    return len(_ranked(study.runs("full_precision"), "val_loss"))


def verdicts(study) -> pd.DataFrame:
    """One row a claim: id, section, claim, statistic, paper, value, low, high, n, unit, threshold, verdict, comment,
    notebook; also written to data/results/SCALE/claims.csv."""
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
                "comment": _comment(found, rule, judged, cells),
                "notebook": rule["notebook"],
            }
        )
    table = pd.DataFrame(rows)
    study.results.mkdir(parents=True, exist_ok=True)
    table.to_csv(study.results / "claims.csv", index=False)
    return table


def _comment(found: Estimate, rule: dict, judged: str, cells: int) -> str:
    """One sentence on why the verdict is what it is."""
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
