"""The confirmatory rules: closed forms, every verdict of every rule on constructed data, what must not count."""

import importlib.util
import tomllib
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from beyond_outliers import paths
from beyond_outliers.claims import confirm_rules
from beyond_outliers.claims.confirm_prediction import judge_prediction, leave_one_out, pearson
from beyond_outliers.claims.confirm_rules import PAPER_OPTIMIZERS, PAPER_THREE, SEEDS, eligible, evaluate, evaluate_sets
from beyond_outliers.claims.contrasts import cells, common_slope, contrast, exists, t_interval, whole
from beyond_outliers.scaling import fit_shared, log_rho_draws

RULES = tomllib.loads((paths.DATA / "claims-confirm.toml").read_text())
N = {"0.08M": 82216, "0.16M": 160272, "0.26M": 262336}
VERDICTS = ("reproduced", "not reproduced", "tie", "undecided")


def design(optimizers=PAPER_OPTIMIZERS) -> pd.DataFrame:
    rows = [(size, name, seed) for size, seeds in SEEDS.items() for seed in seeds for name in optimizers]
    return pd.DataFrame(rows, columns=["size", "optimizer", "seed"])


def values(means: dict[str, float], spread: float = 0.01, other: float = 0.0, seed: int = 0) -> np.ndarray:
    """Of every planned run: its optimizer's mean (`other` where it has none) and noise whose mean in a cell is 0."""
    rows, rng = design(), np.random.default_rng(seed)
    noise = (
        pd.Series(rng.standard_normal(len(rows)))
        .groupby([rows["size"], rows["optimizer"]])
        .transform(lambda v: (v - v.mean()) / v.std())
    )
    return (rows["optimizer"].map(means).fillna(other) + spread * noise).to_numpy()


def judged(claim: str, reading: pd.DataFrame, optimizers=PAPER_OPTIMIZERS, rule: dict | None = None) -> pd.DataFrame:
    found = evaluate({RULES[claim]["reading"]: reading}, {claim: RULES[claim] | (rule or {})}, optimizers)
    return found.set_index("part")


def common(**columns) -> pd.DataFrame:
    filled = {name: 1.0 for name in ("increase", "mmr", "kurtosis", "R_L", "gain")}
    return design().assign(**(filled | columns))


# ------------------------------------------------------------------------------------------------------ closed forms


def test_one_size_is_welchs_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(3, 1, 10), rng.normal(2, 3, 6)
    table = pd.DataFrame({"size": "s", "optimizer": ["a"] * 10 + ["b"] * 6, "seed": [*range(10), *range(6)]})
    found = contrast(cells(table.assign(v=np.r_[a, b]), "v", ("a", "b"), ("s",)), [("a", "b")])
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert found.dof[0] == pytest.approx(welch.df)
    for confidence in (0.95, 0.99):
        low, high = found.interval(confidence)
        assert (low[0], high[0]) == pytest.approx(tuple(welch.confidence_interval(confidence)))


def test_sizes_add_up_by_hand():
    rng = np.random.default_rng(1)
    table = design().assign(v=rng.normal(size=len(design())))
    found = contrast(cells(table, "v", PAPER_OPTIMIZERS, tuple(SEEDS)), [("muon", "soap")])
    differences, parts = [], []
    for size in SEEDS:
        own, other = (table[(table["size"] == size) & (table.optimizer == name)].v for name in ("muon", "soap"))
        differences.append(own.mean() - other.mean())
        parts += [(v.var() / len(v) / 9, len(v) - 1) for v in (own, other)]
    variance = sum(part for part, _ in parts)
    assert found.estimate[0] == pytest.approx(np.mean(differences))
    assert found.error[0] == pytest.approx(np.sqrt(variance))
    assert found.dof[0] == pytest.approx(variance**2 / sum(part**2 / dof for part, dof in parts))


