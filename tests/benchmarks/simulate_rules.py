"""Power and rates of error of the confirmatory study's rules, from simulated studies of its design.

    python tests/benchmarks/simulate_rules.py --draws 4000 --studies 30     writes data/results/rules_power.csv

Seeds are normal with the standard deviations that scale `laptop` had within size and optimizer (pooled over its two
sizes; three seeds each), once as they are and once doubled, since the new regime may be noisier. A cell of n seeds is
drawn by its mean and its variance, which are independent: N(mu, s^2 / n) and s^2 chi^2(n - 1) / (n - 1). The rules are
those of `beyond_outliers.claims.contrasts`, the very functions that judge the real study.
"""

import argparse
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims.confirm_prediction import judge_prediction, leave_one_out, pearson
from beyond_outliers.claims.confirm_qat import judge_reversal
from beyond_outliers.claims.confirm_rules import PAPER_OPTIMIZERS, SEEDS, evaluate
from beyond_outliers.claims.contrasts import (
    NOT_REPRODUCED,
    REPRODUCED,
    STRICT,
    USUAL,
    VERDICTS,
    Cells,
    common_slope,
    contrast,
    decide,
    judge_extreme,
    sign_of,
    whole,
)
from beyond_outliers.scaling import IdentificationWarning

FACTORS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # true differences, in margins
NOISE = (1.0, 2.0)
COUNTS = np.array([[len(seeds) for seeds in SEEDS.values()]] * len(PAPER_OPTIMIZERS))
FLOOR = 2.0  # nats; E of C14's simulated law, which two sizes cannot tell


# --------------------------------------------------------------------------------------------------- noise of laptop


def laptop_values(folder: Path = paths.RESULTS / "laptop") -> dict[str, pd.DataFrame]:
    """What the rules read, from the tables of the exploratory study: size, optimizer, seed and `value` of each."""
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("runs", "ptq", "outliers", "propagation")}
    runs, keys = tables["runs"], ["size", "optimizer", "seed"]
    runs = runs[runs["status"] == "finished"]
    main = runs[runs["purpose"].str.contains("full_precision")]
    qat = runs[runs["purpose"] == "qat"]
    pairs = main.merge(qat, on=keys, suffixes=("", "_qat"))

    def measured(name: str, query: str, column: str) -> pd.DataFrame:
        values = tables[name].query(query).groupby("run")[column].mean()
        return main.assign(value=np.log(main["run"].map(values)))

    return {
        "loss": main.assign(value=main["val_loss"]),
        "qat_loss": qat.assign(value=qat["val_loss"]),
        "drop": pairs.assign(value=100 * (pairs["val_loss_qat"] - pairs["val_loss"]) / pairs["val_loss"]),
        # the format with the head was measured at few checkpoints; without it the spread is known at all
        "increase": measured("ptq", "checkpoint == 'common' and spec == 'W4A4'", "increase"),
        "mmr": measured("outliers", "checkpoint == 'final' and kind != 'down'", "mmr"),
        "gain": measured(
            "propagation",
            "checkpoint == 'common' and attention == 'open' and kind == 'linear' and name != 'head'",
            "gain",
        ),
    }


def spreads(values: pd.DataFrame) -> np.ndarray:
    """Standard deviation over seeds of every optimizer (O,), pooled over sizes."""
    groups = values.dropna(subset=["value"]).groupby(["optimizer", "size"])["value"].agg(["var", "count"]).dropna()
    squares = (groups["var"] * (groups["count"] - 1)).groupby("optimizer").sum()
    return np.sqrt(squares / (groups["count"] - 1).groupby("optimizer").sum())[list(PAPER_OPTIMIZERS)].to_numpy()


