"""A whole study at scale smoke: every run, measurement, table and notebook, and what they say."""

import json
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import papermill
import pytest

from beyond_outliers import paths
from beyond_outliers.claims import CLAIMS, rules
from beyond_outliers.config import OPTIMIZER_NAMES, EdgeWarning, read_learning_rates
from beyond_outliers.notebook import check_parameters, notebooks, paper, parameters_of, run_notebook
from beyond_outliers.study import TABLES, MissingResults, Study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Results, runs and figures go to a temporary folder, in this process and in the notebooks' kernels."""
    folder = tmp_path_factory.mktemp("output")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEYOND_OUTLIERS_OUTPUT", str(folder))
        patch.setattr(paths, "OUTPUT", folder)
        patch.setattr(paths, "FIGURES", folder / "figures")
        patch.setattr(paths, "RESULTS", folder / "data" / "results")
        patch.setattr(paths, "RUNS", folder / "data" / "runs")
        yield folder


@pytest.fixture(scope="module")
def study(output):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EdgeWarning)  # two-point grids have nothing but edges
        return Study("smoke").ensure(progress=False)


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
    sweep, chosen = study.runs("sweep"), read_learning_rates("smoke")
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


def test_zero_shot_rows_carry_chance_and_error(study):
    table = study.measured("zero_shot")
    assert set(table[table.checkpoint == "final"].task) == {"piqa", "hellaswag", "arc_easy", "cloze"}
    assert table[["accuracy", "chance", "standard_error"]].notna().all().all()
    assert set(study.measured("zero_shot", "qat").spec) == {"QAT"}


def test_a_complete_study_does_nothing(study, monkeypatch):
    monkeypatch.setattr(Study, "train", lambda *_, **__: pytest.fail("trained again"))
    assert study.ensure() is study


def test_tables_that_are_not_there_say_what_to_do(study, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=", ".join(TABLES)):
        study.table("rnus")
    monkeypatch.setattr(study, "results", tmp_path)
    with pytest.raises(MissingResults, match="make reproduce SCALE=smoke"):
        study.table("runs")


def test_committed_rows_of_runs_without_a_folder_stay(study, monkeypatch):
    """A table may hold rows of runs that were trained elsewhere; rows of what is no longer planned go."""
    before, before_common = study.table("runs"), study.table("common_loss")
    gone = before.run.iloc[3]
    stale = before.iloc[[0]].assign(run="an-old-run")
    pd.concat([before, stale]).to_csv(study.results / "runs.csv", index=False)
    full = set(study.runs("full_precision").run)
    only_swept = next(run for run in study.runs("sweep").run if run not in full)  # once a main run, say, no longer
    pd.concat([before_common, before_common.iloc[[0]].assign(run=only_swept)]).to_csv(
        study.results / "common_loss.csv", index=False
    )
    result = Study.result
    monkeypatch.setattr(Study, "result", lambda self, p: None if p.config.name == gone else result(self, p))
    monkeypatch.setattr(Study, "common_loss", lambda self, size: before_common[before_common["size"] == size])
    study.collect()
    assert set(study.table("runs").run) == set(before.run)
    assert set(study.table("common_loss").run) == set(before_common.run)


def test_an_interrupted_study_has_the_tables_of_what_has_ended(study, tmp_path, monkeypatch):
    result = Study.result
    monkeypatch.setattr(study, "results", tmp_path)
    monkeypatch.setattr(Study, "result", lambda self, p: None if p.config.size == "small" else result(self, p))
    study.collect()
    for name in set(TABLES) - {"learning_rates"}:
        table = study.table(name)
        assert len(table) and table.run.str.startswith("tiny-").all(), name
    assert not study.complete()
    # without one run of the size there is no Common Loss yet, and the rest stays
    (tmp_path / "common_loss.csv").unlink()
    gone = next(p.config.name for p in study.planned("tiny") if p.purpose == "full_precision")
    monkeypatch.setattr(Study, "result", lambda self, p: None if p.config.name == gone else result(self, p))
    study.collect()
    assert set(study.table("common_loss")["size"]) == {"small"}


def test_a_study_without_any_run_says_so(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "results", tmp_path)
    monkeypatch.setattr(Study, "result", lambda *_: None)
    with pytest.raises(MissingResults, match="no run of smoke has ended"):
        study.collect()
    assert not list(tmp_path.iterdir())