def test_a_shift_of_one_size_changes_no_contrast():
    table = design().assign(v=np.random.default_rng(2).normal(size=len(design())))
    shifted = table.assign(v=table.v + table["size"].map({"0.08M": 5.0, "0.16M": -3.0, "0.26M": 0.0}))
    pairs = [("muon", name) for name in PAPER_OPTIMIZERS if name != "muon"]
    before, after = (contrast(cells(t, "v", PAPER_OPTIMIZERS, tuple(SEEDS)), pairs) for t in (table, shifted))
    for name in ("estimate", "error", "dof"):
        np.testing.assert_allclose(getattr(before, name), getattr(after, name), rtol=1e-9)


def test_t_interval_and_slope_agree_with_scipy():
    rng = np.random.default_rng(3)
    sample = rng.normal(size=6)
    low, high = stats.ttest_1samp(sample, 0).confidence_interval(0.95)
    assert t_interval(sample) == pytest.approx((sample.mean(), low, high))
    x, y = rng.normal(size=(2, 7))
    line = stats.linregress(x, y)
    half = line.stderr * stats.t.ppf(0.995, 5)
    assert common_slope([(x, y)], 0.99) == pytest.approx((line.slope, line.slope - half, line.slope + half))


def test_slope_common_to_groups_is_ordinary_least_squares_with_intercepts():
    rng = np.random.default_rng(4)
    groups = [(rng.normal(size=n), rng.normal(size=n) + 3 * n) for n in (4, 5, 6)]
    x, y = (np.concatenate([group[i] for group in groups]) for i in (0, 1))
    matrix = np.column_stack([x, *(np.repeat(np.eye(3)[i], [4, 5, 6]) for i in range(3))])
    beta, rest, *_ = np.linalg.lstsq(matrix, y, rcond=None)
    error = np.sqrt(rest[0] / (15 - 4) * np.linalg.inv(matrix.T @ matrix)[0, 0])
    half = error * stats.t.ppf(0.975, 11)
    assert common_slope(groups) == pytest.approx((beta[0], beta[0] - half, beta[0] + half))
    assert np.isnan(common_slope([])).all() and np.isnan(common_slope([([1.0, 2.0], [1.0, 3.0])])).all()


def test_correlation_without_one_agrees_with_scipy():
    x, y = np.random.default_rng(5).normal(size=(2, 6))
    expected = [stats.pearsonr(np.delete(x, i), np.delete(y, i)).statistic for i in range(6)]
    np.testing.assert_allclose(leave_one_out(x, y), expected)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)


def test_critical_values_of_six_points():
    t = stats.t.ppf(0.975, 4)
    assert RULES["C7"]["predicts"] == pytest.approx(t / np.sqrt(4 + t * t), abs=5e-4)
    upper = np.tanh(np.arctanh(RULES["C7"]["silent"]) + stats.norm.ppf(0.95) / np.sqrt(3))
    assert upper == pytest.approx(0.82, abs=0.01)


# ------------------------------------------------------------------------------------- every rule, each of its verdicts

EXTREMES = [
    (claim, place, half["side"])
    for claim in ("C1", "C3", "C4", "C5", "C11", "C13")
    for place, half in enumerate(RULES[claim]["half"])
]


def extreme_reading(claim: str, effects: dict[str, float], spread: float) -> pd.DataFrame:
    judged_values = values(effects, spread)
    if claim == "C1":
        return design().assign(loss=3 + judged_values, qat_loss=np.nan)
    if claim == "C13":
        return design().assign(loss=3.0, qat_loss=3 * (1 + (5 + judged_values) / 100))
    if claim == "C3":
        return design().assign(mmr=np.exp(judged_values))
    return common(**{RULES[claim]["value"]: np.exp(judged_values)})


