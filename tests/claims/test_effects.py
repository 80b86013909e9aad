"""Effects against AdamW within pairs, and the choice that follows: made-up tables whose answer is known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from beyond_outliers.claims import decisions
from beyond_outliers.claims.readings import Quantity
from made_up_runs import Made, runs

LEVELS = {"adamw": 3.0, "muon": 2.8, "psgd": 3.1, "scion": 2.85, "shampoo": 2.9, "soap": 2.95}
ADDED = {"adamw": 0.2, "muon": 0.5, "psgd": 0.2, "scion": 0.3, "shampoo": 0.1, "soap": 0.3}  # by rounding
BATCHES = [0.0, 0.4, -0.3, 0.1]  # what a seed adds to all optimizers alike
OWN = {name: [0.0, 0.0, 0.02, -0.02] for name in LEVELS} | {"adamw": [0.0, 0.01, -0.01, 0.0]}  # what is left of noise


def losses(levels=LEVELS, seeds=3, sizes=("s", "l"), paired=0.0):
    noise = lambda name, seed: paired * BATCHES[seed] + OWN[name][seed]  # noqa: E731
    return runs(levels, seeds, sizes, 10, noise).rename(columns={"value": "val_loss"})


def made(seeds=3, qat=False, levels=LEVELS):
    """Runs in full precision and (where asked for) QAT; damage at both checkpoints; no propagation, no outliers."""
    full = losses(levels, seeds)
    rows = full.assign(spec="W4A4", increase=full.optimizer.map(ADDED))
    common = rows.assign(checkpoint="common", increase=2 * rows.increase, val_loss=99.0)
    final = rows.assign(checkpoint="final", val_loss=rows.val_loss + rows.increase)
    dearer = losses({name: levels[name] + 0.4 - 0.1 * (name == "soap") for name in levels}, seeds)
    return Made({"full_precision": full, "qat": dearer if qat else None}, "W4A4", ptq=pd.concat([final, common]))


def test_an_effect_is_the_mean_of_differences_within_pairs():
    """One size: scipy's paired t test; what a seed adds to both runs of a pair takes no part."""
    table = losses(seeds=4, sizes=("s",), paired=5.0)
    study = Made({"full_precision": table}, "W4A4")
    found = decisions.effects(study).set_index(["quantity", "optimizer"]).loc[("loss", "muon")]
    one, two = (table.val_loss[table.optimizer == name].to_numpy() for name in ("muon", "adamw"))
    expected = one.mean() - two.mean(), *stats.ttest_rel(one, two).confidence_interval(0.95)
    assert (found.effect, found.low, found.high) == pytest.approx(expected) and (found.n, found.over) == (4, "s")


def test_sizes_do_not_add_to_the_spread_and_every_quantity_has_its_rows():
    table = decisions.effects(made(qat=True)).set_index(["quantity", "optimizer"])
    expected = {"loss": -0.1, "common": -0.2, "final": -0.1, "qat": 0.0}
    assert list(table.index.unique("quantity")) == list(expected)
    assert [table.effect[of, "shampoo"] for of in expected] == pytest.approx([*expected.values()], abs=0.01)
    assert table.n["loss", "psgd"] == 6 and table.over["loss", "psgd"] == "s and l"
    assert table.high["loss", "muon"] - table.low["loss", "muon"] < 0.1  # sizes lie 10 nats apart
    few = decisions.effects(made(seeds=1))
    assert few.effect.notna().all() and few.low.isna().all() and (few.n == 2).all()


def test_ratios_are_of_geometric_means():
    table = losses(seeds=3, sizes=("s",)).assign(R_L=lambda rows: np.where(rows.optimizer == "muon", 2.0, 0.5))
    table.loc[(table.optimizer == "muon") & (table.seed == 1), "R_L"] = 4.0
    pairs = decisions.against(Quantity("R_L", "times", lambda of: of, "R_L").read(table))
    assert np.exp(pairs.effect[pairs.optimizer == "muon"].mean()) == pytest.approx((4 * 8 * 4) ** (1 / 3))


def test_runs_without_a_partner_are_left_out():
    table = losses().set_index(["optimizer", "seed", "size"]).sort_index().drop(("adamw", 2, "l"))
    table.loc[("muon", 0, "s"), "val_loss"] = np.nan
    pairs = decisions.against(table.reset_index(), "val_loss")
    assert pairs.groupby("optimizer").size().to_dict() == {n: 4 if n == "muon" else 5 for n in LEVELS if n != "adamw"}


def test_the_table_names_what_is_not_measured_yet():
    table = decisions.effect_table(made()).set_index("optimizer")
    assert list(table.index) == ["Muon", "PSGD", "Scion", "Shampoo", "SOAP"]
    assert table.loc["Shampoo", "W4A4 increase at the end (nats)"] == "-0.100 [-0.100, -0.100], n 6"
    for missing in ("increase by training in 4 bits (QAT) (nats)", "R_L at the end (times AdamW)"):
        assert set(table[missing]) == {"not measured yet"}


def test_the_decision_is_by_the_loss_that_one_ends_with():
    """Muon is best as trained and worst hurt; Shampoo ends lowest after rounding; SOAP gains nothing by QAT here."""
    table = decisions.decisions(made(qat=True)).set_index("you deploy with")
    told = table["train with"]
    assert told[[decisions.NONE, decisions.QAT, decisions.W4]].tolist() == ["**Muon**", "**Muon**", decisions.GAP]
    train, runner_up, n = table.loc["RTN to W4A4, head kept"]
    assert (train, n) == ("**Shampoo**", 6) and runner_up.startswith("Scion +0.150 [")
    near = decisions.decisions(made(levels=LEVELS | {"scion": 2.801})).set_index("you deploy with")["train with"]
    assert near[decisions.NONE] == "**Muon (or Scion)**" and near[decisions.QAT] == decisions.GAP