def test_a_size_at_which_every_run_diverged_has_no_common_loss(study, monkeypatch):
    whole = study.common_loss("tiny")
    monkeypatch.setattr(Study, "result", lambda *_: SimpleNamespace(row={"status": "diverged"}))
    none = study.common_loss("tiny")
    assert none.empty and list(none.columns) == list(whole.columns) and len(whole) == len(OPTIMIZER_NAMES)


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
    study = Study("laptop")
    for size, factor in (("0.26M", 1.0), ("0.08M", 1.0), ("0.26M", 1.5)):
        monkeypatch.setattr(Study, "result", ended(factor))
        table = study.choose_learning_rates(size)
    assert list(table["size"]) == ["0.08M"] * 6 + ["0.26M"] * 6
    for row in table.itertuples():
        expected = study.protocol.grid(row.optimizer)[2] * (1.5 if row.size == "0.26M" else 1.0)
        assert row.lr == pytest.approx(expected, rel=0.05) and not row.edge


# ------------------------------------------------------------------------------------------------------------ notebooks


@pytest.fixture(scope="module")
def executed(study):
    """name -> (HTML path, executed notebook) of all notebooks, by papermill."""
    found = {}
    for name in notebooks():
        html = run_notebook(name, "smoke", build=False)
        found[name] = html, json.loads((paths.RUNS / "smoke" / "notebooks" / f"{name}.ipynb").read_text())
    return found


def outputs(notebook: dict) -> str:
    """All text that a notebook's cells put out, HTML tables included."""
    parts = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            parts += [*output.get("text", []), *data.get("text/plain", []), *data.get("text/html", [])]
    return "".join(parts)


EXPECTED = {
    "01_full_precision": ["01_loss_curves", "01_final_loss", "01_learning_rates", "01_cloze_accuracy"],
    "02_outlier_metrics": ["02_mmr", "02_mmr_learning_rate", "02_outliers_against_damage"],
    "03_ptq": ["03_w4a4_increase", "03_formats_tiny", "03_formats_small"],
    "04_error_propagation": ["04_depth", "04_abc", "04_gain", "04_figure1", "04_correlations_increase"],
    "05_qat": ["05_increase", "05_curves", "05_staircases"],
    "06_scaling_laws": ["06_fits", "06_rho"],
    "07_claims": ["07_claims"],
    "08_probe_your_model": ["08_depth", "08_outliers"],
}


