"""Optimizers beside each other, against scipy's intervals and numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from beyond_outliers.claims import relative


def table(**cells):
    """ "s_adamw": values of its seeds -> rows; sizes and optimizers in the order given."""
    rows = [
        (*key.split("_"), seed, value)
        for key, values in cells.items()
        for seed, value in enumerate(np.atleast_1d(values))
    ]
    return pd.DataFrame(rows, columns=["size", "optimizer", "seed", "increase"])


def test_a_mean_has_the_t_interval_of_scipy_from_three_seeds_on():
    found = relative.means(table(s_adamw=[1.0, 2.0, 4.0], s_muon=[1.0, 3.0]), "increase").set_index("optimizer")
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert found.loc["adamw", ["mean", "low", "high"]].tolist() == pytest.approx([7 / 3, low, high])
    assert found.loc["muon", "mean"] == 2 and np.isnan(found.loc["muon", "low"]) and found.n.tolist() == [3, 2]


def test_a_ratio_is_welchs_interval_of_logarithms():
    adamw, muon = np.array([0.1, 0.12, 0.09, 0.15]), np.array([0.2, 0.3, 0.25])
    found = relative.ratios(table(s_adamw=adamw, s_muon=muon), "increase").set_index("optimizer")
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
    found = relative.ratios(rows, "increase").query("optimizer == 'muon'").set_index("size")
    assert list(found.index) == ["s", "m", "l", relative.ALL_SIZES]
    over = found.loc[relative.ALL_SIZES]
    assert over.ratio == pytest.approx(4) and over.low < 4 < over.high and over.n == 3  # sqrt(2 * 8)
    assert found.ratio["l"] == pytest.approx(100) and np.isnan(found.low["l"])


def test_sizes_without_the_reference_and_values_without_a_logarithm_are_left_out():
    rows = table(s_muon=[1.0, 1.0, 1.0], m_adamw=[1.0, 2.0, -1.0], m_muon=[4.0, 8.0, 16.0])
    found = relative.ratios(rows, "increase")
    assert set(found["size"]) == {"m"}
    assert found.set_index("optimizer").n.to_dict() == {"adamw": 2, "muon": 2}
    assert relative.ratios(rows[rows.optimizer == "muon"], "increase").empty


def test_every_value_of_by_is_compared_with_its_own_reference():
    rows = pd.concat([table(s_adamw=1.0, s_muon=2.0).assign(way="a"), table(s_adamw=10.0, s_muon=5.0).assign(way="b")])
    found = relative.ratios(rows, "increase", ("way",)).query("optimizer == 'muon'").set_index("way")
    assert found.ratio.to_dict() == {"a": pytest.approx(2), "b": pytest.approx(0.5)}


def test_centred_means_take_the_size_out():
    """Ten times larger values at one size change nothing, and the means over optimizers are 0."""
    rng = np.random.default_rng(0)
    small = {f"s_{name}": np.exp(rng.normal(size=4)) for name in ("adamw", "muon", "soap")}
    both = table(**small, **{f"m{key[1:]}": 10 * values for key, values in small.items()})
    both = both.assign(R_L=both.increase**2)
    one = relative.centred(both[both["size"] == "s"], ["increase", "R_L"])
    two = relative.centred(both, ["increase", "R_L"])
    assert one.increase.sum() == pytest.approx(0) and two.increase.tolist() == pytest.approx(one.increase.tolist())
    assert two.R_L.tolist() == pytest.approx((2 * two.increase).tolist())
    low, high = stats.t.interval(0.95, 3, scale=stats.sem(np.log(small["s_muon"])))
    assert one.set_index("optimizer").increase_half["muon"] == pytest.approx((high - low) / 2)
    assert two.n.tolist() == ["4/4"] * 3 and (two.increase_half < one.increase_half).all()


def test_a_size_that_lacks_an_optimizer_is_not_centred():
    rows = table(s_adamw=1.0, s_muon=np.e, m_adamw=5.0)
    found = relative.centred(rows, ["increase"]).set_index("optimizer")
    assert found.increase.to_dict() == {"adamw": pytest.approx(-0.5), "muon": pytest.approx(0.5)}
    assert found.n.to_dict() == {"adamw": "1", "muon": "1"} and found.increase_half.isna().all()
    assert relative.centred(table(s_adamw=1.0, m_muon=2.0), ["increase"]).empty
