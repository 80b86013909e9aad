"""Tuning runs: the line of rates, what rates leave after quantization, and the rates that the searches did not find."""

from types import SimpleNamespace

import pandas as pd
import pytest

from beyond_outliers.claims import readings
from beyond_outliers.study import Study


class Sweep:
    """Tuning runs: (optimizer, lr, embedding rate, seed, loss before, damage, status)."""

    scale = "made up"

    def __init__(self, rows, tuned=False, chosen=None):
        self.protocol = SimpleNamespace(tuned=tuned, measure=SimpleNamespace(primary="W4A4+head"))
        columns = ["optimizer", "lr", "embedding", "seed", "before", "increase", "status"]
        self.rows = pd.DataFrame(rows, columns=columns)
        self.rows["run"] = [f"r{place}" for place in self.rows.index]
        self.rows["size"] = "s"
        self.rows["hyper"] = [f'{{"embedding_lr": {rate}}}' for rate in self.rows.embedding]
        self.chosen = pd.DataFrame(chosen or [], columns=["size", "optimizer", "auxiliary"])

    def runs(self, purpose):
        assert purpose == "sweep"
        return self.rows[["run", "size", "optimizer", "lr", "seed", "hyper", "status"]]

    def table(self, name):
        assert name == "learning_rates"
        return self.chosen

    def measured(self, name, purpose):
        rows = self.rows[self.rows.status == "finished"].assign(checkpoint="final", spec="W4A4+head")
        rows = rows.assign(val_loss=rows.before + rows.increase)
        return pd.concat([rows, rows.assign(spec="W4A4", increase=9.0)])


GRID = [
    ("muon", 0.1, 0.5, 0, 3.0, 0.4, "finished"),
    ("muon", 0.1, 0.5, 1, 3.2, 0.2, "finished"),
    ("muon", 0.05, 0.5, 0, 3.2, 0.1, "finished"),
    ("adamw", 0.1, 0.5, 0, 3.3, 0.1, "finished"),
    ("adamw", 0.2, 0.5, 0, 9.0, 0.1, "diverged"),
]


def test_losses_are_means_over_seeds_in_the_primary_format():
    table = readings.before_and_after(Sweep(GRID)).set_index(["optimizer", "lr"])
    found = table.loc[("muon", 0.1), ["before", "after", "damage", "seeds"]].tolist()
    assert found == pytest.approx([3.1, 3.4, 0.3, 2])
    assert ("adamw", 0.2) not in table.index


def test_a_tuned_scale_has_the_line_at_the_chosen_auxiliary_rate():
    rows = [("muon", 0.1, 0.5, 0, 3.0, 0.4, "finished"), ("muon", 0.1, 0.25, 0, 2.9, 0.4, "finished")]
    study = Sweep(rows, tuned=True, chosen=[("s", "muon", 0.5)])
    assert readings.rate_line(study).run.tolist() == ["r0"]
    assert readings.rate_line(Sweep(rows, tuned=True)).empty  # nothing is chosen yet
    assert len(readings.rate_line(Sweep(rows))) == 2


def test_the_rule_over_all_rates(monkeypatch, tmp_path):
    """.5 ends 0.01 above the lowest and is smaller: named; .25 is too far above, and what diverged does not count."""

    def runs(losses, **columns):
        return pd.DataFrame(
            {"size": "0.08M", "optimizer": "adamw", "lr": list(losses), "val_loss": list(losses.values())} | columns
        )

    runs({0.5: 3.01, 0.25: 3.02, 0.125: 2.0}).assign(status=["finished", "finished", "diverged"]).to_csv(tmp_path / "a")
    runs({8.0: 3.3}, status="finished").to_csv(tmp_path / "b")
    monkeypatch.setattr(readings, "TRIED_SINCE", [tmp_path / "a", tmp_path / "b"])
    monkeypatch.setattr(readings, "rate_line", lambda _: runs({1.0: 3.0, 2.0: 3.1, 4.0: 3.05}, status="finished"))
    study = SimpleNamespace(protocol=SimpleNamespace(tuning=SimpleNamespace(tolerance=0.015)))
    assert len(readings.tried_since(study)) == 6 and readings.named_rates(study).to_dict() == {"adamw": 0.5}


def test_the_committed_runs_differ_from_the_study_in_their_rate_alone():
    every, study = readings.found_rates(), Study("confirm")
    changed = {name: lr for name, lr in readings.named_rates(study).items() if lr != study.rates["0.08M", name].lr}
    assert (
        changed == every.groupby("optimizer").lr.first().to_dict()
        and every.groupby("optimizer").lr.nunique().eq(1).all()
    )
    for name, low in every.groupby("optimizer"):
        full = study.runs("full_precision")
        full = full[(full["size"] == "0.08M") & (full.optimizer == name)]
        assert sorted(low.seed) == sorted(full.seed)
        same = ["hyper", "steps", "tokens", "weight_decay", "n_parameters", "corpus", "batch_size", "context"]
        assert len(pd.concat([low, full])[same].drop_duplicates()) == 1