def test_there_is_an_expectation_for_every_notebook():
    assert sorted(EXPECTED) == notebooks()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_notebook_runs_and_draws_its_figures(executed, name):
    html, notebook = executed[name]
    text = outputs(notebook)
    assert not [o for c in notebook["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    for figure in EXPECTED[name]:
        for kind in ("png", "pdf"):
            assert (html.parent / f"{figure}.{kind}").stat().st_size > 2000, figure
    for said in ("&#x27;smoke&#x27;", "torch", "commit"):  # parameters, versions and commit are shown
        assert said in text or said.replace("&#x27;", "'") in text
    assert "Traceback" not in text
    assert html.stat().st_size > 50_000


def test_notebook_01_shows_the_losses_of_the_tables(executed, study):
    text = outputs(executed["01_full_precision"][1])
    for loss in study.runs("full_precision").val_loss:
        assert f"{loss:.4f}" in text


def test_notebook_03_shows_increases_and_the_papers_table(executed, study):
    text = outputs(executed["03_ptq"][1])
    w4a4 = study.measured("ptq").query("spec == 'W4A4'")
    for increase in w4a4.increase:
        assert f"{increase:.3f}" in text
    for accuracy in paper("table3_ptq_w4a4").accuracy:
        assert f"{accuracy:.2f}".rstrip("0").rstrip(".") in text


def test_notebook_04_finds_the_identity(executed):
    residual = re.search(r"largest \|R - \(A \+ B \+ C\)\| .*: (\S+)", outputs(executed["04_error_propagation"][1]))
    assert float(residual[1]) < 1e-9


def test_notebook_07_judges_every_claim(executed, study):
    table = pd.read_csv(study.results / "claims.csv")
    assert list(table.id) == list(CLAIMS) == list(rules()) == list(paper("claims").id)
    assert set(table.verdict) <= {"reproduced", "not reproduced", "undecided"}
    assert (table[table.n < 3].verdict == "undecided").all()
    assert table.comment.str.len().min() > 20
    assert set(table.notebook) <= set(notebooks())


def test_notebooks_refuse_unknown_parameters(study):
    with pytest.raises(ValueError, match=r"no parameter scael; valid: scale, build"):
        run_notebook("01_full_precision", "smoke", scael="pocket")
    with pytest.raises(ValueError, match="02_outlier_metrics"):
        run_notebook("01_full_prescision", "smoke")


def test_papermill_by_hand_refuses_unknown_parameters(study, tmp_path):
    """papermill itself only warns; the notebook's first cell does not go on."""
    source = paths.NOTEBOOKS / "01_full_precision.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match=r"unknown notebook parameters: scael; valid: scale"):
        papermill.execute_notebook(source, tmp_path / "out.ipynb", {"scael": "smoke"}, progress_bar=False)


def test_parameters_are_checked_by_name_and_type():
    namespace = {"__annotations__": {"scale": str, "n": int, "x": float}, "scale": "smoke", "n": 3, "x": 1}
    assert check_parameters(namespace) == {"scale": "smoke", "n": 3, "x": 1}
    with pytest.raises(ValueError, match="unknown notebook parameters: m; valid"):
        check_parameters({**namespace, "m": 4})
    with pytest.raises(ValueError, match="n must be int, not True"):
        check_parameters({**namespace, "n": True})


@pytest.mark.parametrize("name", EXPECTED)
def test_parameters_are_typed_and_commented(name):
    comments = parameters_of(name)
    assert "scale" in comments and all(comments.values())
    source = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in source["cells"]), "notebooks are committed without outputs"
    for cell in source["cells"]:
        body = re.search(r"^def .*\n((?:    .*\n?|\n)+)", "".join(cell["source"]), re.M)
        assert not body or len(body[1].strip().splitlines()) <= 3, "a definition of its own belongs into lib"


# ------------------------------------------------------------------------------------------------------------ workflow


def dry_run(scale, folder):
    """What Snakemake would do for a scale whose results, runs and figures lie in `folder`."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", f"scale={scale}", "--dry-run"]
    command += ["--directory", str(folder), "--snakefile", str(paths.ROOT / "Snakefile")]
    environment = {**os.environ, "BEYOND_OUTLIERS_OUTPUT": str(folder)}
    plan = subprocess.run(command, capture_output=True, text=True, cwd=paths.ROOT, env=environment)
    assert plan.returncode == 0, plan.stderr[-2000:]
    return plan.stdout + plan.stderr


def jobs_of(text):
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", text, re.M)}


def test_the_workflow_plans_one_job_a_run(tmp_path):
    """From nothing, Snakemake sees the sweep's runs; the main runs follow when the learning rates are known."""
    jobs = jobs_of(dry_run("smoke", tmp_path))
    assert (jobs["corpus"], jobs["train"], jobs["choose"], jobs["notebook"]) == (1, 12, 1, 8)


def test_the_workflow_plans_one_job_a_search_of_a_tuned_scale(tmp_path):
    """Which runs a search asks for is known only run by run: one job a size and optimizer; all notebooks have QAT."""
    text = dry_run("confirm", tmp_path)
    jobs = jobs_of(text)
    assert (jobs["corpus"], jobs["tune"], jobs["choose"], jobs["notebook"]) == (1, 18, 3, 8) and "train" not in jobs
    found = re.findall(r"^rule tune:\n(?:    .*\n)*?    wildcards: optimizer=(\S+), size=(\S+)\n", text, re.M)
    assert set(found) == {(name, size) for size in ("0.08M", "0.16M", "0.26M") for name in OPTIMIZER_NAMES}


def test_notebooks_that_a_scale_has_no_runs_for_are_left_out(tmp_path, monkeypatch):
    protocol = Study("smoke").protocol
    assert notebooks(protocol) == notebooks()
    text = (paths.SCALES / "smoke.toml").read_text()
    (tmp_path / "own.toml").write_text(re.sub(r"^qat = .*\n", "", text, flags=re.M))
    monkeypatch.setattr(paths, "SCALES", tmp_path)
    assert set(notebooks()) - set(notebooks(Study("own").protocol)) == {"05_qat", "06_scaling_laws"}


def test_the_workflow_prefers_the_order_of_the_protocol(tmp_path):
    """Snakemake starts the job of highest priority first: sizes in turn, their runs as the protocol lists them."""
    text = dry_run("laptop", tmp_path)
    found = re.findall(r"^rule train:\n(?:    .*\n)*?    wildcards: run=(\S+)\n    priority: (\d+)", text, re.M)
    planned = [p.config.name for p in Study("laptop").protocol.sweep_runs()]
    assert [run for run, _ in sorted(found, key=lambda job: -int(job[1]))] == planned
    assert len({priority for _, priority in found}) == len(planned) > 0


def test_the_workflow_does_a_deleted_run_again(study, tmp_path):
    """With everything there nothing is done; without one run's folder that run, and all that hangs on it."""
    rates = tmp_path / "data" / "results" / "smoke" / "learning_rates.csv"
    rates.parent.mkdir(parents=True)
    rates.write_bytes((study.results / "learning_rates.csv").read_bytes())
    work, sizes = tmp_path / "data" / "runs" / "smoke", study.protocol.sizes
    purposes = [f"measured-{purpose}-{size}" for size in sizes for purpose in study.protocol.purposes(size)]
    for files in (  # from what is needed to what needs it
        [work / "corpus.json"],
        [work / p.config.name / "result.json" for p in study.protocol.sweep_runs()],
        [work / f"chosen-{size}.txt" for size in sizes if "sweep" in study.protocol.purposes(size)],
        [work / p.config.name / "result.json" for p in study.planned() if p.purpose != "sweep"],
        [work / name for name in purposes],
        [work / f"collected-{size}" for size in sizes],
        [work / "notebooks" / f"{name}.done" for name in notebooks()],
        [tmp_path / "figures" / "smoke" / f"{name}.html" for name in notebooks()],
    ):
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.touch()
    assert "Nothing to be done" in dry_run("smoke", tmp_path)
    lost = next(p.config.name for p in study.planned("small") if p.purpose == "full_precision")
    (work / lost / "result.json").unlink()
    text = dry_run("smoke", tmp_path)
    jobs = jobs_of(text)
    assert f"run={lost}" in text and jobs["train"] == 1 and jobs["notebook"] == 8
    assert "choose" not in jobs and jobs["measure"] == 1


def test_the_plan_is_printed(study, capsys):
    from beyond_outliers.study import __main__ as module

    assert module.main(["plan", "--scale", "smoke"]) == 0
    printed = capsys.readouterr().out
    assert "full_precision" in printed and "tiny" in printed


def test_the_plan_counts_what_is_left(study, monkeypatch, tmp_path):
    from beyond_outliers.study import plan

    table = plan.plan_table(study)
    assert (table.done == table.runs).all() and (table.hours == 0).all()
    rows = study.table("runs").set_index("run", drop=False)
    fresh = Study("smoke")
    fresh.results = tmp_path  # no tables yet; the sweep's runs alone have ended
    ended = SimpleNamespace(row=rows[rows.scheme == "none"].iloc[0].to_dict())
    monkeypatch.setattr(
        Study, "result", lambda self, planned: ended if planned.config.name == ended.row["run"] else None
    )
    monkeypatch.setattr(plan, "measure_throughput", lambda config, threads: 500.0)
    table = plan.plan_table(fresh).query("size == 'tiny'").set_index("purpose")
    assert table.done.sum() >= 1 and table.tokens_per_second["full_precision"] == ended.row["tokens_per_second"]
    assert table.tokens_per_second["qat"] == 500.0
    assert table.hours["qat"] == pytest.approx(table.runs["qat"] * table.tokens["qat"] / 500 / 3600)
    names = {p.config.name for p in fresh.planned("tiny") if p.purpose in ("sweep", "full_precision")}
    once = (len(names) - 1) * table.tokens["sweep"] / ended.row["tokens_per_second"] / 3600
    assert table.hours["sweep"] + table.hours["full_precision"] == pytest.approx(once)