def sweep_residual(folder: Path = paths.RESULTS / "laptop") -> float:
    """Spread of log MMR about its line on log rate, the median over optimizers of the exploratory sweep."""
    runs, inputs = pd.read_csv(folder / "runs.csv"), pd.read_csv(folder / "outliers.csv")
    mmr = inputs.query("checkpoint == 'final' and kind != 'down'").groupby("run").mmr.mean()
    swept = runs[runs["purpose"].str.contains("sweep") & (runs["status"] == "finished")]
    swept = swept.assign(y=np.log(swept["run"].map(mmr)), x=np.log(swept["lr"])).dropna(subset=["y"])
    found = []
    for _, rows in swept.groupby("optimizer"):
        groups = [(part.x, part.y) for _, part in rows.groupby(["size", "seed"])]
        slope, rest = common_slope(groups)[0], 0.0
        for x, y in groups:
            rest += (((y - y.mean()) - slope * (x - x.mean())) ** 2).sum()
        found.append(np.sqrt(rest / (len(rows) - len(groups) - 1)))
    return float(np.median(found))


# ------------------------------------------------------------------------------------------------------ the drawing


def draw(means: np.ndarray, spread: np.ndarray, draws: int, rng: np.random.Generator) -> Cells:
    """`draws` studies: means (O,), the same at all sizes, or (O, S), and standard deviations (O,)."""
    means = np.broadcast_to(means if means.ndim == 2 else means[:, None], COUNTS.shape)
    deviation = np.broadcast_to(spread[:, None], COUNTS.shape)
    mean = means + deviation / np.sqrt(COUNTS) * rng.standard_normal((draws, *COUNTS.shape))
    variance = deviation**2 * rng.chisquare(COUNTS - 1, (draws, *COUNTS.shape)) / (COUNTS - 1)
    return Cells(PAPER_OPTIMIZERS, tuple(SEEDS), mean, variance, COUNTS)


def rates(verdicts: np.ndarray) -> dict[str, float]:
    return {verdict.replace(" ", "_"): float((verdicts == verdict).mean()) for verdict in VERDICTS} | {
        "draws": len(verdicts)
    }


def extreme_rows(claim: str, unit: str, half: dict, spread: np.ndarray, draws: int, rng, factors=FACTORS) -> list[dict]:
    """One row a configuration of true means; "far" rivals lie where no seed brings them back."""
    sign, who = sign_of(half["side"]), [PAPER_OPTIMIZERS.index(name) for name in half["who"]]
    rivals = [i for i in range(len(PAPER_OPTIMIZERS)) if i not in who]
    pairs = [(PAPER_OPTIMIZERS[i], PAPER_OPTIMIZERS[j]) for i in who for j in rivals]
    noisy, far = max(rivals, key=lambda i: spread[i]), 50 * spread.max() + 10 * half["margin"]

    def row(configuration: str, behind: np.ndarray, difference: float) -> dict:
        found = contrast(draw(sign * behind, spread, draws, rng), pairs)
        truth = np.array([sign * (behind[i] - behind[j]) for i in who for j in rivals])
        low, high = found.interval(USUAL)
        said = {
            "configuration": configuration,
            "difference": difference,
            "coverage": ((low <= truth) & (truth <= high)).mean(),
        }
        return {"claim": claim, "part": half["name"], "unit": unit, **said} | rates(
            judge_extreme(found, half["side"], half["margin"])[0]
        )

    def tied(rival: int, by: float) -> np.ndarray:
        behind = np.full(len(PAPER_OPTIMIZERS), far)
        behind[who], behind[who[0]], behind[rival] = -far * (len(who) > 1), 0.0, by
        return behind

    rows = [row("all equal", np.zeros(len(PAPER_OPTIMIZERS)), 0.0)]
    # the rival most often passed in error; drawn anew, since the largest of five rates is too large
    worst = max(rivals, key=lambda j: row("", tied(j, 0.0), 0.0)["reproduced"])
    rows.append(row("tied with one, others far", tied(worst, 0.0), 0.0))
    for factor in factors:
        ahead = np.where(np.isin(np.arange(len(PAPER_OPTIMIZERS)), who), 0.0, factor * half["margin"])
        rows.append(row("ahead of all", ahead, factor * half["margin"]))
        rows.append(row("behind one, others far", tied(noisy, -factor * half["margin"]), -factor * half["margin"]))
    return rows


