"""`make plan`: runs, how many are done, how long the rest takes."""

from types import SimpleNamespace

import pytest

from beyond_outliers.cli import main
from beyond_outliers.study import Study

pytestmark = pytest.mark.slow


def test_the_plan_is_printed(study, capsys):
    assert main(["plan", "--scale", "smoke"]) == 0
    printed = capsys.readouterr().out
    assert "full_precision" in printed and "tiny" in printed


def test_the_plan_counts_what_is_left(study, monkeypatch, tmp_path):
    from beyond_outliers.study import plan

    table = plan.plan_table(study)
    assert (table.done == table.runs).all() and (table.hours == 0).all()
    rows = study.table("runs").set_index("run", drop=False)
    fresh = Study("smoke", tmp_path)  # no table but its rates; the sweep's runs alone have ended
    (tmp_path / "learning_rates.csv").write_bytes((study.results / "learning_rates.csv").read_bytes())
    ended = SimpleNamespace(row=rows[rows.scheme == "none"].iloc[0].to_dict())
    monkeypatch.setattr(
        Study, "result", lambda self, planned: ended if planned.config.name == ended.row["run"] else None
    )
    monkeypatch.setattr(plan, "step_seconds", lambda config, *_, **__: config.tokens_per_step / 500)
    table = plan.plan_table(fresh).query("size == 'tiny'").set_index("purpose")
    assert table.done.sum() >= 1 and table.tokens_per_second["full_precision"] == ended.row["tokens_per_second"]
    assert table.tokens_per_second["qat"] == 500.0
    assert table.hours["qat"] == pytest.approx(table.runs["qat"] * table.tokens["qat"] / 500 / 3600)
    names = {p.config.name for p in fresh.planned("tiny") if p.purpose in ("sweep", "full_precision")}
    once = (len(names) - 1) * table.tokens["sweep"] / ended.row["tokens_per_second"] / 3600
    assert table.hours["sweep"] + table.hours["full_precision"] == pytest.approx(once)
