"""Contrasts, means, ratios and correlations, against scipy and numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from beyond_outliers.claims import estimates
from beyond_outliers.claims.estimates import (
    ALL_SIZES,
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
from made_up_runs import runs

NAMES = ("adamw", "muon", "psgd", "scion", "shampoo", "soap")
SEEDS = {"s": 10, "m": 8, "l": 4}
RNG = np.random.default_rng(0)
ROWS = pd.DataFrame(
    [(size, name, seed, RNG.normal()) for size, n in SEEDS.items() for seed in range(n) for name in NAMES],
    columns=["size", "optimizer", "seed", "v"],
)
PAIR = [("muon", "soap")]


def table(**groups):
    """ "s_adamw": values of its seeds -> rows; sizes and optimizers in the order given."""
    rows = [
        (*key.split("_"), seed, value) for key, of in groups.items() for seed, value in enumerate(np.atleast_1d(of))
    ]
    return pd.DataFrame(rows, columns=["size", "optimizer", "seed", "increase"])


def summed(rows=ROWS):
    return cells(rows, "v", NAMES, tuple(SEEDS))


# ---------------------------------------------------------------------------------------------------------- contrasts


def test_one_size_is_welchs_interval_and_less_nothing_is_a_mean():
    a, b = RNG.normal(3, 1, 10), RNG.normal(2, 3, 6)
    of = cells(table(s_a=a, s_b=b), "increase", ("a", "b"), ("s",))
    for second, test in (("b", stats.ttest_ind(a, b, equal_var=False)), (None, stats.ttest_1samp(a, 0))):
        found = contrast(of, [("a", second)])
        assert found.dof[0] == pytest.approx(test.df)
        for confidence in (0.95, 0.99):
            ends = [end[0] for end in found.interval(confidence)]
            assert ends == pytest.approx([*test.confidence_interval(confidence)])


def test_sizes_add_up_by_hand():
    found, groups = contrast(summed(), PAIR), ROWS[ROWS.optimizer.isin(PAIR[0])].groupby(["optimizer", "size"]).v
    parts, dof, means = groups.var() / groups.size() / 9, groups.size() - 1, groups.mean()
    assert found.estimate[0] == pytest.approx((means["muon"] - means["soap"]).mean())
    assert found.error[0] == pytest.approx(np.sqrt(parts.sum()))
    assert found.dof[0] == pytest.approx(parts.sum() ** 2 / (parts**2 / dof).sum())
    shifted = ROWS.assign(v=ROWS.v + ROWS["size"].map({"s": 5.0, "m": -3.0, "l": 0.0}))  # a size changes no contrast
    for same in (contrast(summed(shifted), PAIR), contrast(summed(), PAIR, np.full(3, 1 / 3))):
        np.testing.assert_allclose(same.interval(), found.interval(), rtol=1e-9)


def test_weights_of_a_slope_give_the_slope_of_the_differences():
    x = np.log2([80, 260, 540])
    each = [contrast(summed().at(size), PAIR) for size in SEEDS]
    slope, away = contrast(summed(), PAIR, slope_weights(x)), x - x.mean()
    assert slope.estimate[0] == pytest.approx(stats.linregress(x, [c.estimate[0] for c in each]).slope)
    error = np.sqrt(sum((a * c.error[0]) ** 2 for a, c in zip(away, each, strict=True))) / (away @ away)
    assert slope.error[0] == pytest.approx(error)


def test_tuning_adds_its_variance_and_no_degrees_of_freedom():
    added = np.arange(18.0).reshape(6, 3)
    tuned = replace(summed(), tuning=added)
    plain, wide = (contrast(of, PAIR) for of in (summed(), tuned))
    assert wide.error[0] ** 2 == pytest.approx(plain.error[0] ** 2 + (added[1].sum() + added[5].sum()) / 9)
    assert wide.estimate[0] == plain.estimate[0] and wide.dof[0] > plain.dof[0]
    assert tuned.at("m").tuning.tolist() == added[:, 1:2].tolist()


def test_heterogeneity_is_welchs_test_of_equal_means():
    samples = [RNG.normal(i / 4, 1 + i, 6 + 3 * i) for i in range(3)]
    means, errors = np.array([s.mean() for s in samples]), np.array([stats.sem(s) for s in samples])
    dof = np.array([len(s) - 1.0 for s in samples])
    assert heterogeneity(means, errors, dof) == pytest.approx(stats.f_oneway(*samples, equal_var=False).pvalue)
    assert np.isnan(heterogeneity(means[:1], errors[:1], dof[:1]))


@pytest.mark.parametrize(("sizes", "confidence"), [((7,), 0.95), ((4, 5, 6), 0.99)])
def test_a_common_slope_is_ordinary_least_squares_with_an_intercept_a_group(sizes, confidence):
    groups = [(RNG.normal(size=n), RNG.normal(size=n) + 3 * n) for n in sizes]
    x, y = (np.concatenate([group[i] for group in groups]) for i in (0, 1))
    matrix = np.column_stack([x, np.repeat(np.eye(len(sizes)), sizes, axis=0)])
    beta, rest, *_ = np.linalg.lstsq(matrix, y, rcond=None)
    dof = len(x) - len(sizes) - 1
    half = np.sqrt(rest[0] / dof * np.linalg.inv(matrix.T @ matrix)[0, 0]) * stats.t.ppf((1 + confidence) / 2, dof)
    assert common_slope(groups, confidence).interval == pytest.approx((beta[0], beta[0] - half, beta[0] + half))
    assert not common_slope([([1.0, 2.0], [1.0, 3.0])]).certain


# ------------------------------------------------------------------------------------------------ means and ratios


def test_a_mean_has_the_t_interval_of_scipy_from_three_seeds_on():
    found = estimates.means(table(s_adamw=[1.0, 2.0, 4.0], s_muon=[1.0, 3.0]), "increase").set_index("optimizer")
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert found.loc["adamw", ["mean", "low", "high"]].tolist() == pytest.approx([7 / 3, low, high])
    assert found.loc["muon", "mean"] == 2 and np.isnan(found.loc["muon", "low"]) and found.n.tolist() == [3, 2]
    assert [t_interval(values).certain for values in ([1.0, 3.0], [1.0], [])] == [True, False, False]


def test_a_ratio_is_welchs_interval_of_logarithms():
    adamw, muon = np.array([0.1, 0.12, 0.09, 0.15]), np.array([0.2, 0.3, 0.25])
    found = estimates.ratios(table(s_adamw=adamw, s_muon=muon), "increase").set_index("optimizer")
    welch = stats.ttest_ind(np.log(muon), np.log(adamw), equal_var=False).confidence_interval(0.95)
    ratio = stats.gmean(muon) / stats.gmean(adamw)
    assert found.loc["muon", ["ratio", "low", "high"]].tolist() == pytest.approx([ratio, *np.exp(welch)])
    assert found.loc["adamw", "ratio"] == 1 and np.isnan(found.loc["adamw", "low"])
    assert found.n.to_dict() == {"adamw": 4, "muon": 3}


def test_what_ratios_are_taken_of():
    """Over sizes unweighted, of those with three seeds; with the reference of each `by`; without what has no log."""
    few, more, many = np.ones(2), np.array([1.0, 1.1, 0.9]), np.array([1.0, 1.1, 0.9, 1.0])
    rows = table(s_adamw=many, s_muon=2 * many, m_adamw=more, m_muon=8 * more, l_adamw=few, l_muon=100 * few)
    found = estimates.ratios(rows, "increase").query("optimizer == 'muon'").set_index("size")
    assert found.ratio.to_dict() == pytest.approx({"s": 2, "m": 8, "l": 100, ALL_SIZES: 4})  # sqrt(2 * 8)
    assert found.low[ALL_SIZES] < 4 < found.high[ALL_SIZES] and found.n[ALL_SIZES] == 3 and np.isnan(found.low["l"])
    ways = pd.concat([rows.assign(way="a"), table(s_adamw=10.0, s_muon=5.0).assign(way="b")])
    by = estimates.ratios(ways, "increase", ("way",)).query("optimizer == 'muon' and size == 's'").set_index("way")
    assert by.ratio.to_dict() == pytest.approx({"a": 2, "b": 0.5})
    rows = table(s_muon=more, m_adamw=[1.0, 2.0, -1.0], m_muon=[4.0, 8.0, 16.0])
    found = estimates.ratios(rows, "increase")
    assert set(found["size"]) == {"m"} and found.n.tolist() == [2, 2]
    assert estimates.ratios(rows[rows.optimizer == "muon"], "increase").empty


def test_centred_means_take_the_size_out():
    """Ten times larger values at one size change nothing, and the means over optimizers are 0."""
    small = {f"s_{name}": np.exp(RNG.normal(size=4)) for name in ("adamw", "muon", "soap")}
    rows = table(**small, **{f"m{key[1:]}": 10 * values for key, values in small.items()})
    rows = rows.assign(R_L=rows.increase**2)
    one, two = (estimates.centred(of, ["increase", "R_L"]) for of in (rows[rows["size"] == "s"], rows))
    assert one.increase.sum() == pytest.approx(0) and two.increase.tolist() == pytest.approx(one.increase.tolist())
    assert two.R_L.tolist() == pytest.approx((2 * two.increase).tolist()) and two.n.tolist() == ["4/4"] * 3
    _, high = stats.t.interval(0.95, 3, scale=stats.sem(np.log(small["s_muon"])))
    assert one.increase_half[1] == pytest.approx(high) and (two.increase_half < one.increase_half).all()
    lacking = estimates.centred(table(s_adamw=1.0, s_muon=np.e, m_adamw=5.0), ["increase"])
    assert lacking.increase.tolist() == pytest.approx([-0.5, 0.5]) and lacking.n.tolist() == ["1", "1"]
    assert lacking.increase_half.isna().all()
    assert estimates.centred(table(s_adamw=1.0, m_muon=2.0), ["increase"]).empty


# ------------------------------------------------------------------------------------------------------ correlations


def test_correlations_agree_with_scipy():
    x, y = RNG.normal(size=(2, 6))
    expected = [stats.pearsonr(np.delete(x, i), np.delete(y, i)).statistic for i in range(6)]
    np.testing.assert_allclose(leave_one_out(x, y), expected)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    rows = pd.DataFrame(RNG.normal(size=(30, 3)), columns=["x", "z", "noise"]).assign(y=lambda of: of.x + of.noise)
    found = correlations(rows, candidates=("x", "z"), targets=("noise", "y")).set_index(["target", "candidate"])
    row, theirs = found.loc[("y", "x")], stats.pearsonr(rows.x, rows.y)
    assert row.pearson == pytest.approx(theirs.statistic) and row.n == 30
    assert row.spearman == pytest.approx(stats.spearmanr(rows.x, rows.y).statistic)
    # Fisher's interval, a different method: about the same
    assert [row.pearson_low, row.pearson_high] == pytest.approx([*theirs.confidence_interval(0.95)], abs=0.12)
    alone = correlations(rows, candidates=("z",), targets=("y",)).iloc[0]  # whatever else is asked for
    assert found.loc[("y", "z")].tolist() == alone.tolist()[2:]


def test_within_groups_the_groups_themselves_do_not_correlate():
    group, noise = np.repeat([0.0, 10.0, 20.0], 40), np.random.default_rng(1).normal(size=(2, 120))
    rows = pd.DataFrame({"x": group + noise[0], "y": group + noise[1], "size": group})
    pooled, within = (correlations(rows, by, ("x",), ("y",)).iloc[0] for by in (None, "size"))
    assert pooled.pearson > 0.95
    assert abs(within.pearson) < 0.25 and within.pearson_low < 0 < within.pearson_high


def test_too_few_points_have_no_interval():
    rows = pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 4.0]})
    few, constant = (correlations(of, None, ("x",), ("y",)).iloc[0] for of in (rows, rows.assign(x=1.0)))
    assert few.n == 3 and few.pearson > 0.9 and np.isnan(few.pearson_low) and np.isnan(constant.pearson)


# ------------------------------------------------------------------------------------------------------- comparisons


def test_optimizers_are_compared_at_the_sizes_that_have_enough_runs():
    both = Comparison(runs(), "value")
    assert both.mean("muon").value == pytest.approx(0.8) and both.mean("muon").high < 0.9  # sizes lie 1 apart
    assert (both.over, both.n()) == ("over small and large", "n 6 each")
    assert both.order == ["shampoo", "muon", "scion", "soap", "adamw", "psgd"]
    some = Comparison(pd.concat([runs(sizes=("small",)), runs(seeds=1, sizes=("large",))]), "value")
    assert some.sizes == ["small"] and some.certain and some.caveat == ""
    with pytest.raises(NothingToCompare, match=r"Shampoo and SOAP yet \(so far: AdamW, Muon, PSGD, Scion and SOAP\)"):
        Comparison(runs().query("optimizer != 'shampoo'"), "value")


@pytest.mark.parametrize(("seeds", "reason"), [(1, "One seed:"), (2, "Fewer than 3 seeds of some optimizer:")])
def test_too_few_seeds_have_no_interval_and_say_why(seeds, reason):
    compared = Comparison(runs(seeds=seeds), "value")
    difference = compared.difference("muon", "soap")
    assert not compared.mean("muon").certain and not difference.certain and difference.value == pytest.approx(-0.1)
    assert compared.caveat.strip().startswith(reason) and "no interval" in compared.caveat


def test_words():
    told = [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])]
    assert told == ["none", "a", "a and b", "a, b and c"]
    assert Estimate(0.1234, 0.1, 0.2).text() == "0.123 [0.100, 0.200]" and Estimate(0.1234).text(1) == "0.1"
    assert Estimate(0.0, -1.0, 1.0).map(np.exp).interval == pytest.approx((1, 1 / np.e, np.e))
