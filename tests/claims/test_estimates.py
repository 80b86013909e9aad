"""Contrasts, means, ratios and correlations, against scipy and numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from beyond_outliers.claims import estimates
from beyond_outliers.claims.estimates import (
    Cells,
    Comparison,
    Estimate,
    NothingToCompare,
    cells,
    common_slope,
    contrast,
    correlations,
    heterogeneity,
    leave_one_out,
    listed,
    pearson,
    slope_weights,
    t_interval,
)
from made_up_runs import NOISE, runs


def table(**cells):
    """ "s_adamw": values of its seeds -> rows; sizes and optimizers in the order given."""
    rows = [
        (*key.split("_"), seed, value)
        for key, values in cells.items()
        for seed, value in enumerate(np.atleast_1d(values))
    ]
    return pd.DataFrame(rows, columns=["size", "optimizer", "seed", "increase"])


def test_a_mean_has_the_t_interval_of_scipy_from_three_seeds_on():
    found = estimates.means(table(s_adamw=[1.0, 2.0, 4.0], s_muon=[1.0, 3.0]), "increase").set_index("optimizer")
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert found.loc["adamw", ["mean", "low", "high"]].tolist() == pytest.approx([7 / 3, low, high])
    assert found.loc["muon", "mean"] == 2 and np.isnan(found.loc["muon", "low"]) and found.n.tolist() == [3, 2]


def test_a_ratio_is_welchs_interval_of_logarithms():
    adamw, muon = np.array([0.1, 0.12, 0.09, 0.15]), np.array([0.2, 0.3, 0.25])
    found = estimates.ratios(table(s_adamw=adamw, s_muon=muon), "increase").set_index("optimizer")
    welch = stats.ttest_ind(np.log(muon), np.log(adamw), equal_var=False).confidence_interval(0.95)
    ratio = stats.gmean(muon) / stats.gmean(adamw)
    assert found.loc["muon", ["ratio", "low", "high"]].tolist() == pytest.approx([ratio, *np.exp(welch)])
    assert found.loc["adamw", "ratio"] == 1 and np.isnan(found.loc["adamw", "low"])
    assert found.n.to_dict() == {"adamw": 4, "muon": 3}


def test_the_mean_over_sizes_is_unweighted_and_takes_sizes_of_three_seeds_only():
    rows = table(
        s_adamw=[1.0, 1.1, 0.9, 1.0], s_muon=[2.0, 2.2, 1.8, 2.0],
        m_adamw=[1.0, 1.1, 0.9], m_muon=[8.0, 8.8, 7.2],
        l_adamw=[1.0, 1.0], l_muon=[100.0, 100.0],
    )  # fmt: skip
    found = estimates.ratios(rows, "increase").query("optimizer == 'muon'").set_index("size")
    assert list(found.index) == ["s", "m", "l", estimates.ALL_SIZES]
    over = found.loc[estimates.ALL_SIZES]
    assert over.ratio == pytest.approx(4) and over.low < 4 < over.high and over.n == 3  # sqrt(2 * 8)
    assert found.ratio["l"] == pytest.approx(100) and np.isnan(found.low["l"])


def test_sizes_without_the_reference_and_values_without_a_logarithm_are_left_out():
    rows = table(s_muon=[1.0, 1.0, 1.0], m_adamw=[1.0, 2.0, -1.0], m_muon=[4.0, 8.0, 16.0])
    found = estimates.ratios(rows, "increase")
    assert set(found["size"]) == {"m"}
    assert found.set_index("optimizer").n.to_dict() == {"adamw": 2, "muon": 2}
    assert estimates.ratios(rows[rows.optimizer == "muon"], "increase").empty


def test_every_value_of_by_is_compared_with_its_own_reference():
    rows = pd.concat([table(s_adamw=1.0, s_muon=2.0).assign(way="a"), table(s_adamw=10.0, s_muon=5.0).assign(way="b")])
    found = estimates.ratios(rows, "increase", ("way",)).query("optimizer == 'muon'").set_index("way")
    assert found.ratio.to_dict() == {"a": pytest.approx(2), "b": pytest.approx(0.5)}


def test_centred_means_take_the_size_out():
    """Ten times larger values at one size change nothing, and the means over optimizers are 0."""
    rng = np.random.default_rng(0)
    small = {f"s_{name}": np.exp(rng.normal(size=4)) for name in ("adamw", "muon", "soap")}
    both = table(**small, **{f"m{key[1:]}": 10 * values for key, values in small.items()})
    both = both.assign(R_L=both.increase**2)
    one = estimates.centred(both[both["size"] == "s"], ["increase", "R_L"])
    two = estimates.centred(both, ["increase", "R_L"])
    assert one.increase.sum() == pytest.approx(0) and two.increase.tolist() == pytest.approx(one.increase.tolist())
    assert two.R_L.tolist() == pytest.approx((2 * two.increase).tolist())
    low, high = stats.t.interval(0.95, 3, scale=stats.sem(np.log(small["s_muon"])))
    assert one.set_index("optimizer").increase_half["muon"] == pytest.approx((high - low) / 2)
    assert two.n.tolist() == ["4/4"] * 3 and (two.increase_half < one.increase_half).all()


def test_a_size_that_lacks_an_optimizer_is_not_centred():
    rows = table(s_adamw=1.0, s_muon=np.e, m_adamw=5.0)
    found = estimates.centred(rows, ["increase"]).set_index("optimizer")
    assert found.increase.to_dict() == {"adamw": pytest.approx(-0.5), "muon": pytest.approx(0.5)}
    assert found.n.to_dict() == {"adamw": "1", "muon": "1"} and found.increase_half.isna().all()
    assert estimates.centred(table(s_adamw=1.0, m_muon=2.0), ["increase"]).empty


SEEDS = {"s": range(10), "m": range(8), "l": range(4)}
NAMES = ("adamw", "muon", "psgd", "scion", "shampoo", "soap")


def planned():
    rows = [(size, name, seed) for size, seeds in SEEDS.items() for seed in seeds for name in NAMES]
    return pd.DataFrame(rows, columns=["size", "optimizer", "seed"])


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
    table = planned().assign(v=rng.normal(size=len(planned())))
    found = contrast(cells(table, "v", NAMES, tuple(SEEDS)), [("muon", "soap")])
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
    table = planned().assign(v=np.random.default_rng(2).normal(size=len(planned())))
    shifted = table.assign(v=table.v + table["size"].map({"s": 5.0, "m": -3.0, "l": 0.0}))
    pairs = [("muon", name) for name in NAMES if name != "muon"]
    before, after = (contrast(cells(t, "v", NAMES, tuple(SEEDS)), pairs) for t in (table, shifted))
    for name in ("estimate", "error", "dof"):
        np.testing.assert_allclose(getattr(before, name), getattr(after, name), rtol=1e-9)


def test_t_interval_and_slope_agree_with_scipy():
    rng = np.random.default_rng(3)
    sample = rng.normal(size=6)
    low, high = stats.ttest_1samp(sample, 0).confidence_interval(0.95)
    assert t_interval(sample).interval == pytest.approx((sample.mean(), low, high))
    x, y = rng.normal(size=(2, 7))
    line = stats.linregress(x, y)
    half = line.stderr * stats.t.ppf(0.995, 5)
    assert common_slope([(x, y)], 0.99).interval == pytest.approx((line.slope, line.slope - half, line.slope + half))


def test_slope_common_to_groups_is_ordinary_least_squares_with_intercepts():
    rng = np.random.default_rng(4)
    groups = [(rng.normal(size=n), rng.normal(size=n) + 3 * n) for n in (4, 5, 6)]
    x, y = (np.concatenate([group[i] for group in groups]) for i in (0, 1))
    matrix = np.column_stack([x, *(np.repeat(np.eye(3)[i], [4, 5, 6]) for i in range(3))])
    beta, rest, *_ = np.linalg.lstsq(matrix, y, rcond=None)
    error = np.sqrt(rest[0] / (15 - 4) * np.linalg.inv(matrix.T @ matrix)[0, 0])
    half = error * stats.t.ppf(0.975, 11)
    assert common_slope(groups).interval == pytest.approx((beta[0], beta[0] - half, beta[0] + half))
    assert np.isnan(common_slope([]).value) and not common_slope([([1.0, 2.0], [1.0, 3.0])]).certain


def test_correlation_without_one_agrees_with_scipy():
    x, y = np.random.default_rng(5).normal(size=(2, 6))
    expected = [stats.pearsonr(np.delete(x, i), np.delete(y, i)).statistic for i in range(6)]
    np.testing.assert_allclose(leave_one_out(x, y), expected)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)


def test_weights_of_a_slope_give_the_slope_of_the_differences():
    table = planned().assign(v=np.random.default_rng(6).normal(size=len(planned())))
    found = cells(table, "v", NAMES, tuple(SEEDS))
    x = np.log2([80, 260, 540])
    each = [contrast(found.at(size), [("muon", "soap")]) for size in SEEDS]
    line = stats.linregress(x, [c.estimate[0] for c in each])
    slope = contrast(found, [("muon", "soap")], slope_weights(x))
    assert slope.estimate[0] == pytest.approx(line.slope)
    away = x - x.mean()
    assert slope.error[0] == pytest.approx(
        np.sqrt(sum((a * c.error[0]) ** 2 for a, c in zip(away, each, strict=True))) / (away @ away)
    )
    even = contrast(found, [("muon", "soap")], np.full(3, 1 / 3))
    np.testing.assert_allclose(even.interval(), contrast(found, [("muon", "soap")]).interval())


def test_tuning_adds_its_variance_and_no_degrees_of_freedom():
    found = cells(planned().assign(v=np.random.default_rng(7).normal(size=len(planned()))), "v", NAMES, tuple(SEEDS))
    added = np.arange(18.0).reshape(6, 3)
    tuned = Cells(found.optimizers, found.sizes, found.mean, found.variance, found.n, added)
    plain, wide = (contrast(of, [("muon", "soap")]) for of in (found, tuned))
    assert wide.error[0] ** 2 == pytest.approx(plain.error[0] ** 2 + (added[1].sum() + added[5].sum()) / 9)
    assert wide.estimate[0] == plain.estimate[0] and wide.dof[0] > plain.dof[0]
    assert tuned.at("m").tuning.tolist() == added[:, 1:2].tolist() and tuned.with_zero().tuning.shape == (7, 3)


def test_heterogeneity_is_welchs_test_of_equal_means():
    samples = [np.random.default_rng(i).normal(i / 4, 1 + i, 6 + 3 * i) for i in range(3)]
    means, errors = np.array([s.mean() for s in samples]), np.array([stats.sem(s) for s in samples])
    dof = np.array([len(s) - 1.0 for s in samples])
    expected = stats.f_oneway(*samples, equal_var=False).pvalue
    assert heterogeneity(means, errors, dof) == pytest.approx(expected)
    assert np.isnan(heterogeneity(means[:1], errors[:1], dof[:1]))
    assert heterogeneity(np.array([0.0, 9.0]), np.ones(2), np.full(2, 9.0)) < 1e-3


def test_an_interval_does_not_depend_on_what_else_is_asked_for():
    """A page shows one correlation in its finding and again in the table of all candidates: the same interval."""
    rng = np.random.default_rng(3)
    table = pd.DataFrame(rng.normal(size=(12, 3)), columns=["x", "z", "y"])
    alone = correlations(table, candidates=("z",), targets=("y",)).iloc[0]
    among = correlations(table, candidates=("x", "z"), targets=("x", "y")).set_index(["target", "candidate"])
    assert among.loc[("y", "z")].tolist() == alone.drop(["target", "candidate"]).tolist()


def test_correlations_agree_with_scipy():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": rng.normal(size=30), "size": "s"})
    table["y"] = table.x + rng.normal(size=30)
    row = correlations(table, candidates=("x",), targets=("y",)).iloc[0]
    pearson = stats.pearsonr(table.x, table.y)
    assert row.pearson == pytest.approx(pearson.statistic)
    assert row.spearman == pytest.approx(stats.spearmanr(table.x, table.y).statistic)
    low, high = pearson.confidence_interval(0.95)  # Fisher's, a different method: about the same
    assert row.pearson_low == pytest.approx(low, abs=0.12) and row.pearson_high == pytest.approx(high, abs=0.12)
    assert row.n == 30


def test_within_groups_the_groups_themselves_do_not_correlate():
    rng = np.random.default_rng(1)
    group = np.repeat([0.0, 10.0, 20.0], 40)
    table = pd.DataFrame({"x": group + rng.normal(size=120), "y": group + rng.normal(size=120), "size": group})
    pooled = correlations(table, candidates=("x",), targets=("y",)).iloc[0]
    within = correlations(table, within="size", candidates=("x",), targets=("y",)).iloc[0]
    assert pooled.pearson > 0.95
    assert abs(within.pearson) < 0.25 and within.pearson_low < 0 < within.pearson_high


def test_too_few_points_have_no_interval():
    table = pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 4.0]})
    row = correlations(table, candidates=("x",), targets=("y",)).iloc[0]
    assert row.n == 3 and np.isnan(row.pearson_low)
    constant = correlations(table.assign(x=1.0), candidates=("x",), targets=("y",)).iloc[0]
    assert np.isnan(constant.pearson)


def test_a_mean_of_one_size_has_the_t_interval():
    table = runs(sizes=("small",))
    values = table.value[table.optimizer == "muon"]
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert Comparison(table, "value").mean("muon").interval == pytest.approx((values.mean(), low, high))


def test_a_difference_of_one_size_has_the_interval_of_welchs_test():
    table = runs(sizes=("small",))
    table.loc[table.optimizer == "muon", "value"] *= 3  # another spread
    first, second = (table.value[table.optimizer == name] for name in ("muon", "shampoo"))
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    found = Comparison(table, "value").difference("muon", "shampoo")
    assert found.interval == pytest.approx((first.mean() - second.mean(), expected.low, expected.high))


def test_a_mean_over_sizes_does_not_take_the_spread_between_sizes_for_noise():
    compared = Comparison(runs(), "value")
    value, low, high = compared.mean("muon").interval
    assert value == pytest.approx(0.8)  # sizes 1 apart
    errors = [np.std(NOISE[:3], ddof=1) / 3**0.5] * 2
    half = np.hypot(*errors) / 2 * stats.t.ppf(0.975, 4)  # equal variances: both samples' degrees of freedom
    assert (high - low) / 2 == pytest.approx(half)
    assert (compared.over, compared.n()) == ("over small and large", "n 6 each")
    assert compared.order == ["shampoo", "muon", "scion", "soap", "adamw", "psgd"]


def test_sizes_with_enough_seeds_are_preferred_to_those_without():
    table = pd.concat([runs(sizes=("small",)), runs(seeds=1, sizes=("large",))], ignore_index=True)
    compared = Comparison(table, "value")
    assert compared.sizes == ["small"] and compared.certain and compared.caveat == ""


@pytest.mark.parametrize(("seeds", "reason"), [(1, "One seed:"), (2, "Fewer than 3 seeds of some optimizer:")])
def test_too_few_seeds_have_no_interval_and_say_why(seeds, reason):
    compared = Comparison(runs(seeds=seeds), "value")
    assert not compared.mean("muon").certain and not compared.difference("muon", "soap").certain
    assert compared.caveat.strip().startswith(reason) and "no interval" in compared.caveat


def test_an_optimizer_that_is_missing_leaves_nothing_to_compare():
    table = runs()
    with pytest.raises(NothingToCompare, match=r"Shampoo and SOAP yet \(so far: AdamW, Muon, PSGD, Scion and SOAP\)"):
        Comparison(table[table.optimizer != "shampoo"], "value")


def test_words():
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "none",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert Estimate(0.1234, 0.1, 0.2).text() == "0.123 [0.100, 0.200]" and Estimate(0.1234).text(1) == "0.1"
    assert Estimate(0.0, -1.0, 1.0).map(np.exp).interval == pytest.approx((1, 1 / np.e, np.e))
