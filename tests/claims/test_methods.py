"""Quantizers beside round-to-nearest: readings of tables made by hand, and correlations against scipy's."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from beyond_outliers.claims import methods
from beyond_outliers.study import Study
from made_up_runs import Made


def quantized(increase, primary="W4A4", seeds=3, optimizers=("adamw", "muon", "soap"), sizes=("s", "m")):
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


WAYS = {
    "none": lambda place, seed: 0.0,
    "W4A4+head": rtn,
    "W4A4": lambda place, seed: 9.0,  # no head: not the scale's primary way
    "W4A4+gptq+head": lambda place, seed: rtn(place, seed) / 2,
    "W4A4+rot+gptq+head": lambda place, seed: 1 / rtn(place, seed),
    "W8A8+head": lambda place, seed: 9.0,
    "mxfp4+head": rtn,
}
STUDY = quantized(WAYS, "W4A4+head")
ROWS = methods.measured(STUDY)
BOTH = {"W4A4": rtn, "W4A4+rot": rtn}


def test_rows_are_those_of_the_primary_head_at_the_end():
    assert list(dict.fromkeys(zip(ROWS.format, ROWS.method, strict=True))) == [
        ("int4", "RTN"), ("int4", "GPTQ"), ("int4", "rotation + GPTQ"), ("mxfp4", "RTN"),
    ]  # fmt: skip
    assert len(ROWS) == 4 * 9 and 9 not in set(ROWS.increase)


def test_what_is_not_measured_is_said():
    parts = ["int4 by rotation at s", "int4 by any method at m", "mxfp4 by GPTQ, rotation, rotation + GPTQ at s"]
    parts += ["mxfp4 by any method at m", "nvfp4 by any method at s, m"]
    assert methods.missing(STUDY) == "Not measured at scale `made up`:\n\n" + "\n".join(f"- {part}" for part in parts)
    assert methods.missing(quantized(dict.fromkeys(methods.SPECS, rtn), sizes=["s"])) == ""


def test_damages_as_text():
    table = methods.by_method(ROWS)
    assert list(table.columns) == ["RTN", "GPTQ", "rotation + GPTQ", "runs"]
    low, high = stats.t.interval(0.95, 2, loc=0.11, scale=stats.sem([0.1, 0.11, 0.12]))
    assert table.loc[("int4", "s", "adamw"), "RTN"] == f"0.110 [{low:.3f}, {high:.3f}]"
    assert table.loc[("mxfp4", "s", "adamw"), "GPTQ"] == ""
    assert methods.by_method(ROWS, "val_loss").loc[("int4", "s", "soap"), "RTN"][:5] == "3.310"


def test_what_is_left_is_paired_by_run():
    table, ends = methods.left(ROWS).set_index(["method", "optimizer"]), ["left", "low", "high"]
    assert table.loc[("GPTQ", "muon"), ends].tolist() == pytest.approx([0.5] * 3)
    expected = stats.gmean([1 / rtn(0, seed) ** 2 for seed in range(3)])
    assert table.loc[("rotation + GPTQ", "adamw"), "left"] == pytest.approx(expected)
    over = methods.left_over_optimizers(table.reset_index()).set_index("method")
    assert over.loc["GPTQ", [*ends, "optimizers"]].tolist() == pytest.approx([0.5] * 3 + [3])


@pytest.mark.parametrize("n", [3, 6])
def test_the_rank_correlation_is_that_of_scipy(n):
    x, y = np.random.default_rng(n).normal(size=(2, 40, n))
    tau = [stats.kendalltau(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert methods.kendall(x, y).tolist() == pytest.approx(tau)


def agreement(ways, seeds=3, **options):
    return methods.agreement(methods.measured(quantized(ways, seeds=seeds, **options)))


def test_whether_an_order_survives():
    """Optimizers that only the seeds tell apart: the same runs under both methods stay in the same order in every
    draw; independent ones do not. Few seeds have no interval, and two optimizers no order."""
    found = methods.agreement(ROWS).set_index("method")
    assert found.loc["GPTQ", ["kendall", "kendall_low", "kendall_high"]].tolist() == [1, 1, 1]
    assert found.loc["rotation + GPTQ", ["kendall", "kendall_high"]].tolist() == [-1, -1]
    noise, other = 1 + 0.3 * np.random.default_rng(0).random((2, 3, 5))
    ways = {"W4A4": lambda *of: noise[of], "W4A4+rot": lambda *of: 2 * noise[of]}
    assert agreement(ways, 5).kendall_low.tolist() == [1]
    (row,) = agreement(ways | {"W4A4+rot": lambda *of: other[of]}, 5).itertuples()
    assert row.kendall_low < row.kendall_high
    (row,) = agreement(BOTH, 2).itertuples()
    assert row.kendall == 1 and np.isnan(row.kendall_low)
    assert agreement(BOTH, optimizers=("adamw", "muon")).empty


def test_the_finding_follows_the_numbers():
    text = methods.order_in_words(STUDY)
    assert text.startswith("Other methods change the order of the optimizers under round to nearest (RTN), in int4.\n")
    for said in ("- s, n 3: Muon's damage is 1.91 [", "Under rotation + GPTQ it is 0.52 [",
                 ": more under RTN, less under rotation + GPTQ.",
                 "rotation + GPTQ and RTN order 0% of the pairs alike (Kendall's tau -1.00"):  # fmt: skip
        assert said in text
    assert text.endswith(methods.missing(STUDY))
    few = methods.order_in_words(quantized(BOTH, seeds=1))
    assert "n 1: Muon's damage is 2.00 times" in few and ": too few seeds for an interval." in few
    alone = quantized({"W4A4": rtn})
    assert methods.order_in_words(alone) == methods.missing(alone)
    assert "int4 by GPTQ, rotation + GPTQ" in methods.order_in_words(Study("laptop"))  # which has no GPTQ