@pytest.mark.parametrize(("claim", "place", "side"), EXTREMES)
@pytest.mark.parametrize("optimizers", [PAPER_OPTIMIZERS, PAPER_THREE])
def test_extremes_reach_every_verdict(claim, place, side, optimizers):
    half = RULES[claim]["half"][place]
    margin, sign = half["margin"], 1 if side == "lowest" else -1
    rival = next(name for name in PAPER_THREE if name not in half["who"])

    def of(effect_of_who: float, effect_of_rival: float, spread: float) -> tuple[str, pd.Series]:
        effects = {name: sign * effect_of_who * margin for name in half["who"]} | {
            rival: sign * effect_of_rival * margin
        }
        found = judged(
            claim,
            extreme_reading(claim, {**dict.fromkeys(PAPER_OPTIMIZERS, 0.0), **effects}, spread * margin),
            optimizers,
        )
        row = found.loc[half["name"] if half["name"] in found.index else "whole"]
        return row.verdict, row

    assert of(-3, 0, 0.5)[0] == "reproduced"
    verdict, row = of(-3, -6, 0.5)
    assert verdict == "not reproduced" and row.rival.startswith(rival)
    assert row.estimate == pytest.approx(sign * 3 * margin, rel=0.05) and row.n == "10/10/6"
    assert of(0, 0, 0.5)[0] == "tie"
    assert of(-1, 0, 8)[0] == "undecided"
    verdict, row = of(-0.9, 0, 0.05)  # certain and small: a difference, and said to be small
    assert verdict == "reproduced" and "less than the margin" in row.comment


def test_the_strict_level_guards_not_reproduced():
    """A rival ahead at 95 % but not at 99 % leaves the claim open."""
    reading = extreme_reading("C1", {"soap": -0.02, "muon": 0.0}, 0.0265)
    row = judged("C1", reading).loc["whole"]
    assert row.low > 0 > row.low_99 and row.verdict == "undecided"


def test_two_halves_make_a_whole():
    assert whole(["reproduced", "reproduced"]) == "reproduced"
    assert whole(["reproduced", "tie"]) == "tie"
    assert whole(["tie", "undecided"]) == "undecided"
    assert whole(["reproduced", "not reproduced"]) == whole(["undecided", "not reproduced"]) == "not reproduced"
    assert (
        exists(["undecided", "reproduced"]) == "reproduced" and exists(["not reproduced", "undecided"]) == "undecided"
    )
    assert exists(["not reproduced"] * 3) == "not reproduced"
    reading = extreme_reading("C3", {"muon": -1.0, "shampoo": -0.5}, 0.05)
    found = judged("C3", reading).verdict
    assert found.to_dict() == {
        "whole": "not reproduced",
        "Muon lowest": "reproduced",
        "Shampoo highest": "not reproduced",
    }


def sweep(slopes: dict[str, float], spread: float) -> pd.DataFrame:
    rng, parts = np.random.default_rng(0), []
    for size in SEEDS:
        for name in PAPER_OPTIMIZERS:
            lr = 0.01 * 2.0 ** np.arange(5)
            mmr = np.exp(slopes.get(name, 0.3) * np.log(lr) + spread * rng.standard_normal(5))
            parts.append(pd.DataFrame({"size": size, "optimizer": name, "seed": 100, "lr": lr, "mmr": mmr}))
    return pd.concat(parts)


def test_slopes_reach_every_verdict():
    assert judged("C2", sweep({}, 0.01)).verdict["whole"] == "reproduced"
    falling = judged("C2", sweep({"scion": -0.2}, 0.01))
    assert falling.verdict["whole"] == falling.verdict["scion"] == "not reproduced"
    assert falling.estimate["scion"] == pytest.approx(-0.2, abs=0.02)
    assert judged("C2", sweep(dict.fromkeys(PAPER_OPTIMIZERS, 0.0), 0.1)).verdict["whole"] == "undecided"
    assert judged("C2", sweep({"scion": -0.2}, 0.01), PAPER_THREE).verdict["whole"] == "reproduced"


