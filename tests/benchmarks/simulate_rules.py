"""Power, rates of error and coverage of the rules in data/claims.toml, from simulated studies of `confirm2`'s design.

    python tests/benchmarks/simulate_rules.py     writes data/results/rules_power.csv (about ten minutes on one core)

Seeds are normal with the standard deviations that scale `confirm` had within size and optimizer, pooled over sizes. A
cell of n seeds is drawn by its mean and its variance, which are independent: N(mu, s^2 / n) and s^2 chi^2(n - 1) / (n
- 1).

Tuning is simulated, too. Loss is a bowl in the two log2 rates, of a curvature as `confirm`'s searches had; damage,
gain and MMR change by a slope per doubling. At 0.08M a grid of 8 x 4 rates is tried with one seed, the best four with
three more; at the larger sizes a cross of five about a choice that may lie one step off, with two seeds. The smallest
matrix rate within the tolerance of the best mean is chosen, and the main runs have its true loss and damage: an error
that an interval must know. A contrast is covered when its interval holds the difference of the optimizers at their
true best rates.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims import readings, rules
from beyond_outliers.claims.estimates import PAPER_OPTIMIZERS, Cells, cells, contrast, leave_one_out, pearson
from beyond_outliers.claims.rules import (
    CLAIMS,
    NOT_REPRODUCED,
    REPRODUCED,
    VERDICTS,
    Evidence,
    Finding,
    decide,
    judge_half,
    judge_prediction,
    judge_reversal,
)
from beyond_outliers.claims.verdicts import READ, read_rules, rule_file
from beyond_outliers.scaling import IdentificationWarning
from beyond_outliers.study import Study

SEEDS = {"0.08M": 12, "0.26M": 8, "0.54M": 4}  # of confirm2
SIZES = {"0.08M": 82_000, "0.26M": 262_000, "0.54M": 541_000}
COUNTS = np.array([list(SEEDS.values())] * len(PAPER_OPTIMIZERS))
FACTORS = (0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0)  # true differences, in margins
CURVATURE, VARIES = 0.036, 0.4  # nats per squared doubling of a rate (mean of confirm's lines), its spread in log
SLOPES = {"increase": 0.05, "gain": 0.03, "mmr": 0.04}  # of a logarithm per doubling of a rate: standard deviation
FLOOR = 2.0  # nats; E of C14's simulated law


def spreads() -> dict[str, np.ndarray]:
    """Standard deviation over seeds of every optimizer (O,) in scale `confirm`, of what the rules read."""
    study = Study("confirm")
    tables = {name: READ[name](study) for name in ("runs", "final", "common")}
    runs, common = tables["runs"], tables["common"].query("condition == 'with head'")
    drop = 100 * (runs.qat_loss - runs.loss) / runs.loss
    values = {
        "loss": runs.assign(value=runs.loss),
        "qat_loss": runs.assign(value=runs.qat_loss),
        "drop": runs.assign(value=drop),
        "mmr": tables["final"].assign(value=np.log(tables["final"].mmr)),
        **{name: common.assign(value=np.log(common[name])) for name in ("increase", "gain")},
    }
    sizes = list(study.protocol.sizes)
    found = {}
    for name, table in values.items():
        of = rules._pooled(cells(table, "value", PAPER_OPTIMIZERS, sizes))
        found[name] = np.sqrt([of[optimizer] for optimizer in PAPER_OPTIMIZERS])
    return found


# ------------------------------------------------------------------------------------------------------------ tuning


def tuned_study(noise: dict[str, np.ndarray], tolerance: float, rng) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The tuning runs of one study as the rules read them, and what the chosen rates cost: quantity -> (O, S)."""
    rows, cost = [], {name: np.zeros(COUNTS.shape) for name in ("loss", *SLOPES)}
    for o, optimizer in enumerate(PAPER_OPTIMIZERS):
        for s, size in enumerate(SIZES):
            curvature = CURVATURE * np.exp(VARIES * rng.standard_normal())
            slopes = {name: sd * rng.standard_normal(2) for name, sd in SLOPES.items()}
            best = rng.uniform([2.5, 1.0], [4.5, 2.0])  # where the bowl's bottom lies, in steps of the grid
            if s == 0:
                tried = [(x, y) for x in range(8) for y in range(4)]
            else:
                x, y = np.rint(best).astype(int) + rng.choice([-1, 0, 0, 0, 1], 2)
                tried = [(x, y), (x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)]

            def run(at, seed, o=o, size=size, optimizer=optimizer, curvature=curvature, slopes=slopes, best=best):
                away = np.array(at) - best
                true = {"loss": curvature * (away**2).sum()} | {n: slope @ away for n, slope in slopes.items()}
                seen = {n: value + noise[n][o] * rng.standard_normal() for n, value in true.items()}
                seen |= {n: np.exp(seen[n]) for n in SLOPES}
                names = {"size": size, "optimizer": optimizer, "seed": seed}
                return {**names, "lr": 2.0 ** at[0], "auxiliary": 2.0 ** at[1], **seen}, true

            found = {at: [run(at, seed) for seed in (300,) if s == 0] for at in tried}
            if s == 0:
                for at in sorted(tried, key=lambda at: found[at][0][0]["loss"])[:4]:
                    found[at] += [run(at, seed) for seed in (301, 302, 303)]
            else:
                found = {at: [run(at, seed) for seed in (300, 301)] for at in tried}
            means = {at: np.mean([seen["loss"] for seen, _ in runs]) for at, runs in found.items()}
            chosen = min(at for at, mean in means.items() if mean <= min(means.values()) + tolerance)
            for name, value in found[chosen][0][1].items():
                cost[name][o, s] = value
            rows += [seen for runs in found.values() for seen, _ in runs]
    return pd.DataFrame(rows), cost


