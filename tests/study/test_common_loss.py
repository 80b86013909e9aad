"""The Common Loss over made-up runs: the threshold, the first checkpoint at or below it, groups."""

import pandas as pd
import pytest

from beyond_outliers.study.common_loss import COLUMNS, common_loss


def run(name, optimizer, losses, seed=0, size="s", status="finished"):
    steps = [10 * (i + 1) for i in range(len(losses))]
    row = {"run": name, "size": size, "optimizer": optimizer, "seed": seed, "status": status, "steps": steps[-1]}
    row["val_loss"] = losses[-1]
    rows = [{"run": name, "step": 0, "val_loss": 9.0}]  # before training: no checkpoint
    return row, rows + [{"run": name, "step": s, "val_loss": loss} for s, loss in zip(steps, losses, strict=True)]


def tables(*runs):
    rows, evaluations = zip(*runs, strict=True)
    return pd.DataFrame(rows), pd.DataFrame([e for of in evaluations for e in of])


def test_it_is_the_lowest_loss_that_every_run_reaches():
    found = common_loss(*tables(run("a", "muon", [5.0, 4.0, 3.0]), run("b", "soap", [4.5, 3.9, 3.5, 3.6])))
    assert list(found.columns) == COLUMNS
    assert (found.common_loss == 3.5).all()  # b's best, which is not its last
    assert dict(zip(found.run, found.step, strict=True)) == {"a": 30, "b": 30}
    assert dict(zip(found.run, found.val_loss, strict=True)) == {"a": 3.0, "b": 3.5}
    assert dict(zip(found.run, found.final_step, strict=True)) == {"a": 30, "b": 40}


def test_a_seed_is_a_group_of_its_own():
    runs = tables(run("a0", "muon", [3.0, 2.0]), run("b0", "soap", [3.2, 2.5]), run("a1", "muon", [2.9, 2.2], seed=1))
    by_size, by_seed = common_loss(*runs), common_loss(*runs, by=("size", "seed"))
    assert by_size.common_loss.tolist() == [2.5] * 3
    assert by_seed.groupby("seed").common_loss.first().to_dict() == {0: 2.5, 1: 2.2}


def test_diverged_runs_are_left_out_and_none_give_no_rows():
    kept = run("a", "muon", [3.0, 2.0])
    gone = run("b", "soap", [8.0, float("nan")], status="diverged")
    assert common_loss(*tables(kept, gone)).common_loss.tolist() == [2.0]
    assert common_loss(*tables(gone)).empty


@pytest.mark.parametrize("order", [1, -1])
def test_the_first_checkpoint_is_first_in_steps_not_in_rows(order):
    runs, evaluations = tables(run("a", "muon", [3.0, 2.0, 1.0]), run("b", "soap", [3.0, 2.0]))
    found = common_loss(runs, evaluations[::order].reset_index(drop=True))
    assert found.set_index("run").step.to_dict() == {"a": 20, "b": 20}