def predictor_reading(x: list[float], y: list[float], metrics=("R_L",), spread: float = 0.02) -> pd.DataFrame:
    by_name = [dict(zip(PAPER_OPTIMIZERS, v, strict=True)) for v in (x, y)]
    metric = np.exp(values(by_name[0], spread))
    return common(increase=np.exp(values(by_name[1], spread, seed=1)), **dict.fromkeys(metrics, metric))


LINE, CROSS, ONE = [0, 1, 2, 3, 4, 5], [0, 0.3, -0.3, 0.3, -0.3, 0], [0, 0, 0, 0, 0, 9]


def test_correlations_reach_every_verdict():
    y = [0, 1.2, 1.8, 3.1, 4.0, 5.1]
    along = judged("C7", predictor_reading(LINE, y)).loc["whole"]
    assert along.verdict == "reproduced" and along.estimate == pytest.approx(np.corrcoef(LINE, y)[0, 1], abs=1e-9)
    assert judged("C7", predictor_reading(LINE, y[::-1])).verdict["whole"] == "not reproduced"
    assert judged("C7", predictor_reading(LINE, CROSS)).verdict["whole"] == "not reproduced"
    hanging = [v + 0.1 * w for v, w in zip(ONE, CROSS, strict=True)]  # r near 1, by one optimizer alone
    row = judged(
        "C7", predictor_reading([v + 0.1 * w for v, w in zip(ONE, [1, -1, -1, 1, 0, 0], strict=True)], hanging)
    )
    assert row.estimate["whole"] > 0.95 and row.verdict["whole"] == "undecided" and row.rival["whole"] == "soap"
    assert "cannot say" in row.comment["whole"]
    noisy = judged("C7", predictor_reading([0.01 * v for v in LINE], [0.01 * v for v in y], spread=0.2)).loc["whole"]
    assert noisy.estimate > 0.95 and noisy.low < 0.5 and noisy.verdict == "undecided"
    both = ("mmr", "kurtosis")
    assert judged("C6", predictor_reading(LINE, CROSS, both)).verdict["whole"] == "reproduced"
    assert judged("C6", predictor_reading(LINE, y[::-1], both)).verdict["whole"] == "reproduced"  # one-sided
    one_predicts = predictor_reading(LINE, y, ("mmr",)).assign(kurtosis=predictor_reading(CROSS, y).R_L)
    assert judged("C6", one_predicts).verdict["mmr"] == judged("C6", one_predicts).verdict["whole"] == "not reproduced"
    assert judged("C6", predictor_reading(LINE, [0, 3, 1, 2, 0, 4], both)).verdict["whole"] == "undecided"


def test_three_optimizers_cannot_say():
    found = judged("C7", predictor_reading(LINE, LINE), PAPER_THREE).loc["whole"]
    assert found.verdict == "undecided" and "3 optimizers cannot say" in found.comment


def test_sizes_alone_do_not_correlate():
    shift = np.log(design()["size"].map({"0.08M": 1.0, "0.16M": 30.0, "0.26M": 900.0}))
    plain = predictor_reading(LINE, CROSS)
    moved = plain.assign(R_L=plain.R_L * np.exp(shift), increase=plain.increase * np.exp(shift))
    assert judged("C7", plain).estimate["whole"] == pytest.approx(judged("C7", moved).estimate["whole"])


def test_prediction_rule_has_no_overlap():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 20000, 6))
    r, others = pearson(x, y), leave_one_out(x, y)
    c6, c7 = (judge_prediction(r, others, r, r, RULES[claim]) for claim in ("C6", "C7"))
    flipped = {"reproduced": "not reproduced", "not reproduced": "reproduced", "undecided": "undecided"}
    assert [flipped[v] for v in c6] == list(c7)
    assert np.mean(c7 == "reproduced") < 0.025  # uncorrelated: at most the one-sided level of r >= .811