def tunings(noise: dict, tolerance: float, studies: int, rng) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Quantity -> what the chosen rates cost, and the variance that the rules add for it; both (studies, O, S)."""
    costs, added = ({name: [] for name in ("loss", *SLOPES)} for _ in range(2))
    for _ in range(studies):
        sweep, cost = tuned_study(noise, tolerance, rng)
        losses = pd.DataFrame()
        for name in costs:  # the loss first
            log = name != "loss"
            main = [
                (size, optimizer, seed, np.exp(value) if log else value)
                for o, optimizer in enumerate(PAPER_OPTIMIZERS)
                for s, size in enumerate(SIZES)
                for seed, value in enumerate(cost[name][o, s] + noise[name][o] * rng.standard_normal(COUNTS[o, s]))
            ]
            runs = pd.DataFrame(main, columns=["size", "optimizer", "seed", name])
            losses = losses if log else runs
            data = Evidence({"runs": losses, "sweep": sweep}, PAPER_OPTIMIZERS, SIZES, tolerance=tolerance)
            costs[name].append(cost[name])
            added[name].append(data.cells(runs, name, log=log, tuning=name).tuning)
    return tuple({name: np.stack(parts) for name, parts in of.items()} for of in (costs, added))


# -------------------------------------------------------------------------------------------------------- draws, rates


def draw(means: np.ndarray, spread: np.ndarray, draws: int, rng, cost=None, added=None) -> Cells:
    """Studies with true means (O,) at every size; cost, added: of `tunings`, drawn with replacement."""
    n, s = COUNTS, spread[:, None]
    at = rng.integers(len(cost), size=draws) if cost is not None else None
    mean = means[:, None] + (0 if at is None else cost[at]) + s / np.sqrt(n) * rng.standard_normal((draws, *n.shape))
    variance = s**2 * rng.chisquare(n - 1, (draws, *n.shape)) / (n - 1)
    return Cells(PAPER_OPTIMIZERS, tuple(SIZES), mean, variance, n, 0.0 if added is None else added[at])


def rates(verdicts: np.ndarray) -> dict[str, float]:
    shares = {verdict.replace(" ", "_"): float((verdicts == verdict).mean()) for verdict in VERDICTS[:4]}
    return shares | {"draws": len(verdicts)}


def coverage(found: Cells, means: np.ndarray) -> float:
    """Share of all contrasts, over sizes and at each, whose 95 % interval holds the truth."""
    pairs = [(a, b) for i, a in enumerate(PAPER_OPTIMIZERS) for b in PAPER_OPTIMIZERS[i + 1 :]]
    truth = np.array([means[PAPER_OPTIMIZERS.index(a)] - means[PAPER_OPTIMIZERS.index(b)] for a, b in pairs])
    shares = []
    for of in (found, *(found.at(size) for size in found.sizes)):
        low, high = contrast(of, pairs).interval()
        shares.append(((low <= truth) & (truth <= high)).mean())
    return float(min(shares))


def extreme_rows(claim: str, unit: str, half: dict, spread, draws: int, rng, cost, added) -> list[dict]:
    """One half of C1, C3, C4, C5, C11 or C13: X lies beyond all rivals by d, or behind one of them by d."""
    sign, margin = {"lowest": -1, "highest": 1}[half["side"]], half["margin"]
    x = np.isin(PAPER_OPTIMIZERS, half["who"])
    one = np.zeros(len(x))
    one[np.flatnonzero(~x)[0]] = 1.0
    shapes = {"all equal": ([0.0], lambda d: np.zeros(len(x))), "ahead of all": (FACTORS, lambda d: sign * d * x)}
    shapes["tied with one, others far"] = ([0.0], lambda d: sign * 12 * margin * (x + one))
    shapes["behind one, others far"] = (FACTORS, lambda d: sign * (12 * margin * (x + one) + d * one))
    rows = []
    for configuration, (factors, means) in shapes.items():
        for factor in factors:
            truth = means(factor * margin)
            found = draw(truth, spread, draws, rng, cost, added)
            said = {"claim": claim, "part": half["name"], "unit": unit, "configuration": configuration}
            rows.append(said | {"difference": factor * margin} | rates(judge_half(found, half)[0]))
            rows[-1] |= {"coverage": coverage(found, truth)}
            if configuration == "all equal":  # what intervals would cover that know seeds alone
                bare = Cells(found.optimizers, found.sizes, found.mean, found.variance, found.n)
                rows[-1] |= {"coverage_of_seeds_alone": coverage(bare, truth)}
    return rows


def reversal_rows(noise: dict, cost, added, draws: int, rng, differences=(0.02, 0.04, 0.06, 0.1)) -> list[dict]:
    """C12: the best in full precision leads by d there; under QAT all are equal, the order stays, or it turns."""
    count = len(PAPER_OPTIMIZERS)
    comparisons = (count - 1) * len(SEEDS)

    def row(configuration: str, means, difference: float) -> dict:
        studies = [
            draw(m, noise[of], draws, rng, cost, added) for m, of in zip(means, ("loss", "qat_loss"), strict=True)
        ]
        parts = np.stack([judge_reversal(*(s.at(size) for s in studies), comparisons)[0] for size in SEEDS])
        verdicts = decide((parts == REPRODUCED).any(0), (parts == NOT_REPRODUCED).all(0))
        said = {
            "claim": "C12",
            "part": "whole",
            "unit": "nats",
            "configuration": configuration,
            "difference": difference,
        }
        return said | rates(verdicts)

    one = np.eye(count)[0]
    rows = [row("all equal", (np.zeros(count), np.zeros(count)), 0.0)]
    for d in differences:
        rows.append(row("leads in full precision, tied under QAT", (-d * one, np.zeros(count)), d))
        rows.append(row("leads by d in both", (-d * one, -d * one), d))
        rows.append(row("leads by d, a rival leads by d under QAT", (-d * one, -d * np.eye(count)[1]), d))
    return rows


def prediction_rows(book: dict, draws: int, rng, truths=(-0.6, 0.0, 0.3, 0.6, 0.8, 0.9, 0.95)) -> list[dict]:
    """C6 (one metric) and C7, of six points and of twelve: a bivariate normal population, seeds negligible."""
    rows = []
    for claim, points in (("C6", 6), ("C7", 6), ("C7", 12)):
        for truth in truths:
            x, rest = rng.standard_normal((2, draws, points))
            y = truth * x + np.sqrt(1 - truth**2) * rest
            r = pearson(x, y)
            verdicts = judge_prediction(r, leave_one_out(x, y), r, r, book[claim])
            said = {"claim": claim, "part": f"one metric, {points} points", "unit": "population correlation"}
            rows.append(said | {"configuration": "correlated", "difference": truth} | rates(verdicts))
    return rows


def slope_rows(book: dict, residual: float, studies: int, rng, slopes=(0.0, 0.02, 0.03, 0.05, 0.1)) -> list[dict]:
    """C2: all optimizers with one slope; 8 rates x 4 auxiliary rates at 0.08M, three rates with two seeds beyond."""
    lines = [("0.08M", 300, j, i) for j in range(4) for i in range(8)]
    lines += [(size, seed, 0, i) for size in ("0.26M", "0.54M") for seed in (300, 301) for i in range(3)]
    table = pd.DataFrame(
        [(name, *line) for name in PAPER_OPTIMIZERS for line in lines],
        columns=["optimizer", "size", "seed", "auxiliary", "step"],
    ).assign(lr=lambda t: 2.0**t.step)
    rows = []
    for slope in slopes:
        verdicts = []
        for _ in range(studies):
            noisy = table.assign(mmr=np.exp(slope * np.log(table.lr) + residual * rng.standard_normal(len(table))))
            data = Evidence({"sweep": noisy}, PAPER_OPTIMIZERS, SIZES)
            verdicts.append(CLAIMS["C2"](data, book["C2"])[0].verdict)
        said = {"claim": "C2", "part": "whole", "unit": book["C2"]["unit"], "difference": slope}
        rows.append(said | {"configuration": "all slopes equal"} | rates(np.array(verdicts)))
    return rows


def efficiency_rows(noise: dict, book: dict, studies: int, rng, draws: int = 200) -> list[dict]:
    """C14 by the whole fit, on fewer studies; the law goes through confirm's mean losses with E = FLOOR."""
    runs = readings.scaling_runs(Study("confirm"))
    mean, after = (runs[runs.bits == bits].groupby("N").loss.mean() for bits in (16, 4))
    alpha = -np.polyfit(np.log(mean.index), np.log(mean - FLOOR), 1)[0]
    scale = float(np.exp((np.log(mean - FLOOR) + alpha * np.log(mean.index)).mean()))
    rho = float(np.exp((np.log(scale / (after - FLOOR)) / alpha - np.log(after.index)).mean()))

    def loss(n: float) -> float:
        return scale / n**alpha + FLOOR

    margin, rule, rows = book["C14"]["half"][0]["margin"], {**book["C14"], "draws": draws}, []
    others = [name for name in PAPER_OPTIMIZERS if name != "shampoo"]
    configurations = [  # effects on log rho
        ("all equal", 0.0, {}),
        ("tied with one, others far", 0.0, {name: -0.4 for name in others[1:]}),
        *(("ahead of all", factor * margin, {"shampoo": factor * margin}) for factor in (1, 2, 4)),
    ]
    for configuration, difference, effects in configurations:
        verdicts = []
        worth = {bits: {name: 1.0 if bits == 16 else rho * np.exp(effects.get(name, 0.0)) for name in PAPER_OPTIMIZERS}
                 for bits in (16, 4)}  # fmt: skip
        for _ in range(studies):
            table = [
                (size, name, seed, n, bits, loss(n * worth[bits][name]) + sd[i] * rng.standard_normal())
                for bits, sd in ((16, noise["loss"]), (4, noise["qat_loss"]))
                for i, name in enumerate(PAPER_OPTIMIZERS)
                for size, n in SIZES.items()
                for seed in range(SEEDS[size])
            ]
            table = pd.DataFrame(table, columns=["size", "optimizer", "seed", "N", "bits", "loss"])
            try:
                found = CLAIMS["C14"](Evidence({"scaling": table}, PAPER_OPTIMIZERS, SIZES), rule)
            except rules.Open as reason:
                found = [Finding(reason.verdict, str(reason))]
            verdicts.append(found[0].verdict)
        said = {"claim": "C14", "part": "Shampoo highest", "unit": "log rho", "difference": difference}
        rows.append(said | {"configuration": configuration} | rates(np.array(verdicts)))
    return rows


