"""Pooling tables of two machines, and which committed runs count as done."""

import pandas as pd
import pytest

from beyond_outliers import checksums, paths
from beyond_outliers.config import PURPOSES
from beyond_outliers.study import collect
from beyond_outliers.study.study import Study
from beyond_outliers.study.tables import MEASURED


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    return Study("confirm")


def write(folder, losses, scale="confirm", device="x86_64", **tables):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"run": run, "scale": scale, "size": "0.08M", "val_loss": loss, "status": "finished", "device_name": device}
        for run, loss in losses.items()
    ]
    pd.DataFrame(rows).to_csv(folder / "runs.csv", index=False)
    for name, table in tables.items():
        pd.DataFrame(table).to_csv(folder / f"{name}.csv", index=False)


def test_new_runs_come_in_and_known_ones_stay_with_their_difference(study, tmp_path):
    write(study.results, {"a": 3.0, "b": 2.0}, ptq={"run": ["a", "b"], "increase": [0.1, 0.2]})
    there = tmp_path / "there"
    write(there, {"b": 2.25, "c": 1.0}, device="aarch64", ptq={"run": ["b", "c"], "increase": [0.9, 0.3]})
    both = collect.merge(study, there)
    assert both.to_dict("records") == [
        {"run": "b", "val_loss_here": 2.0, "val_loss_there": 2.25, "device_name_here": "x86_64",
         "device_name_there": "aarch64", "difference": 0.25}
    ]  # fmt: skip
    assert pd.read_csv(study.results / "runs.csv").set_index("run").val_loss.to_dict() == {"a": 3.0, "b": 2.0, "c": 1.0}
    assert pd.read_csv(study.results / "ptq.csv").set_index("run").increase.to_dict() == {"a": 0.1, "b": 0.2, "c": 0.3}
    table = study.results / "runs.csv"
    table.write_text(table.read_text().replace("3.0", "3.000"))  # as another program may have written it
    checksums.seal(study.results)
    before = table.read_bytes()
    again = collect.merge(study, there)
    assert len(again) == 2 and table.read_bytes() == before, "nothing new, nothing written"
    # what another machine gave, once: `c`, made there alone, is no comparison
    assert study.table("machines").set_index("run").difference.to_dict() == {"b": 0.25}


def test_an_empty_scale_takes_everything(study, tmp_path):
    there = tmp_path / "there"
    rates = {"size": ["0.08M"], "optimizer": ["muon"], "lr": [0.1]}
    write(there, {"c": 0.1 + 0.2}, learning_rates=rates)
    assert collect.merge(study, there).empty
    assert pd.read_csv(study.results / "runs.csv").val_loss.tolist() == [0.1 + 0.2]
    assert pd.read_csv(study.results / "learning_rates.csv").to_dict("list") == rates


def test_chosen_rates_here_are_not_overwritten(study, tmp_path):
    write(study.results, {"a": 3.0}, learning_rates={"size": ["0.08M"], "optimizer": ["muon"], "lr": [0.1]})
    there = tmp_path / "there"
    write(there, {"a": 3.0}, learning_rates={"size": ["0.08M"] * 2, "optimizer": ["muon", "soap"], "lr": [0.7, 0.2]})
    collect.merge(study, there)
    found = pd.read_csv(study.results / "learning_rates.csv")
    assert dict(zip(found.optimizer, found.lr, strict=True)) == {"muon": 0.1, "soap": 0.2}


def test_other_scales_and_folders_without_runs_are_refused(study, tmp_path):
    with pytest.raises(ValueError, match=r"no runs\.csv"):
        collect.merge(study, tmp_path)
    write(tmp_path / "laptop", {"a": 1.0}, scale="laptop")
    with pytest.raises(ValueError, match="scale laptop, not of confirm"):
        collect.merge(study, tmp_path / "laptop")


def rows_of(study, **tables):
    """Tables of measurements with rows of the given runs, each finished and at the Common Loss unless it says other."""
    for name in MEASURED:
        rows = [(run, place) for run, places in tables.get(name, tables["rest"]).items() for place in places]
        pd.DataFrame(rows, columns=["run", "checkpoint"]).to_csv(study.results / f"{name}.csv", index=False)


def test_a_run_counts_as_done_when_the_tables_have_all_of_its_rows(study):
    write(study.results, {"a": 3.0, "b": 2.0, "c": 1.0, "d": 4.0})
    both, final = ("final", "common"), ("final",)
    rows_of(study, rest={"a": both, "b": both, "c": final}, outliers={"a": both, "b": final, "c": final})
    pd.DataFrame({"run": ["a", "b", "c"]}).to_csv(study.results / "trajectory.csv", index=False)
    found = collect.adopted(study)
    assert found["full_precision"] == {"a"}, "b lacks a row at the Common Loss, c all of them, d all rows"
    assert found["sweep"] == found["qat"] == {"a", "b", "c"}
    (study.results / "trajectory.csv").unlink()  # which this scale asks for
    assert collect.adopted(study)["full_precision"] == set()


def test_diverged_runs_need_no_measurements(study):
    write(study.results, {"a": 3.0})
    runs = pd.read_csv(study.results / "runs.csv").assign(status="diverged", val_loss=float("nan"))
    runs.to_csv(study.results / "runs.csv", index=False)
    assert collect.adopted(study) == {purpose: {"a"} for purpose in PURPOSES}


def test_without_tables_nothing_is_done(study):
    assert collect.adopted(study) == {purpose: set() for purpose in PURPOSES}