def modules(shares: dict[str, float], count: int = 20) -> pd.DataFrame:
    """`count` modules that add error; the optimizer's share of them has A on top. Others add none."""
    parts = []
    for k in range(count):
        top = design()["optimizer"].map(shares).to_numpy() * count > k + 0.5
        parts.append(
            design().assign(name=f"m{k}", kind="linear", R_in=0.1, R=0.2, A=np.where(top, 0.2, 0.01), B=0.1, C=0.0)
        )
    none = design().assign(name="add", kind="residual add", R_in=0.1, R=0.1, A=0.1, B=0.0, C=0.0)
    first = design().assign(name="m_first", kind="linear", R_in=0.0, R=0.1, A=0.0, B=0.1, C=0.0)
    return pd.concat([*parts, none, none, none, first], ignore_index=True)


def test_shares_of_modules_reach_every_verdict():
    same = dict.fromkeys(PAPER_OPTIMIZERS, 0.95)
    row = judged("C8", modules(same | {"soap": 0.9})).loc["whole"]
    assert row.verdict == "reproduced" and row.estimate == pytest.approx(np.mean([0.95] * 5 + [0.9]))
    expected = t_interval([0.95] * 5 + [0.9])  # the unit is an optimizer, however many runs it has
    assert (row.low, row.high) == pytest.approx(expected[1:])
    assert judged("C8", modules(dict.fromkeys(same, 0.5))).verdict["whole"] == "not reproduced"
    assert judged("C8", modules(same | {"soap": 0.3, "muon": 0.5})).verdict["whole"] == "undecided"
    interaction = modules(same).assign(C=-0.3)  # A must exceed |C| too
    assert judged("C8", interaction).verdict["whole"] == "not reproduced"


def norms(shares: dict[str, float], count: int = 20) -> pd.DataFrame:
    parts = []
    for k in range(count):
        falls = design()["optimizer"].map(shares).to_numpy() * count > k + 0.5
        parts.append(design().assign(name=f"n{k}", kind="norm", R_in=0.1, R=np.where(falls, 0.05, 0.2)))
    parts.append(design().assign(name="final_norm", kind="norm", R_in=0.1, R=0.3))
    return pd.concat(parts, ignore_index=True).assign(A=0.1, B=0.0, C=0.0)


def test_shares_of_norms_reach_every_verdict_and_the_final_norm_stands_apart():
    row = judged("C9", norms(dict.fromkeys(PAPER_OPTIMIZERS, 1.0))).loc["whole"]
    assert row.verdict == "reproduced" and row.estimate == 1 and "apart: 0.00" in row.comment
    assert judged("C9", norms(dict.fromkeys(PAPER_OPTIMIZERS, 0.7))).verdict["whole"] == "not reproduced"
    mixed = dict.fromkeys(PAPER_OPTIMIZERS, 1.0) | {"soap": 0.5}
    assert judged("C9", norms(mixed)).verdict["whole"] == "undecided"


def layers(distances: dict[str, float], spread: float = 0.005) -> pd.DataFrame:
    parts = [design().assign(name=f"l{k}", spectral_ratio=1 + values(distances, spread, seed=k)) for k in range(3)]
    return pd.concat(parts, ignore_index=True)


def test_spectral_ratios_reach_every_verdict():
    near = dict.fromkeys(PAPER_OPTIMIZERS, 0.03)
    found = judged("C10", layers(near))
    assert found.verdict["whole"] == "reproduced" and found.estimate["muon"] == pytest.approx(0.03, abs=1e-3)
    assert "Largest" in found.comment["whole"]
    assert judged("C10", layers(near | {"psgd": 0.3})).verdict["whole"] == "not reproduced"
    assert judged("C10", layers(near | {"psgd": 0.1}, 0.02)).verdict["whole"] == "undecided"