QUANTITIES = {"C1": "loss", "C3": "mmr", "C4": "increase", "C5": "increase", "C11": "gain", "C13": "drop"}


def simulate(draws: int, studies: int, fits: int, seed: int = 0) -> pd.DataFrame:
    """One row a claim, part, tuning (none: every rate is the best one and nothing is added) and configuration."""
    book, tolerance = read_rules(), rule_file()["study"]["tolerance"]
    noise, rng, rows = spreads(), np.random.default_rng(seed), []
    costs, added = tunings(noise, tolerance, studies, rng)
    percent = 100 / 3.0  # of a loss of 3 nats
    costs["drop"], added["drop"] = percent * costs["loss"], percent**2 * added["loss"]
    for tuning in (True, False):
        of_tuning = []
        for claim, name in QUANTITIES.items():
            cost, more = (costs[name], added[name]) if tuning else (None, None)
            for half in book[claim]["half"]:
                of_tuning += extreme_rows(claim, book[claim]["unit"], half, noise[name], draws, rng, cost, more)
        cost, more = (costs["loss"], added["loss"]) if tuning else (None, None)
        of_tuning += reversal_rows(noise, cost, more, draws, rng)
        rows += [{**row, "tuning": "searched" if tuning else "none"} for row in of_tuning]
    other = [*slope_rows(book, 0.05, max(1, draws // 20), rng), *prediction_rows(book, draws, rng)]
    if fits:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IdentificationWarning)
            other += efficiency_rows(noise, book, fits, rng)
    rows += [{**row, "tuning": ""} for row in other]
    order = ["claim", "part", "tuning", "configuration", "difference", "unit", *rates(np.array([""]))]
    table = pd.DataFrame(rows)[[*order, "coverage", "coverage_of_seeds_alone"]]
    return table.sort_values("claim", key=lambda names: names.str[1:].astype(int), kind="stable", ignore_index=True)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=4000, help="simulated studies a configuration")
    parser.add_argument("--studies", type=int, default=300, help="simulated tunings that these draw from")
    parser.add_argument("--fits", type=int, default=30, help="simulated studies of C14, which needs fits; 0: none")
    parser.add_argument("--output", type=Path, default=paths.RESULTS / "rules_power.csv")
    given = parser.parse_args(arguments)
    table = simulate(given.draws, given.studies, given.fits)
    table.to_csv(given.output, index=False, float_format="%.4g")
    return table


if __name__ == "__main__":
    print(main().to_string())
