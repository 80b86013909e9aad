"""A whole study at scale smoke: every run, measurement and table, and what they say."""

import itertools
import subprocess
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from beyond_outliers import checksums, paths
from beyond_outliers.claims import verdicts
from beyond_outliers.config import OPTIMIZER_NAMES, read_rates
from beyond_outliers.propagation.output_error import READINGS
from beyond_outliers.study import TABLES, MissingResults, Study, workflow
from beyond_outliers.study.tables import OPTIONAL

pytestmark = pytest.mark.slow


def test_every_planned_run_is_there(study):
    planned = study.planned()
    runs = study.table("runs")
    assert set(runs.run) == {p.config.name for p in planned}
    assert (runs.status == "finished").all()
    assert len(study.runs("sweep")) == 12 and len(study.runs("full_precision")) == 12
    assert len(study.runs("qat")) == 6 and set(study.runs("schemes").scheme) == {"ste", "lsq"}
    for row in runs.itertuples():
        config = next(p.config for p in planned if p.config.name == row.run)
        assert (row.lr, row.seed, row.n_parameters) == (config.lr, config.seed, config.model.n_parameters)


def test_runs_come_in_the_order_of_sizes_and_of_the_paper(study):
    full = study.runs("full_precision")
    assert list(zip(full["size"], full.optimizer, strict=True)) == [
        (size, optimizer) for size in ("tiny", "small") for optimizer in OPTIMIZER_NAMES
    ]
    sweep = study.runs("sweep")
    assert list(sweep.optimizer) == [name for name in OPTIMIZER_NAMES for _ in range(2)]
    assert sweep.groupby("optimizer").lr.is_monotonic_increasing.all()
    assert list(study.measured("ptq").optimizer.unique()) == list(OPTIMIZER_NAMES)


def test_every_optimizer_learns(study):
    curves = study.table("curves").merge(study.runs("full_precision")[["run", "size", "optimizer"]], on="run")
    first, last = curves.groupby("run").val_loss.first(), curves.groupby("run").val_loss.last()
    assert (last < first - 0.4).all()
    assert np.allclose(first, np.log(320), atol=0.05)  # an untrained model guesses uniformly


def test_learning_rates_come_from_the_sweep(study):
    sweep = study.runs("sweep")
    chosen = {key: rates.lr for key, rates in read_rates("smoke").items()}
    for (size, optimizer), lr in chosen.items():
        losses = sweep[(sweep["size"] == size) & (sweep.optimizer == optimizer)].set_index("lr").val_loss
        assert lr == pytest.approx(losses.idxmin())
    assert set(study.runs("full_precision").lr) == set(chosen.values())


def test_the_common_loss_is_reached_by_all_and_first_where_it_says(study):
    common = study.table("common_loss")
    curves = study.table("curves").dropna(subset="val_loss")
    for row in common.itertuples():
        own = curves[(curves.run == row.run) & (curves.step > 0)]
        assert (own[own.step < row.step].val_loss > row.common_loss).all()
        assert own.set_index("step").val_loss[row.step] <= row.common_loss
    for _, rows in common.groupby("size"):
        assert rows.common_loss.nunique() == 1 and len(rows) == 6
        weakest = max(curves[curves.run == run].val_loss.min() for run in rows.run)
        assert rows.common_loss.iloc[0] == weakest


def test_quantization_tables_are_complete_and_consistent(study):
    ptq = study.measured("ptq")
    specs = {"none", "W8A8", "W4A4", "mxfp4", "W8", "W4", "Wmxfp4", "W4A4+rot", "W4A4+head"}
    final = ptq[ptq.checkpoint == "final"]
    assert set(final.spec) == specs and len(final) == 12 * len(specs)
    for (_, checkpoint), rows in ptq.groupby(["run", "checkpoint"]):
        base = rows.set_index("spec").val_loss["none"]
        assert np.allclose(rows.increase.dropna(), rows.val_loss[rows.spec != "none"] - base), checkpoint
    eight, four = (final[final.spec == s].increase.abs().mean() for s in ("W8A8", "W4A4"))
    assert eight < four


def test_error_propagation_adds_up(study):
    modules = study.measured("propagation")
    assert np.allclose(modules.R, modules.A + modules.B + modules.C, rtol=1e-9, atol=1e-15)
    assert {"linear", "norm", "residual add", "activation", "attention"} <= set(modules.kind)
    opened = modules[(modules.attention == "open") & (modules.kind == "linear")]
    assert {"q", "k", "v", "out", "up", "down", "head"} == set(opened.name.str.rsplit(".").str[-1])


