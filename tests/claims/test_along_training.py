"""The damage along training, on runs whose course is given."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from beyond_outliers.claims import along_training as along
from beyond_outliers.claims import readings, verdicts
from beyond_outliers.study import Study
from made_up_runs import Made

FALL = {"adamw": [0.1, 0.2, 0.3], "muon": [0.0, 0.04, 0.02]}


def followed(fall=FALL, **tables):
    """Runs of 100 steps, checkpoints every 10; damage 0.001 a step until 80, then `fall[optimizer][seed]` more."""
    runs, rows = [(name, seed, f"{name}{seed}") for name in fall for seed in range(len(fall[name]))], []
    for name, seed, run in runs:
        for step in range(10, 101, 10):
            increase = 0.001 * step if step <= 80 else 0.08 + fall[name][seed] * (step - 80) / 20
            rows.append((run, step, 1, "W4A4", 3 + increase, increase))
        rows += [(run, 80, 4, "W4A4", 2.9, 0.05), (run, 100, 4, "W4A4", 2.8, 0.06), (run, 100, 1, "none", 3.0, 0.0)]
    table = pd.DataFrame(rows, columns=["run", "step", "averaged", "spec", "val_loss", "increase"])
    full = pd.DataFrame(runs, columns=["optimizer", "seed", "run"]).assign(size="s", steps=100)
    return Made({"full_precision": full}, "W4A4", **{"trajectory": table} | tables)


def differences(fall=FALL):
    table = along.differences(along.changes(along.trajectory(followed(fall))))
    return table.set_index(["quantity", "optimizer"])[["mean", "low", "high", "n"]]


def test_what_changes_in_the_decay_and_before_it():
    assert pytest.approx(0.8) == along.DECAY_FROM
    rows = along.trajectory(followed())
    assert len(rows) == 6 * 12 and set(rows.spec) == {"W4A4"}
    curves = along.curves(rows).query("share == 1 and optimizer == 'muon'")  # of the checkpoints themselves
    assert curves["mean"].tolist() == pytest.approx([0.1])
    table, interval = differences(), stats.t.interval(0.95, 2, loc=0.2, scale=stats.sem([0.1, 0.2, 0.3]))
    assert table.loc[("decay", "adamw")].tolist() == pytest.approx([0.2, *interval, 3])
    assert table.loc[("before", "adamw"), "mean"] == pytest.approx(0.02)  # from 60 to 80, as long as the decay
    averaging = {"constant": 0.05 - 0.08, "end": 0.06 - 0.08 - 0.02, "end: loss after": 2.8 - 3.1}
    for name, expected in averaging.items():
        assert table.loc[(f"averaging, {name}", "muon"), "mean"] == pytest.approx(expected)


def test_the_mean_of_optimizers_has_the_spread_over_runs_alone():
    """Optimizers that differ much, seeds that do not: the interval is narrow. By Welch's formula for equal samples."""
    variances = np.array([np.var(values, ddof=1) / 3 / 4 for values in FALL.values()])
    dof = variances.sum() ** 2 / (variances**2 / 2).sum()
    half = np.sqrt(variances.sum()) * stats.t.ppf(0.975, dof)
    expected = [0.11, 0.11 - half, 0.11 + half, 3]
    assert differences().loc[("decay", along.EVERY)].tolist() == pytest.approx(expected)
    few = differences({"adamw": [0.1, 0.2], "muon": [0.3]})
    assert few[["low", "high"]].isna().all(axis=None) and few["mean"]["decay", along.EVERY] == pytest.approx(0.225)


def test_the_words_follow_the_numbers():
    table = along.wide(differences().reset_index().assign(size="s"))
    assert list(table.columns) == list(along.QUANTITIES.values())
    assert table.loc[("s", "adamw"), along.QUANTITIES["before"]] == "0.020 [0.020, 0.020]"
    assert [optimizer for _, optimizer in table.index] == ["adamw", "muon", along.EVERY]
    text = along.in_words(followed())
    assert text.startswith("- s, n 3: the mean damage changes by 0.110 [")
    assert "Over as long a stretch before, it changes by 0.020 [0.020, 0.020]." in text
    assert "at the constant rate and by -0.130 [" in text


def test_a_scale_whose_runs_are_not_followed():
    study = Made(followed().by_purpose, "W4A4")
    assert along.differences(along.changes(along.trajectory(study))).empty
    assert along.in_words(study) == "No run of scale made up has been followed along its training."
    assert along.at_common_loss(Study("pocket")).empty


def test_a_quantity_at_a_loss_is_interpolated_between_its_neighbours():
    table = pd.DataFrame({"step": [1, 2, 3], "base_loss": [4.0, 3.0, 2.0], "increase": [0.1, 0.2, 0.6]})
    assert readings.at_loss(table, 2.5) == pytest.approx({"step": 2.5, "base_loss": 2.5, "increase": 0.4})
    # at a checkpoint itself; the first one is below already
    assert [readings.at_loss(table, at)["increase"] for at in (3.0, 5.0)] == pytest.approx([0.2, 0.1])
    with pytest.raises(ValueError, match=r"1\.5.*lowest is 2\.0"):
        readings.at_loss(table, 1.5)


def test_fully_decayed_models_are_read_at_one_loss():
    """Muon's branches pass the highest of the final losses, 3.0; SOAP's shortest is below it already."""
    losses = {"adamw": [3.4, 3.2, 3.0], "muon": [3.2, 3.1, 2.9], "soap": [2.9, 2.8, 2.7]}
    rows = [("s", name, 1, 10 * k, loss, k / 10, 2.0) for name in losses for k, loss in enumerate(losses[name], 1)]
    columns = ["size", "optimizer", "seed", "tokens", "val_loss", "increase", "gain"]
    table = pd.DataFrame(rows, columns=columns)[::-1]  # tokens order them
    found = verdicts.equal_schedule(Made(branches=table)).set_index("optimizer")
    assert found.increase.to_dict() == pytest.approx({"adamw": 0.3, "muon": 0.25})
    assert set(found.condition) == {"equal schedule"} and set(found.seed) == {1} and set(found.gain) == {2.0}


def test_damage_at_the_common_loss_lies_between_two_checkpoints():
    """Loss in full precision 4 - step / 50; the Common Loss 2.5 is reached halfway between 70 and 80."""
    runs, steps = followed().runs("full_precision").run, np.arange(0, 101, 10)
    curves = pd.concat(pd.DataFrame({"run": run, "step": steps, "val_loss": 4 - steps / 50}) for run in runs)
    reached = pd.DataFrame({"run": runs, "common_loss": 2.5, "step": 80})
    table = along.at_common_loss(followed(curves=curves, common_loss=reached))
    found = table[["at_checkpoint", "interpolated", "share"]].to_numpy()
    assert found == pytest.approx(np.tile([0.08, 0.075, 0.75], (6, 1)))
