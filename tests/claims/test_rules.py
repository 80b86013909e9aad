"""The rules of the claims: every verdict of every rule on constructed data, what must not count, and the file."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from beyond_outliers import paths
from beyond_outliers.claims.estimates import Cells, leave_one_out, pearson, t_interval
from beyond_outliers.claims.rules import (
    CLAIMS,
    PAPER_OPTIMIZERS,
    PAPER_THREE,
    VERDICTS,
    Evidence,
    evaluate,
    judge_half,
    judge_prediction,
    tuning_variance,
)
from beyond_outliers.claims.verdicts import read_rules
from beyond_outliers.scaling import fit_shared, log_rho_draws

RULES = read_rules()
SEEDS = {"0.08M": range(10), "0.16M": range(10), "0.26M": range(6)}
N = {"0.08M": 82216, "0.16M": 160272, "0.26M": 262336}
FIRST = {claim: rule.get("conditions", [""])[0] for claim, rule in RULES.items()}


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


def judged(
    claim: str, table: pd.DataFrame, optimizers=PAPER_OPTIMIZERS, rule: dict | None = None, **more
) -> pd.DataFrame:
    """Its findings under the first of its conditions, by part."""
    rule = RULES[claim] | (rule or {})
    found = evaluate({rule["table"]: table, **more}, {claim: rule}, N, optimizers, "10/10/6")
    return found[found.condition == FIRST[claim]].set_index("part")


def common(**columns) -> pd.DataFrame:
    filled = dict.fromkeys(("increase", "mmr", "kurtosis", "R_L_token", "R_L_centred_token", "gain"), 1.0)
    return design().assign(condition="with head", **(filled | columns))


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
    return common(**{"gain" if claim == "C11" else "increase": np.exp(judged_values)})


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
    assert row.value == pytest.approx(sign * 3 * margin, rel=0.05) and row.runs == "10/10/6"
    assert row.trend == pytest.approx(0, abs=0.3 * margin) and row.heterogeneity > 0.5
    assert of(0, 0, 0.5)[0] == "tie"
    assert of(-1, 0, 8)[0] == "undecided"
    assert of(-0.9, 0, 0.05)[0] == "reproduced"  # certain and small is a difference, not a tie


def test_the_strict_level_guards_not_reproduced():
    """A rival ahead at 95 % but not at 99 % leaves the claim open."""
    row = judged("C1", extreme_reading("C1", {"soap": -0.02, "muon": 0.0}, 0.0265)).loc["whole"]
    assert row.low > 0 and row.verdict == "undecided"


def test_two_halves_make_a_whole():
    def of(muon: float, shampoo: float, spread: float = 0.05) -> dict:
        return judged("C3", extreme_reading("C3", {"muon": muon, "shampoo": shampoo}, spread)).verdict.to_dict()

    names = ("whole", "Muon lowest", "Shampoo highest")
    assert of(-1, 1) == dict(zip(names, ["reproduced"] * 3, strict=True))
    assert of(-1, -0.5) == dict(zip(names, ["not reproduced", "reproduced", "not reproduced"], strict=True))
    assert of(-1, 0) == dict(zip(names, ["tie", "reproduced", "tie"], strict=True))
    assert of(0, 0.5, 0.4)["whole"] == "undecided" and of(0.5, 0)["whole"] == "not reproduced"


@pytest.mark.parametrize("trend", [0.0, 0.3])
def test_where_sizes_differ_no_mean_stands_for_them(trend):
    """Shampoo is hurt least, by .6 of the logarithm at the middle size and by `trend` less per doubling."""
    doubling = np.log2(design()["size"].map(N) / N["0.16M"])
    effect = np.where(design().optimizer == "shampoo", -0.6 + trend * doubling, 0.0)
    found = judged("C4", common(increase=np.exp(effect + values({}, 0.05))))
    row = found.loc["whole"]
    assert row.verdict == "reproduced" and row.trend == pytest.approx(trend, abs=0.03)
    assert row.trend_low < trend < row.trend_high and (row.heterogeneity <= 0.05) == bool(trend)
    sizes = [f"Shampoo lowest, {size}" for size in SEEDS]
    if not trend:
        assert list(found.index) == ["whole"] and row.value == pytest.approx(-0.6, abs=0.03)
        return
    assert np.isnan(row.value) and "Sizes differ" in row.comment and list(found.index) == ["whole", *sizes]
    assert found.value[sizes].is_monotonic_increasing and set(found.verdict[sizes]) == {"reproduced"}
    turned = judged(
        "C4", common(increase=np.exp(effect + np.where(design().optimizer == "shampoo", 0.5, 0.0) + values({}, 0.05)))
    )
    assert turned.verdict[sizes[0]] == "reproduced" and turned.verdict[sizes[2]] == "not reproduced"
    assert turned.verdict["whole"] == "undecided"


def test_simulated_and_single_studies_are_judged_alike():
    half, rng = RULES["C5"]["half"][0], np.random.default_rng(0)
    n = np.array([[10, 10, 6]] * 6)
    many = Cells(PAPER_OPTIMIZERS, tuple(N), rng.normal(0, 0.1, (50, 6, 3)), rng.uniform(0.001, 0.1, (50, 6, 3)), n)
    together = judge_half(many, half)
    for k in range(50):
        one = judge_half(Cells(PAPER_OPTIMIZERS, tuple(N), many.mean[k], many.variance[k], n), half)
        assert str(one[0]) == together[0][k] and one[1] == together[1][k] and one[2] == pytest.approx(together[2][k])


def sweep(slopes: dict[str, float], spread: float) -> pd.DataFrame:
    rng, parts = np.random.default_rng(0), []
    for size in SEEDS:
        for name in PAPER_OPTIMIZERS:
            lr = 0.01 * 2.0 ** np.arange(5)
            mmr = np.exp(slopes.get(name, 0.3) * np.log(lr) + spread * rng.standard_normal(5))
            for auxiliary in (1.0, 2.0):  # lines of their own: another level, the same slope
                parts.append(
                    pd.DataFrame(
                        {
                            "size": size,
                            "optimizer": name,
                            "seed": 100,
                            "lr": lr,
                            "mmr": auxiliary * mmr,
                            "auxiliary": auxiliary,
                        }
                    )
                )
    return pd.concat(parts)


def test_slopes_reach_every_verdict():
    assert judged("C2", sweep({}, 0.01)).verdict["whole"] == "reproduced"
    falling = judged("C2", sweep({"scion": -0.2}, 0.01))
    assert falling.verdict["whole"] == falling.verdict["scion"] == "not reproduced"
    assert falling.value["scion"] == pytest.approx(-0.2, abs=0.02)
    flat = dict.fromkeys(PAPER_OPTIMIZERS, 0.0)
    assert judged("C2", sweep(flat, 0.3)).verdict["whole"] == "undecided"
    assert judged("C2", sweep(flat, 0.01)).verdict["whole"] == "tie"
    assert judged("C2", sweep({"scion": -0.2}, 0.01), PAPER_THREE).verdict["whole"] == "reproduced"


def predictor_reading(
    x: list[float], y: list[float], metrics=("R_L_token", "R_L_centred_token"), spread: float = 0.02
) -> pd.DataFrame:
    by_name = [dict(zip(PAPER_OPTIMIZERS, v, strict=True)) for v in (x, y)]
    metric = np.exp(values(by_name[0], spread))
    return common(increase=np.exp(values(by_name[1], spread, seed=1)), **dict.fromkeys(metrics, metric))


LINE, CROSS, ONE = [0, 1, 2, 3, 4, 5], [0, 0.3, -0.3, 0.3, -0.3, 0], [0, 0, 0, 0, 0, 9]


SIX = "literal R_L, six optimizers"


def test_correlations_reach_every_verdict():
    y = [0, 1.2, 1.8, 3.1, 4.0, 5.1]
    along = judged("C7", predictor_reading(LINE, y)).loc[SIX]
    assert along.verdict == "reproduced" and along.value == pytest.approx(np.corrcoef(LINE, y)[0, 1], abs=1e-9)
    assert judged("C7", predictor_reading(LINE, y[::-1])).verdict[SIX] == "not reproduced"
    assert judged("C7", predictor_reading(LINE, CROSS)).verdict[SIX] == "not reproduced"
    hanging = [v + 0.1 * w for v, w in zip(ONE, CROSS, strict=True)]  # r near 1, by one optimizer alone
    row = judged(
        "C7", predictor_reading([v + 0.1 * w for v, w in zip(ONE, [1, -1, -1, 1, 0, 0], strict=True)], hanging)
    )
    assert row.value[SIX] > 0.95 and row.verdict[SIX] == "undecided" and row.rival[SIX] == "soap"
    assert "cannot say" in row.comment[SIX]
    noisy = judged("C7", predictor_reading([0.01 * v for v in LINE], [0.01 * v for v in y], spread=0.2)).loc[SIX]
    assert noisy.value > 0.95 and noisy.low < 0.5 and noisy.verdict == "undecided"
    both = ("mmr", "kurtosis")
    assert judged("C6", predictor_reading(LINE, CROSS, both)).verdict["whole"] == "reproduced"
    assert judged("C6", predictor_reading(LINE, y[::-1], both)).verdict["whole"] == "reproduced"  # one-sided
    one_predicts = predictor_reading(LINE, y, ("mmr",)).assign(kurtosis=predictor_reading(CROSS, y).R_L_token)
    assert judged("C6", one_predicts).verdict["mmr"] == judged("C6", one_predicts).verdict["whole"] == "not reproduced"
    assert judged("C6", predictor_reading(LINE, [0, 3, 1, 2, 0, 4], both)).verdict["whole"] == "undecided"


def test_both_readings_and_both_sets_of_points_must_predict():
    """The literal R_L and the centred one; over six optimizers and over twelve recipes."""
    y = [0, 1.2, 1.8, 3.1, 4.0, 5.1]
    six = predictor_reading(LINE, y)
    recipes = pd.concat([six, six.assign(optimizer=six.optimizer + " x4")], ignore_index=True)
    recipes = recipes[recipes["size"] == "0.08M"]
    assert judged("C7", six).verdict["whole"] == "not measured"  # there is no recipe
    found = judged("C7", six, recipes=recipes)
    assert set(found.verdict) == {"reproduced"} and len(found) == 5
    assert found.n["literal R_L, twelve recipes"] == 12 and found.runs["literal R_L, twelve recipes"] == "10"
    raw_fails = six.assign(R_L_token=predictor_reading(LINE[::-1], y).R_L_token)
    found = judged("C7", raw_fails, recipes=recipes).verdict
    assert found[SIX] == found["whole"] == "not reproduced" and found["centred R_L, six optimizers"] == "reproduced"


def test_three_optimizers_cannot_say():
    found = judged("C7", predictor_reading(LINE, LINE), PAPER_THREE).loc["literal R_L"]
    assert found.verdict == "undecided" and "3 optimizers cannot say" in found.comment


def test_sizes_alone_do_not_correlate():
    shift = np.log(design()["size"].map({"0.08M": 1.0, "0.16M": 30.0, "0.26M": 900.0}))
    plain = predictor_reading(LINE, CROSS)
    moved = plain.assign(R_L_token=plain.R_L_token * np.exp(shift), increase=plain.increase * np.exp(shift))
    assert judged("C7", plain).value[SIX] == pytest.approx(judged("C7", moved).value[SIX])


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
    assert row.verdict == "reproduced" and row.value == pytest.approx(np.mean([0.95] * 5 + [0.9]))
    expected = t_interval([0.95] * 5 + [0.9])  # the unit is an optimizer, however many runs it has
    assert (row.low, row.high) == pytest.approx((expected.low, expected.high))
    assert judged("C8", modules(dict.fromkeys(same, 0.5))).verdict["whole"] == "not reproduced"
    assert judged("C8", modules(same | {"soap": 0.3, "muon": 0.5})).verdict["whole"] == "undecided"
    interaction = modules(same).assign(C=-0.3)  # A must exceed |C| too
    assert judged("C8", interaction).verdict["whole"] == "not reproduced"


def test_shares_of_norms_reach_every_verdict():
    def verdict(shares: dict) -> str:
        return judged("C9", design().assign(falls=values(shares, 0.01))).verdict["whole"]

    same = dict.fromkeys(PAPER_OPTIMIZERS, 0.97)
    assert verdict(same | {"soap": 0.95}) == "reproduced" and verdict(dict.fromkeys(same, 0.7)) == "not reproduced"
    assert verdict(same | {"soap": 0.5}) == "undecided"


def layers(distances: dict[str, float], spread: float = 0.005) -> pd.DataFrame:
    parts = [design().assign(name=f"l{k}", spectral_ratio=1 + values(distances, spread, seed=k)) for k in range(3)]
    return pd.concat(parts, ignore_index=True)


def test_spectral_ratios_reach_every_verdict():
    near = dict.fromkeys(PAPER_OPTIMIZERS, 0.03)
    found = judged("C10", layers(near))
    assert found.verdict["whole"] == "reproduced" and found.value["muon"] == pytest.approx(0.03, abs=1e-3)
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
    assert found.verdict == "reproduced" and found.value == pytest.approx(np.log(0.75 / 0.6), abs=0.03)
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


def test_a_seventh_optimizer_and_other_sizes_change_nothing():
    table = extreme_reading("C1", {"muon": -0.1}, 0.01)
    seventh = table[table.optimizer == "soap"].assign(optimizer="sgd", loss=0.1)
    larger = table.assign(size="0.5M", loss=table.loss.to_numpy()[::-1])
    pd.testing.assert_frame_equal(judged("C1", pd.concat([table, seventh, larger])), judged("C1", table))


def test_sizes_with_too_few_runs_are_left_out_and_the_verdict_is_not_final():
    table = extreme_reading("C1", {"muon": -0.1}, 0.01)
    gone = (table.optimizer == "psgd") & (table["size"] == "0.26M") & (table.seed >= 2)
    row = judged("C1", table.assign(loss=table.loss.where(~gone))).loc["whole"]
    assert row.verdict == "reproduced" and row.runs == "10/10" and not row.complete
    assert judged("C1", table).complete["whole"]
    few = judged("C1", table[table.seed < 2]).loc["whole"]
    assert few.verdict == "undecided" and "fewer than 3 runs" in few.comment and np.isnan(few.value)


def test_what_is_not_there_is_called_not_measured():
    found = evaluate({}, RULES, N)
    assert set(found.verdict) == {"not measured"} and not found.complete.any() and set(found.id) == set(CLAIMS)
    table = extreme_reading("C1", {"muon": -0.1}, 0.01)
    assert judged("C13", table).verdict["whole"] == "not measured"  # no QAT yet
    row = judged("C1", table[table.optimizer != "soap"]).loc["whole"]
    assert row.verdict == "not measured" and "SOAP" in row.comment
    assert judged("C1", table[table.optimizer != "soap"], PAPER_THREE).verdict["whole"] == "reproduced"
    table = common(increase=np.exp(values({"shampoo": -1.0}, 0.1)))
    found = evaluate({"common": table}, {"C4": RULES["C4"]}, N).set_index("condition").verdict
    assert found.to_dict() == {
        "with head": "reproduced",
        "without head": "not measured",
        "equal schedule": "not measured",
    }
    both = pd.concat([table, table.assign(condition="without head", increase=1 / table.increase)])
    found = evaluate({"common": both}, {"C4": RULES["C4"]}, N).set_index("condition").verdict
    assert found["with head"] == "reproduced" and found["without head"] == "not reproduced"


def test_values_without_a_logarithm_are_told():
    bad = common(increase=np.where(np.arange(len(design())) == 7, -0.01, 0.1))
    row = judged("C4", bad).loc["whole"]
    assert row.verdict == "undecided" and "1 values of increase" in row.comment


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"no rule for \['C15'\]; valid: C1, C2"):
        evaluate({}, {"C15": {}}, N)
    with pytest.raises(ValueError, match="two rows for"):
        judged("C1", pd.concat([extreme_reading("C1", {}, 0.01)] * 2))


# ------------------------------------------------------------------------------------------------------------- tuning


def tried(losses: list[float], damages: list[float], seeds: int = 1) -> pd.DataFrame:
    """The same rates tried for every optimizer at every size."""
    rows = [
        (size, name, seed, float(k), 0.0, loss, damage)
        for size in SEEDS
        for name in PAPER_OPTIMIZERS
        for seed in range(seeds)
        for k, (loss, damage) in enumerate(zip(losses, damages, strict=True))
    ]
    return pd.DataFrame(rows, columns=["size", "optimizer", "seed", "lr", "auxiliary", "loss", "increase"])


def test_what_tuning_adds_by_hand():
    """Seeds spread by s = .01, so two seeds a rate differ by .01 in standard error: the window is .025 wide."""
    runs = design().assign(loss=3 + values({}, 0.01), increase=np.exp(values({}, 0.1, seed=1)))
    sweep = tried([3.0, 3.024, 3.026, 3.5], [1.0, 1.5, 9.0, 9.0], seeds=2)
    data = Evidence({"runs": runs, "sweep": sweep}, PAPER_OPTIMIZERS, N, tolerance=0.015)
    loss = data.cells(runs, "loss", tuning="loss")
    assert loss.tuning == pytest.approx(np.full((6, 3), np.var([0, 0.024], ddof=1)))
    increase = data.cells(runs, "increase", log=True, tuning="increase")
    expected = np.var(np.log([1.0, 1.5]), ddof=1) - 0.1**2 / 2  # less what two seeds a rate make of it
    assert increase.tuning == pytest.approx(np.full((6, 3), expected))
    assert (data.cells(runs, "loss").tuning == 0).all()  # only where a rule asks for it
    assert (
        tuning_variance(Evidence({"runs": runs}, PAPER_OPTIMIZERS, N, tolerance=0.015), "loss", False, loss) == 0
    ).all()


def test_a_rate_alone_takes_what_the_others_have_and_intervals_widen():
    runs = design().assign(loss=3 + values({"muon": -0.03}, 0.01), qat_loss=np.nan)
    sweep = tried([3.0, 3.02], [1.0, 1.0])
    alone = sweep[(sweep.optimizer != "soap") | (sweep.lr == 0)]
    data = Evidence({"runs": runs, "sweep": alone}, PAPER_OPTIMIZERS, N, tolerance=0.015)
    assert data.cells(runs, "loss", tuning="loss").tuning == pytest.approx(np.full((6, 3), 0.0002))
    tables = {"runs": runs, "sweep": sweep}
    plain, wide = (evaluate(tables, {"C1": RULES["C1"]}, N, tolerance=t).iloc[0] for t in (0.0, 0.015))
    assert wide.value == plain.value and wide.high - wide.low > 1.5 * (plain.high - plain.low)
    assert plain.verdict == "reproduced"


# ----------------------------------------------------------------------------------------------- the file, simulation


def test_the_file_has_every_claim_and_every_rule_its_code():
    claims = pd.read_csv(paths.PAPER / "claims.csv")
    assert list(RULES) == claims.id.tolist() == list(CLAIMS)
    for claim, rule in RULES.items():
        assert {"table", "statistic", "unit", "paper", "notebook", "figure", "changes"} <= set(rule), claim
        assert CLAIMS[claim].__name__ == claim and CLAIMS[claim].__doc__


def simulation():
    file = Path(__file__).parents[1] / "benchmarks" / "simulate_rules.py"
    spec = importlib.util.spec_from_file_location("simulate_rules", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_simulated_rates_keep_their_levels(tmp_path):
    file = tmp_path / "power.csv"
    table = simulation().main(["--draws", "300", "--studies", "12", "--fits", "0", "--output", str(file)])
    assert len(pd.read_csv(file)) == len(table)
    extremes = table[(table.difference == 0) & table.coverage.notna()]
    # 2.5 % and four standard errors
    bare = table[table.tuning == "none"]
    levels = extremes[["reproduced", "not_reproduced"]].max(axis=1)
    assert levels[extremes.tuning == "none"].max() < 0.061 and levels.max() < 0.1 and len(extremes) == 32
    assert ((bare.coverage.dropna() - 0.95).abs() < 0.03).all()
    assert (table.coverage.dropna() > 0.86).all()  # twelve tunings: see the committed table for what three hundred give
    np.testing.assert_allclose(table[["reproduced", "not_reproduced", "tie", "undecided"]].sum(axis=1), 1)
    ahead = bare[(bare.configuration == "ahead of all") & (bare.claim == "C4")]
    assert ahead.reproduced.max() > 0.9 and ahead.reproduced.iloc[0] < 0.5
    behind = bare[(bare.configuration == "behind one, others far") & (bare.claim == "C4")]
    assert behind.not_reproduced.max() > 0.9 and behind.reproduced.max() < 0.061


def test_simulated_cells_are_those_of_simulated_seeds():
    """Mean and variance of a cell drawn directly have the moments of n normal seeds."""
    module = simulation()
    means, spread = np.arange(6.0), np.linspace(0.5, 2, 6)
    drawn = module.draw(means, spread, 20000, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.mean.std(0) * np.sqrt(module.COUNTS), spread[:, None].repeat(3, 1), rtol=0.03)
    np.testing.assert_allclose(drawn.variance.mean(0), spread[:, None].repeat(3, 1) ** 2, rtol=0.03)
    expected = spread[:, None] ** 2 * np.sqrt(2 / (module.COUNTS - 1))
    np.testing.assert_allclose(drawn.variance.std(0), expected, rtol=0.05)


def test_the_committed_power_table_is_of_these_rules_and_covers():
    """Contrasts of optimizers at their true best rates are covered in 90 %, with the rates that a search finds."""
    table = pd.read_csv(paths.RESULTS / "rules_power.csv")
    assert {"C1", "C2", "C3", "C4", "C5", "C6", "C7", "C11", "C12", "C13", "C14"} == set(table.claim)
    ahead = table[table.configuration == "ahead of all"]
    for claim, rule in RULES.items():
        margins = {half["margin"] for half in rule.get("half", [])}
        assert margins <= set(ahead[ahead.claim == claim].difference.round(6)), claim
    searched = table[(table.tuning == "searched") & table.coverage.notna()]
    assert searched.coverage.min() >= 0.895 and len(searched) > 100
    assert searched.coverage_of_seeds_alone.min() < 0.85


def test_the_figures_in_the_head_of_the_rules_are_those_of_the_table():
    head = (paths.DATA / "claims.toml").read_text().split("[study]")[0]
    table = pd.read_csv(paths.RESULTS / "rules_power.csv")
    searched = table[table.tuning == "searched"]
    least = 100 * searched.coverage.min()
    assert f"at least {int(least)} %" in head
    assert set(VERDICTS) >= set(table.columns[6:10].str.replace("_", " "))