def test_what_the_rules_read_at_the_end_is_there_with_and_without_the_head(study):
    table = study.table("readings").set_index(["run", "checkpoint", "spec", "reading"]).value
    wanted = {*READINGS, "expected_error", "mean_B", "mean_B_token", "norms_fall", "norms_fall_token"}
    full, specs = set(study.runs("full_precision").run), ("W4A4+head", "W4A4")
    keys = itertools.product(full, ("final", "common"), specs, wanted)
    assert set(table.index) == set(keys) and table.notna().all()
    modules = study.table("propagation").query("attention == 'unit'").sort_values("index")
    last = modules.groupby(["run", "checkpoint"]).R.last()
    R_L = table.xs(("W4A4", "R_L"), level=("spec", "reading"))
    assert np.allclose(R_L, last.reindex(R_L.index), rtol=1e-9)
    common, norms = (verdicts.tables(study)[name] for name in ("common", "norms"))
    read = ["increase", "mmr", "kurtosis", "R_L_token", "R_L_centred_token"]
    assert common[read].notna().all().all() and len(common) == 2 * len(full) == 2 * len(norms)
    damage = common.pivot(index="run", columns="condition", values="increase")
    assert (damage["with head"] != damage["without head"]).all() and norms.falls.between(0, 1).all()


def test_zero_shot_rows_carry_chance_and_error(study):
    table = study.measured("zero_shot")
    assert set(table[table.checkpoint == "final"].task) == {"piqa", "hellaswag", "arc_easy", "cloze"}
    assert table[["accuracy", "chance", "standard_error"]].notna().all().all()
    assert set(study.measured("zero_shot", "qat").spec) == {"QAT"}


def test_a_complete_study_does_nothing(study, monkeypatch):
    monkeypatch.setattr(Study, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("ran Snakemake"))
    assert workflow.build(study).scale == study.scale


def test_tables_that_are_not_there_say_what_to_do(study, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=", ".join(TABLES)):
        study.table("rnus")
    monkeypatch.setattr(study, "_results", tmp_path)
    with pytest.raises(MissingResults, match="make reproduce SCALE=smoke"):
        study.table("runs")


def test_committed_rows_of_runs_without_a_folder_stay(study, monkeypatch):
    """A table may hold rows of runs that were trained elsewhere; rows of what is no longer planned go."""
    before, before_common = study.table("runs"), study.table("common_loss")
    gone = before.run.iloc[3]
    stale = before.iloc[[0]].assign(run="an-old-run")
    checksums.write_text(study.results / "runs.csv", pd.concat([before, stale]).to_csv(index=False))
    full = set(study.runs("full_precision").run)
    only_swept = next(run for run in study.runs("sweep").run if run not in full)  # once a main run, say, no longer
    more = pd.concat([before_common, before_common.iloc[[0]].assign(run=only_swept)])
    checksums.write_text(study.results / "common_loss.csv", more.to_csv(index=False))
    result = Study.result
    monkeypatch.setattr(Study, "result", lambda self, p: None if p.config.name == gone else result(self, p))
    study.collect()
    assert set(study.table("runs").run) == set(before.run)
    assert set(study.table("common_loss").run) == set(before_common.run)


def test_an_interrupted_study_has_the_tables_of_what_has_ended(study, tmp_path, monkeypatch):
    result = Study.result
    (tmp_path / "learning_rates.csv").write_bytes((study.results / "learning_rates.csv").read_bytes())
    monkeypatch.setattr(study, "_results", tmp_path)
    monkeypatch.setattr(Study, "result", lambda self, p: None if p.config.size == "small" else result(self, p))
    study.collect()
    for name in set(TABLES) - {"learning_rates", *OPTIONAL}:
        table = study.table(name)
        assert len(table) and table.run.str.startswith("tiny-").all(), name
    assert not study.complete()
    # without one run of the size there is no Common Loss yet, and the rest stays
    (tmp_path / "common_loss.csv").unlink()
    gone, runs = (
        next(p.config.name for p in study.planned("tiny") if p.purpose == "full_precision"),
        study.table("runs"),
    )
    checksums.write_text(tmp_path / "runs.csv", runs[runs.run != gone].to_csv(index=False))
    monkeypatch.setattr(Study, "result", lambda self, p: None if p.config.name == gone else result(self, p))
    study.collect()
    assert set(study.table("common_loss")["size"]) == {"small"}


def test_a_study_without_any_run_says_so(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_results", tmp_path)
    monkeypatch.setattr(Study, "result", lambda *_: None)
    with pytest.raises(MissingResults, match="no run of smoke has ended"):
        study.collect()
    assert not list(tmp_path.iterdir())


def test_learning_rates_of_one_size_leave_the_others_alone(tmp_path, monkeypatch):
    """The sweeps of a scale end one after the other; each replaces its own rows."""

    def ended(factor):  # a valley at the middle of the grid times `factor`
        def result(self, planned):
            c = planned.config
            middle = self.protocol.grid(c.optimizer)[2] * factor
            loss = 3 + np.log(c.lr / middle) ** 2
            return SimpleNamespace(row={"size": c.size, "optimizer": c.optimizer, "lr": c.lr, "val_loss": loss})

        return result

    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    study = Study("laptop")
    for size, factor in (("0.26M", 1.0), ("0.08M", 1.0), ("0.26M", 1.5)):
        monkeypatch.setattr(Study, "result", ended(factor))
        table = study.choose_learning_rates(size)
    assert list(table["size"]) == ["0.08M"] * 6 + ["0.26M"] * 6
    for row in table.itertuples():
        expected = study.protocol.grid(row.optimizer)[2] * (1.5 if row.size == "0.26M" else 1.0)
        assert row.lr == pytest.approx(expected, rel=0.05) and not row.edge