def test_reversal_reaches_every_verdict():
    def verdicts(full: dict, qat: dict, spread: float = 0.01) -> pd.Series:
        reading = design().assign(loss=3 + values(full, spread, 0.2), qat_loss=3.5 + values(qat, spread, 0.2, seed=1))
        return judged("C12", reading).verdict

    swapped = verdicts({"muon": 0.0, "soap": 0.1}, {"muon": 0.1, "soap": 0.0})
    assert set(swapped) == {"reproduced"}
    assert set(verdicts({"muon": 0.0}, {"muon": 0.0})) == {"not reproduced"}
    assert verdicts({"muon": 0.0, "soap": 0.1}, {"muon": 0.1, "soap": 0.1}, 0.1)["whole"] == "undecided"
    # a tie in full precision that QAT breaks has no best that could lose its place
    assert verdicts({"muon": 0.0, "soap": 1e-4}, {"muon": 0.1, "soap": 0.0})["whole"] == "undecided"


def test_one_size_is_enough_for_a_reversal():
    rows, at = design(), design()["size"] == "0.16M"
    loss = 3 + values({"muon": 0.0}, 0.01, 0.2)
    qat = 3.5 + values({"muon": 0.0}, 0.01, 0.2, seed=1) - 0.4 * (at & (rows.optimizer == "soap"))
    found = judged("C12", rows.assign(loss=loss, qat_loss=qat))
    assert found.verdict.to_dict() == {
        "whole": "reproduced", "0.08M": "not reproduced", "0.16M": "reproduced", "0.26M": "not reproduced"
    }  # fmt: skip
    assert found.rival["0.16M"] == "soap"


def scaling(rho: dict[str, float], spread: float = 0.004, seed: int = 0) -> pd.DataFrame:
    parts = []
    for bits in (16, 4):
        own = design()["optimizer"].map(lambda name: 1.0 if bits == 16 else rho.get(name, 0.6))  # noqa: B023
        size = design()["size"].map(N)
        loss = 300 / (size * own) ** 0.5 + 2 + values({}, spread, seed=seed + bits)
        parts.append(design().assign(N=size, bits=bits, loss=loss))
    return pd.concat(parts, ignore_index=True)


@pytest.mark.filterwarnings("ignore::beyond_outliers.scaling.IdentificationWarning")
def test_efficiency_reaches_every_verdict():
    few = {"draws": 200}
    found = judged("C14", scaling({"shampoo": 0.75}), PAPER_THREE, few).loc["whole"]
    assert found.verdict == "reproduced" and found.estimate == pytest.approx(np.log(0.75 / 0.6), abs=0.03)
    assert judged("C14", scaling({"muon": 0.75}), PAPER_THREE, few).verdict["whole"] == "not reproduced"
    assert judged("C14", scaling({}, 0.002), PAPER_THREE, few).verdict["whole"] == "tie"
    assert judged("C14", scaling({}, 0.1), PAPER_THREE, few).verdict["whole"] == "undecided"


@pytest.mark.filterwarnings("ignore::beyond_outliers.scaling.IdentificationWarning")
def test_rho_draws_agree_with_the_fit():
    runs = scaling({"shampoo": 0.75})
    runs = runs[runs.optimizer.isin(PAPER_THREE)]
    estimate, draws = log_rho_draws(runs, bootstrap=200)
    laws = fit_shared(runs, share=("E", "alpha"), bootstrap=0)
    for name, law in laws.items():
        assert estimate[name] == pytest.approx(np.log(law.rho[4]), abs=1e-6)
    assert draws.shape == (200, 3) and draws.mean().to_numpy() == pytest.approx(estimate.to_numpy(), abs=0.02)
    with pytest.raises(ValueError, match="no run at 4 bits of \\['muon'\\]"):
        log_rho_draws(runs[(runs.optimizer != "muon") | (runs.bits == 16)])


# -------------------------------------------------------------------------------------------------- what may not count