def reversal_rows(full: np.ndarray, qat: np.ndarray, draws: int, rng, differences=(0.01, 0.02, 0.04)) -> list[dict]:
    """C12: the first optimizer leads in full precision; a rival is behind by d there and ahead by d under QAT."""
    count, comparisons = len(PAPER_OPTIMIZERS), (len(PAPER_OPTIMIZERS) - 1) * len(SEEDS)

    def row(configuration: str, means: tuple[np.ndarray, np.ndarray], difference: float) -> dict:
        studies = [draw(m, s, draws, rng) for m, s in zip(means, (full, qat), strict=True)]
        parts = np.stack([judge_reversal(*(s.one_size(size) for s in studies), comparisons)[0] for size in SEEDS])
        verdicts = decide((parts == REPRODUCED).any(0), (parts == NOT_REPRODUCED).all(0))
        return {
            "claim": "C12", "part": "whole", "unit": "nats", "configuration": configuration, "difference": difference
        } | rates(verdicts)  # fmt: skip

    one = np.eye(count)[0]
    rows = [row("all equal", (np.zeros(count), np.zeros(count)), 0.0)]
    for d in differences:
        rows.append(row("leads in full precision, tied under QAT", (-d * one, np.zeros(count)), d))
        rows.append(row("leads by d in both", (-d * one, -d * one), d))
        rows.append(row("leads by d, a rival leads by d under QAT", (-d * one, -d * np.eye(count)[1]), d))
    return rows


def prediction_rows(rules: dict, draws: int, rng, truths=(-0.9, -0.6, 0.0, 0.3, 0.6, 0.8, 0.9, 0.95)) -> list[dict]:
    """C6 (one metric) and C7: six optimizers from a bivariate normal population, spread over seeds negligible."""
    rows = []
    for claim in ("C6", "C7"):
        for truth in truths:
            x, rest = rng.standard_normal((2, draws, len(PAPER_OPTIMIZERS)))
            y = truth * x + np.sqrt(1 - truth**2) * rest
            r = pearson(x, y)
            verdicts = judge_prediction(r, leave_one_out(x, y), r, r, rules[claim])
            said = {"claim": claim, "part": "one metric", "unit": "population correlation", "difference": truth}
            rows.append(said | {"configuration": "correlated"} | rates(verdicts))
    return rows


def slope_rows(
    residual: float, draws: int, rng, slopes=(0.0, 0.05, 0.1, 0.2, 0.3), rates_a_line: int = 5
) -> list[dict]:
    """C2: all optimizers with the same slope, five rates at every size."""
    x, rows = np.log(2.0) * np.arange(rates_a_line), []
    for slope in slopes:
        verdicts = []
        for _ in range(draws):
            parts = []
            for _ in PAPER_OPTIMIZERS:
                groups = [(x, slope * x + residual * rng.standard_normal(len(x))) for _ in SEEDS]
                parts.append(str(decide(common_slope(groups)[1] > 0, common_slope(groups, STRICT)[2] < 0)))
            verdicts.append(whole(parts))
        said = {"claim": "C2", "part": "whole", "unit": "log MMR per log rate", "difference": slope}
        rows.append(said | {"configuration": "all slopes equal"} | rates(np.array(verdicts)))
    return rows


