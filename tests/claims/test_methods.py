"""Quantizers beside round-to-nearest: readings of tables made by hand, and correlations against scipy's."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from beyond_outliers.claims import methods
from beyond_outliers.study import Study
from made_up_runs import Made


def quantized(increase, primary="W4A4+head", seeds=3, optimizers=("adamw", "muon", "soap"), sizes=("s", "m")):
    """A study whose table ptq has `increase[spec](optimizer place, seed)` at the end of one of its sizes."""
    rows = [
        (f"{name}{seed}", "s", name, 0.1, seed, spec, 3 + value(place, seed), value(place, seed), checkpoint)
        for spec, value in increase.items()
        for place, name in enumerate(optimizers)
        for seed in range(seeds)
        for checkpoint in ("final", "common")
    ]
    columns = ["run", "size", "optimizer", "lr", "seed", "spec", "val_loss", "increase", "checkpoint"]
    return Made(primary=primary, protocol={"sizes": sizes}, ptq=pd.DataFrame(rows, columns=columns))


def rtn(place, seed):
    return 0.1 * (1 + place) + 0.01 * seed


@pytest.fixture
def study():
    return quantized(
        {
            "none": lambda place, seed: 0.0,
            "W4A4+head": rtn,
            "W4A4": lambda place, seed: 9.0,  # no head: not the scale's primary way
            "W4A4+gptq+head": lambda place, seed: rtn(place, seed) / 2,
            "W4A4+rot+gptq+head": lambda place, seed: 1 / rtn(place, seed),
            "W8A8+head": lambda place, seed: 9.0,
            "mxfp4+head": rtn,
        }
    )


def test_specs_have_their_format_and_method():
    assert methods.SPECS["W4A4+rot+gptq"] == ("int4", "rotation + GPTQ") and methods.SPECS["nvfp4"] == ("nvfp4", "RTN")
    assert len(methods.SPECS) == 12 and not {"W4", "Wmxfp4", "none"} & set(methods.SPECS)


def test_rows_are_those_of_the_primary_head_at_the_end(study):
    rows = methods.measured(study)
    assert list(dict.fromkeys(zip(rows.format, rows.method, strict=True))) == [
        ("int4", "RTN"), ("int4", "GPTQ"), ("int4", "rotation + GPTQ"), ("mxfp4", "RTN"),
    ]  # fmt: skip
    assert len(rows) == 4 * 9 and 9 not in set(rows.increase)


def test_what_is_not_measured_is_said(study):
    parts = ["int4 by rotation at s", "int4 by any method at m", "mxfp4 by GPTQ, rotation, rotation + GPTQ at s"]
    parts += ["mxfp4 by any method at m", "nvfp4 by any method at s, m"]
    assert methods.missing(study) == "Not measured at scale `made up`:\n\n" + "\n".join(f"- {part}" for part in parts)
    specs = [f"{first}{way}+head" for first in methods.FORMATS for way in ("", "+gptq", "+rot", "+rot+gptq")]
    assert methods.missing(quantized({spec: rtn for spec in specs}, sizes=["s"])) == ""


def test_damages_as_text(study):
    table = methods.by_method(methods.measured(study))
    assert list(table.columns) == ["RTN", "GPTQ", "rotation + GPTQ", "runs"]
    low, high = stats.t.interval(0.95, 2, loc=0.11, scale=stats.sem([0.1, 0.11, 0.12]))
    assert table.loc[("int4", "s", "adamw"), "RTN"] == f"0.110 [{low:.3f}, {high:.3f}]"
    assert table.loc[("mxfp4", "s", "adamw"), "GPTQ"] == ""
    assert methods.by_method(methods.measured(study), "val_loss").loc[("int4", "s", "soap"), "RTN"][:5] == "3.310"


def test_what_is_left_is_paired_by_run(study):
    table = methods.left(methods.measured(study)).set_index(["method", "optimizer"])
    assert table.loc[("GPTQ", "muon"), ["left", "low", "high"]].tolist() == pytest.approx([0.5] * 3)
    expected = stats.gmean([1 / rtn(0, seed) ** 2 for seed in range(3)])
    assert table.loc[("rotation + GPTQ", "adamw"), "left"] == pytest.approx(expected)
    over = methods.left_over_optimizers(table.reset_index()).set_index("method")
    assert over.loc["GPTQ", ["left", "low", "high"]].tolist() == pytest.approx([0.5] * 3)
    assert over.optimizers.tolist() == [3, 3]


@pytest.mark.parametrize("n", [3, 6])
def test_rank_correlations_are_those_of_scipy(n):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(2, 40, n))
    for ours, theirs in ((methods.kendall, stats.kendalltau), (methods.spearman, stats.spearmanr)):
        assert ours(x, y).tolist() == pytest.approx([theirs(a, b).statistic for a, b in zip(x, y, strict=True)])


def test_an_order_that_survives_and_one_that_turns_round(study):
    found = methods.agreement(methods.measured(study)).set_index("method")
    assert found.loc["GPTQ", ["kendall", "kendall_low", "kendall_high", "spearman"]].tolist() == [1, 1, 1, 1]
    assert found.loc["rotation + GPTQ", ["kendall", "kendall_high", "spearman"]].tolist() == [-1, -1, -1]


def test_the_bootstrap_keeps_what_a_run_shares():
    """Optimizers that only the seeds tell apart: the same runs under both methods stay in the same order in every
    draw; independent ones do not."""
    rng = np.random.default_rng(0)
    noise, other = 1 + 0.3 * rng.random((2, 3, 5))
    ways = {"W4A4": lambda place, seed: noise[place, seed], "W4A4+rot": lambda place, seed: 2 * noise[place, seed]}
    study = quantized(ways, "W4A4", seeds=5)
    assert methods.agreement(methods.measured(study)).kendall_low.tolist() == [1]
    study = quantized(ways | {"W4A4+rot": lambda place, seed: other[place, seed]}, "W4A4", seeds=5)
    (row,) = methods.agreement(methods.measured(study)).itertuples()
    assert row.kendall_low < row.kendall_high


def test_few_seeds_have_no_interval_and_two_optimizers_no_order():
    ways = {"W4A4": rtn, "W4A4+rot": rtn}
    (row,) = methods.agreement(methods.measured(quantized(ways, "W4A4", seeds=2))).itertuples()
    assert row.kendall == 1 and np.isnan(row.kendall_low)
    assert methods.agreement(methods.measured(quantized(ways, "W4A4", optimizers=("adamw", "muon")))).empty


def test_the_finding_follows_the_numbers(study):
    text = methods.order_in_words(study)
    assert text.startswith("What other methods leave of the order under round to nearest (RTN), in int4:\n\n- s")
    assert "- s, n 3: Muon's damage is 1.91 [" in text and "Under rotation + GPTQ it is 0.52 [" in text
    assert ": more under RTN, less under rotation + GPTQ." in text
    assert "rotation + GPTQ and RTN order 0% of the pairs alike (Kendall's tau -1.00" in text
    assert text.endswith(methods.missing(study))
    few = methods.order_in_words(quantized({"W4A4": rtn, "W4A4+rot": rtn}, "W4A4", seeds=1))
    assert "n 1: Muon's damage is 2.00 times" in few and ": too few seeds for an interval." in few
    alone = methods.order_in_words(quantized({"W4A4": rtn}, "W4A4"))
    assert alone == methods.missing(quantized({"W4A4": rtn}, "W4A4"))


def test_the_committed_scale_without_gptq_says_so():
    study = Study("laptop")
    assert set(methods.measured(study).method) == {"RTN", "rotation"}
    assert "int4 by GPTQ, rotation + GPTQ" in methods.order_in_words(study)