def test_a_seventh_optimizer_other_sizes_and_other_seeds_change_nothing():
    reading = extreme_reading("C1", {"muon": -0.1}, 0.01)
    expected = judged("C1", reading)
    seventh = reading[reading.optimizer == "soap"].assign(optimizer="sgd", loss=0.1)
    larger = reading.assign(size="0.5M", loss=reading.loss.to_numpy()[::-1])
    later = reading[reading.seed == 200].assign(seed=210, loss=lambda t: np.where(t.optimizer == "muon", 9.0, 0.0))
    pd.testing.assert_frame_equal(judged("C1", pd.concat([reading, seventh, larger, later])), expected)


def test_too_few_runs_leave_it_undecided_unless_another_contrast_fails_it():
    reading = extreme_reading("C1", {"muon": -0.1}, 0.01)
    gone = (reading.optimizer == "psgd") & (reading["size"] == "0.26M") & (reading.seed >= 202)
    row = judged("C1", reading.assign(loss=reading.loss.where(~gone))).loc["whole"]
    assert row.verdict == "undecided" and "psgd at 0.26M has 2" in row.comment and not row.complete
    assert judged("C1", reading).complete["whole"]
    reading = extreme_reading("C1", {"soap": -0.1}, 0.01)
    assert judged("C1", reading.assign(loss=reading.loss.where(~gone))).verdict["whole"] == "not reproduced"


def test_every_claim_stays_undecided_without_its_table():
    found = evaluate_sets({}, RULES)
    assert set(found.verdict) == {"undecided"} and len(found) == 2 * len(RULES) and not found.complete.any()


def test_values_without_a_logarithm_are_told():
    bad = common(increase=np.where(np.arange(len(design())) == 7, -0.01, 0.1))
    assert "1 values" in judged("C4", bad).comment["whole"] and judged("C4", bad).verdict["whole"] == "undecided"
    assert "1 runs" in judged("C7", bad).comment["whole"]


RULES_CAME = datetime(2026, 11, 25, 8, 0, tzinfo=UTC)


def test_early_rows_do_not_count():
    runs = pd.DataFrame(
        {
            "run": ["early", "late", "sweep", "laptop", "same", "running", "elsewhere"],
            "scale": ["confirm"] * 3 + ["laptop"] + ["confirm"] * 3,
            "seed": [200, 200, 100, 200, 201, 202, 203],
            "finished_at": [
                "2026-11-25T07:59:59+00:00",
                "2026-11-25T08:00:01+00:00",
                "2026-11-25T09:00:00+00:00",
                "2026-11-25T09:00:00+00:00",
                "2026-11-25T08:00:00+00:00",
                None,
                "2026-11-25T09:30:00+02:00",  # 07:30 UTC
            ],
        }
    )
    kept, left = eligible(runs, RULES_CAME)
    assert kept.run.tolist() == ["late"] and list(kept.columns) == list(runs.columns)
    why = left.set_index("run").excluded
    assert "not after the rules" in why["early"] and "not after" in why["same"] and "not after" in why["elsewhere"]
    assert why["sweep"] == "seed 100, below 200" and why["laptop"] == "scale laptop, not confirm"
    assert why["running"] == "no time of its end"
    assert len(kept) + len(left) == len(runs)
    moved = RULES_CAME.astimezone(timezone(timedelta(hours=-5)))
    assert eligible(runs, moved)[0].run.tolist() == ["late"]
    assert all(len(part) == 0 for part in eligible(runs.iloc[:0], RULES_CAME))


def test_times_need_a_zone():
    runs = pd.DataFrame({"scale": ["confirm"], "seed": [200], "finished_at": ["2026-11-25T09:00:00"]})
    with pytest.raises(ValueError, match="finished_at needs a time zone: 2026"):
        eligible(runs, RULES_CAME)
    with pytest.raises(ValueError, match="commit needs a time zone"):
        eligible(runs, RULES_CAME.replace(tzinfo=None))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown readings \\['losses'\\]"):
        evaluate({"losses": design()}, RULES, PAPER_OPTIMIZERS)
    with pytest.raises(ValueError, match="unknown optimizers \\['adam'\\]"):
        evaluate({}, RULES, ("adam",))
    with pytest.raises(ValueError, match="final lacks the columns \\['mmr'\\]"):
        evaluate({"final": design()}, RULES, PAPER_OPTIMIZERS)
    with pytest.raises(ValueError, match="two rows for"):
        judged("C1", pd.concat([extreme_reading("C1", {}, 0.01)] * 2))