def efficiency_rows(values: dict, rules: dict, noise: float, studies: int, rng, draws: int = 200) -> list[dict]:
    """C14 by the whole fit, on fewer studies; the law goes through laptop's mean losses with E = FLOOR."""
    runs, qat = values["loss"], values["qat_loss"]
    mean, after = (table.groupby("n_parameters")["value"].mean() for table in (runs, qat))
    alpha = -np.polyfit(np.log(mean.index), np.log(mean - FLOOR), 1)[0]
    scale = float(np.exp((np.log(mean - FLOOR) + alpha * np.log(mean.index)).mean()))
    rho = float(np.exp((np.log(scale / (after - FLOOR)) / alpha - np.log(after.index)).mean()))
    spread = {16: noise * spreads(runs), 4: noise * spreads(qat)}
    n_parameters = dict(zip(SEEDS, [*mean.index, mean.index[-1] ** 2 / mean.index[0] * 0.84], strict=True))
    margin = rules["C14"]["half"][0]["margin"]
    rule, rows = {"C14": {**rules["C14"], "draws": draws}}, []
    others = [name for name in PAPER_OPTIMIZERS if name != "shampoo"]
    configurations = [  # effects on log rho
        ("all equal", 0.0, {}),
        ("tied with one, others far", 0.0, {name: -0.4 for name in others[1:]}),
        ("ahead of all", margin, {"shampoo": margin}),
        ("ahead of all", 2 * margin, {"shampoo": 2 * margin}),
    ]
    for configuration, difference, effects in configurations:
        verdicts = []
        for _ in range(studies):
            table = [
                (size, name, seed, count, bits, scale / (count * (1.0 if bits == 16 else own)) ** alpha + FLOOR + error)
                for i, name in enumerate(PAPER_OPTIMIZERS)
                for own in [rho * np.exp(effects.get(name, 0.0))]
                for size, count in n_parameters.items()
                for seed in SEEDS[size]
                for bits in (16, 4)
                for error in [spread[bits][i] * rng.standard_normal()]
            ]
            table = pd.DataFrame(table, columns=["size", "optimizer", "seed", "N", "bits", "loss"])
            verdicts.append(evaluate({"scaling": table}, rule, PAPER_OPTIMIZERS)["verdict"].iloc[0])
        said = {"claim": "C14", "part": "Shampoo highest", "unit": "log rho", "difference": difference}
        rows.append(said | {"configuration": configuration} | rates(np.array(verdicts)))
    return rows


def simulate(draws: int, studies: int, noises=NOISE, seed: int = 0) -> pd.DataFrame:
    """One row a claim, part, noise (1: as at laptop) and configuration, with the share of every verdict."""
    rules = tomllib.loads((paths.DATA / "claims-confirm.toml").read_text())
    values, rng, rows = laptop_values(), np.random.default_rng(seed), []
    for noise in noises:
        of_noise = []
        for claim, rule in rules.items():
            if rule["kind"] == "extreme":
                for half in rule["half"]:
                    of_noise += extreme_rows(
                        claim, rule["unit"], half, noise * spreads(values[rule["value"]]), draws, rng
                    )
        of_noise += slope_rows(noise * sweep_residual(), max(1, draws // 10), rng)
        of_noise += reversal_rows(noise * spreads(values["loss"]), noise * spreads(values["qat_loss"]), draws, rng)
        if studies and noise == 1.0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", IdentificationWarning)
                of_noise += efficiency_rows(values, rules, noise, studies, rng)
        rows += [{**row, "noise": noise} for row in of_noise]
    rows += [{**row, "noise": np.nan} for row in prediction_rows(rules, draws, rng)]
    order = ["claim", "part", "noise", "configuration", "difference", "unit", *rates(np.array([""])), "coverage"]
    table = pd.DataFrame(rows)[order]
    return table.sort_values("claim", key=lambda names: names.str[1:].astype(int), kind="stable", ignore_index=True)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=4000, help="simulated studies a configuration")
    parser.add_argument(
        "--studies", type=int, default=30, help="the same for C14, which needs fits, at the plain noise alone; 0: none"
    )
    parser.add_argument("--output", type=Path, default=paths.RESULTS / "rules_power.csv")
    given = parser.parse_args(arguments)
    table = simulate(given.draws, given.studies)
    table.to_csv(given.output, index=False, float_format="%.4g")
    return table


if __name__ == "__main__":
    print(main().to_string())
