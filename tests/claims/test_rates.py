"""Tuning runs: the line of rates, what rates leave after quantization, and the rates that the searches did not find."""

from types import SimpleNamespace

import pandas as pd
import pytest

from beyond_outliers.claims import readings
from beyond_outliers.study import Study
from made_up_runs import Made

GRID = pd.DataFrame(
    [
        ("muon", 0.1, 0.5, 0, 3.0, 0.4, "finished"),
        ("muon", 0.1, 0.25, 1, 3.2, 0.2, "finished"),
        ("muon", 0.05, 0.5, 0, 3.2, 0.1, "finished"),
        ("adamw", 0.1, 0.5, 0, 3.3, 0.1, "finished"),
        ("adamw", 0.2, 0.5, 0, 9.0, 0.1, "diverged"),
    ],
    columns=["optimizer", "lr", "embedding", "seed", "before", "increase", "status"],
)
GRID = GRID.assign(
    run=[f"r{n}" for n in range(5)], size="s", hyper=[f'{{"embedding_lr": {r}}}' for r in GRID.embedding]
)


def sweep(tuned, chosen=()):
    """A study of these tuning runs; chosen: (size, optimizer, auxiliary)."""
    rates = pd.DataFrame(chosen, columns=["size", "optimizer", "auxiliary"])
    rows = GRID[GRID.status == "finished"].assign(
        checkpoint="final", spec="W4A4+head", val_loss=GRID.before + GRID.increase
    )
    ptq, full = pd.concat([rows, rows.assign(spec="W4A4", increase=9.0)]), GRID.drop(columns="increase")
    return Made({"sweep": full}, protocol={"tuned": tuned}, learning_rates=rates, ptq=ptq)


def test_losses_are_means_over_seeds_in_the_primary_format():
    table = readings.before_and_after(sweep(False)).set_index(["optimizer", "lr"])
    found = table.loc[("muon", 0.1), ["before", "after", "damage", "seeds"]].tolist()
    assert found == pytest.approx([3.1, 3.4, 0.3, 2]) and ("adamw", 0.2) not in table.index


def test_a_tuned_scale_has_the_line_at_the_chosen_auxiliary_rate():
    assert readings.rate_line(sweep(True, [("s", "muon", 0.5)])).run.tolist() == ["r0", "r2"]
    assert readings.rate_line(sweep(True)).empty  # nothing is chosen yet
    assert len(readings.rate_line(sweep(False))) == 4


def test_the_rule_over_all_rates(monkeypatch, tmp_path):
    """.5 ends 0.01 above the lowest and is smaller: named; .25 is too far above, and what diverged does not count."""

    def runs(losses, **columns):
        rates = {"size": "0.08M", "optimizer": "adamw", "lr": list(losses), "val_loss": list(losses.values())}
        return pd.DataFrame(rates | {"status": "finished"} | columns)

    runs({0.5: 3.01, 0.25: 3.02, 0.125: 2.0}, status=["finished", "finished", "diverged"]).to_csv(tmp_path / "a")
    runs({8.0: 3.3}).to_csv(tmp_path / "b")
    monkeypatch.setattr(readings, "TRIED_SINCE", [tmp_path / "a", tmp_path / "b"])
    monkeypatch.setattr(readings, "rate_line", lambda _: runs({1.0: 3.0, 2.0: 3.1, 4.0: 3.05}))
    study = SimpleNamespace(protocol=SimpleNamespace(tuning=SimpleNamespace(tolerance=0.015)))
    assert len(readings.tried_since(study)) == 6 and readings.named_rates(study).to_dict() == {"adamw": 0.5}


def test_the_committed_runs_differ_from_the_study_in_their_rate_alone():
    every, study = readings.found_rates(), Study("confirm")
    changed = {name: lr for name, lr in readings.named_rates(study).items() if lr != study.rates["0.08M", name].lr}
    assert every.groupby("optimizer").lr.unique().map(list).to_dict() == {name: [lr] for name, lr in changed.items()}
    full = study.runs("full_precision").query("size == '0.08M'")
    for name, low in every.groupby("optimizer"):
        tuned = full[full.optimizer == name]
        assert sorted(low.seed) == sorted(tuned.seed)
        same = ["hyper", "steps", "tokens", "weight_decay", "n_parameters", "corpus", "batch_size", "context"]
        assert len(pd.concat([low, tuned])[same].drop_duplicates()) == 1