# ----------------------------------------------------------------------------------------------- the file, simulation


def test_the_file_has_every_claim_and_every_rule_its_code():
    claims = pd.read_csv(paths.PAPER / "claims.csv")
    assert list(RULES) == claims.id.tolist()
    for claim, rule in RULES.items():
        assert {"kind", "statistic", "reading", "unit", "paper", "notebook", "changes"} <= set(rule), claim
        assert rule["kind"] in confirm_rules.KINDS and rule["reading"] in confirm_rules.READINGS


def test_the_planned_seeds_are_those_of_the_scale():
    plan = tomllib.loads((paths.DATA / "scales" / "confirm.toml").read_text())["plan"]["full_precision"]
    assert {size: list(seeds) for size, seeds in SEEDS.items()} == plan["seeds"]


def simulation():
    file = Path(__file__).parents[1] / "benchmarks" / "simulate_rules.py"
    spec = importlib.util.spec_from_file_location("simulate_rules", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_simulated_rates_keep_their_levels():
    table = simulation().simulate(draws=300, studies=0, noises=(1.0,))
    extremes = table[(table.difference == 0) & table.coverage.notna()]
    # 2.5 % and four standard errors
    assert (extremes.reproduced < 0.061).all() and (extremes.not_reproduced < 0.061).all() and len(extremes) == 16
    assert ((table.coverage.dropna() - 0.95).abs() < 0.025).all()
    np.testing.assert_allclose(table[["reproduced", "not_reproduced", "tie", "undecided"]].sum(axis=1), 1)
    ahead = table[(table.configuration == "ahead of all") & (table.part == "Shampoo highest")]
    assert ahead.reproduced.is_monotonic_increasing and ahead.reproduced.max() > 0.99
    behind = table[(table.configuration == "behind one, others far") & (table.part == "Shampoo highest")]
    assert behind.not_reproduced.max() > 0.99 and behind.reproduced.max() < 0.061


def test_the_simulation_writes_its_table(tmp_path):
    file = tmp_path / "power.csv"
    table = simulation().main(["--draws", "10", "--studies", "0", "--output", str(file)])
    assert len(pd.read_csv(file)) == len(table)


def test_simulated_cells_are_those_of_simulated_seeds():
    """Mean and variance of a cell drawn directly have the moments of n normal seeds."""
    module = simulation()
    means, spread = np.arange(6.0), np.linspace(0.5, 2, 6)
    drawn = module.draw(means, spread, 20000, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.mean.std(0) * np.sqrt(module.COUNTS), spread[:, None].repeat(3, 1), rtol=0.03)
    np.testing.assert_allclose(drawn.variance.mean(0), spread[:, None].repeat(3, 1) ** 2, rtol=0.03)
    expected = spread[:, None] ** 2 * np.sqrt(2 / (module.COUNTS - 1))
    np.testing.assert_allclose(drawn.variance.std(0), expected, rtol=0.05)


def test_the_committed_power_table_is_of_this_design():
    table = pd.read_csv(paths.RESULTS / "rules_power.csv")
    assert {"C1", "C2", "C3", "C4", "C5", "C6", "C7", "C11", "C12", "C13", "C14"} == set(table.claim)
    with_margin = {claim for claim, rule in RULES.items() if "half" in rule}
    ahead = table[table.configuration == "ahead of all"]
    for claim in with_margin:
        margins = {half["margin"] for half in RULES[claim]["half"]}
        assert margins <= set(ahead[ahead.claim == claim].difference.round(6)), claim
