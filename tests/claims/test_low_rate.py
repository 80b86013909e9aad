"""An optimizer at two rates, seed by seed, and its place among the others."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

from beyond_outliers.claims import effects, low_rate
from beyond_outliers.study import Study

LOSSES = {"adamw": [3.6, 3.7, 3.5, 3.6], "muon": [3.4, 3.5, 3.4, 3.4], "soap": [3.3, 3.3, 3.2, 3.3]}


@pytest.fixture
def study(monkeypatch):
    """One value, compared as a difference and as a ratio; seeds 200 to 203 of three optimizers at two sizes."""
    rows = [("a", "0.08M", name, 200 + i, loss) for name, of in LOSSES.items() for i, loss in enumerate(of)]
    rows += [("b", "0.16M", name, seed, 1.0) for _, _, name, seed, _ in rows]
    table = pd.DataFrame(rows, columns=["kind", "size", "optimizer", "seed", "value"])
    monkeypatch.setattr(low_rate, "OWN", {"loss": "val_loss", "R_L": "R_L_end"})
    units = {"loss": effects.NATS, "R_L": effects.TIMES}
    compared = {name: effects.Quantity(name, unit, lambda _: table, "value") for name, unit in units.items()}
    monkeypatch.setattr(low_rate, "COMPARED", compared)
    return SimpleNamespace(scale="another", protocol=SimpleNamespace(measure=SimpleNamespace(primary="W4A4+head")))


def test_differences_are_paired_and_places_counted(study):
    lower = np.array([3.35, 3.47, 3.3, 3.4])
    low = pd.DataFrame(
        {"optimizer": "adamw", "seed": [203, 202, 201, 200], "val_loss": lower[::-1], "R_L_end": 2 * lower[::-1]}
    )
    loss, error = low_rate.compared(study, low).itertuples()
    test = ttest_rel(lower, LOSSES["adamw"])
    low_end, high_end = test.confidence_interval()
    assert loss.difference == f"{(lower - LOSSES['adamw']).mean():.3f} [{low_end:.3f}, {high_end:.3f}]"
    assert (loss.n, *loss[-3:]) == (4, 3, 2, "SOAP 3.275, Muon 3.425")
    ratio = np.exp(np.log(2 * lower / LOSSES["adamw"]).mean())
    assert error.difference.startswith(f"{ratio:.2f} [") and error[-2] == 3


def test_seeds_without_a_partner_are_left_out(study):
    low = pd.DataFrame({"optimizer": "adamw", "seed": [200, 201, 299], "val_loss": [3.5, 3.6, 9.0], "R_L_end": 1.0})
    assert low_rate.compared(study, low).n.tolist() == [2, 2]


def test_the_rule_over_all_rates(monkeypatch, tmp_path):
    """.5 ends 0.01 above the lowest and is smaller: named; .25 is too far above, and what diverged does not count."""

    def runs(losses, **columns):
        return pd.DataFrame(
            {"size": "0.08M", "optimizer": "adamw", "lr": list(losses), "val_loss": list(losses.values())} | columns
        )

    runs({0.5: 3.01, 0.25: 3.02, 0.125: 2.0}).assign(status=["finished", "finished", "diverged"]).to_csv(tmp_path / "a")
    runs({8.0: 3.3}, status="finished").to_csv(tmp_path / "b")
    monkeypatch.setattr(low_rate, "TRIED_SINCE", [tmp_path / "a", tmp_path / "b"])
    monkeypatch.setattr(low_rate.rates, "line", lambda _: runs({1.0: 3.0, 2.0: 3.1, 4.0: 3.05}, status="finished"))
    tuning = SimpleNamespace(tolerance=0.015)
    chosen = {("0.08M", "adamw"): SimpleNamespace(lr=4.0)}
    found = low_rate.wider(SimpleNamespace(protocol=SimpleNamespace(tuning=tuning), rates=chosen)).iloc[0]
    assert found.tolist() == ["AdamW", 6, 4.0, 3.05, 1.0, 3.0, pytest.approx(0.05), 0.5]


def test_the_committed_runs_differ_from_the_study_in_their_rate_alone():
    every, study = low_rate.runs(), Study(low_rate.SCALE)
    changed = {name: lr for name, lr in low_rate.named(study).items() if lr != study.rates[low_rate.SIZE, name].lr}
    assert (
        changed == every.groupby("optimizer").lr.first().to_dict()
        and every.groupby("optimizer").lr.nunique().eq(1).all()
    )
    for name, low in every.groupby("optimizer"):
        full = study.runs("full_precision")
        full = full[(full["size"] == low_rate.SIZE) & (full.optimizer == name)]
        assert sorted(low.seed) == sorted(full.seed)
        same = ["hyper", "steps", "tokens", "weight_decay", "n_parameters", "corpus", "batch_size", "context"]
        assert len(pd.concat([low, full])[same].drop_duplicates()) == 1
