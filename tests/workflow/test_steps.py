"""The order of a study's steps, resolved by `Study.ensure` without training anything."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.config import EdgeWarning, read_rates, tune
from beyond_outliers.study import Study
from beyond_outliers.study.steps import OUTPUTS, Step, choices, needs


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Study(scale) that trains by formula and measures nothing; `study.done` lists the steps in their order."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    ended: dict[str, SimpleNamespace] = {}

    def train(self, planned, **_):
        c = planned.config
        loss = 3 + (math.log2(c.lr) + 6) ** 2 + (math.log2(c.hyper.get("embedding_lr", 1 / 16)) + 4) ** 2
        row = {"size": c.size, "optimizer": c.optimizer, "lr": c.lr, "val_loss": loss, "run": c.name}
        return ended.setdefault(c.name, SimpleNamespace(row=row, config=c))

    def do(self, step, progress=True, whole=Study.do):
        self.done.append(step)
        return whole(self, step, progress)

    monkeypatch.setattr(Study, "train", train)
    monkeypatch.setattr(Study, "do", do)
    monkeypatch.setattr(Study, "result", lambda self, planned: ended.get(planned.config.name))
    monkeypatch.setattr(Study, "loss", lambda self, name: ended[name].row["val_loss"] if name in ended else None)
    for name in ("prepare_corpus", "collect"):
        monkeypatch.setattr(Study, name, lambda self: None)
    monkeypatch.setattr(Study, "measure", lambda self, purpose, size: None)

    def of(scale: str) -> Study:
        study = Study(scale)
        study.done, study.ended = [], ended
        return study

    return of


@pytest.mark.filterwarnings(f"ignore::{EdgeWarning.__module__}.EdgeWarning")
@pytest.mark.parametrize("scale", ["smoke", "laptop", "confirm"])
def test_every_step_comes_once_and_after_what_it_needs(pretended, scale):
    study = pretended(scale).ensure()
    place = {step: i for i, step in enumerate(study.done)}
    assert len(place) == len(study.done)
    for step in study.done:
        for before in choices(study.protocol, step) + needs(study.protocol, step):
            assert place[before] < place[step], (before, step)
    outputs = [step.output for step in study.done]
    assert len(set(outputs)) == len(outputs)
    assert {step.kind for step in study.done} == set(OUTPUTS) - ({"tune"} if scale != "confirm" else set())
    # everything that is planned has been trained and measured, a size with its tables before the next one's main runs
    assert {p.config.name for p in study.planned()} == set(study.ended)
    for size in study.protocol.sizes:
        measured = {step.purpose for step in study.done if step.kind == "measure" and step.size == size}
        assert measured == set(study.protocol.purposes(size))
    collected = [place[Step("collect", size=size)] for size in study.protocol.sizes]
    assert collected == sorted(collected)
    for size, limit in zip(study.protocol.sizes[1:], collected, strict=False):
        runs = [p.config.name for p in study.protocol.runs(read_rates(scale), size)]
        assert min(place.get(Step("train", run=run), limit) for run in runs) >= limit


def test_the_table_of_a_tuned_scale_has_both_rates(pretended):
    study = pretended("confirm").ensure()
    table = pd.read_csv(paths.own_results("confirm") / "learning_rates.csv")
    assert list(table.columns) == ["size", "optimizer", "lr", "edge", "grid", "n_runs", "auxiliary", "auxiliary_grid"]
    names = [p.config for p in study.protocol.sweep_runs(losses=study.loss)]
    assert len(table) == 18 and not table.edge.any()
    for row in table.itertuples():
        found = tune(study.protocol, row.size, row.optimizer, lambda c: study.loss(c.name))
        assert (row.lr, row.auxiliary) == (found["lr"], found["auxiliary"])
        at = [config for config in names if (config.size, config.optimizer) == (row.size, row.optimizer)]
        assert row.n_runs == len(at)
        assert {f"{config.lr:g}" for config in at} <= {*row.grid.split()}
        assert {f"{config.hyper['embedding_lr']:g}" for config in at} == {*row.auxiliary_grid.split()}
    rates = read_rates("confirm")
    for planned in study.protocol.runs(rates):
        config = planned.config
        chosen = rates[config.size, config.optimizer]
        assert (config.lr, config.hyper["embedding_lr"]) == (chosen.lr, chosen.auxiliary)
        assert config.name in study.ended


def test_losses_of_a_clone_come_from_the_committed_table(tmp_path, monkeypatch):
    """Without folders of runs, the table `runs` says how the search went; a run that is in neither has not ended."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    first = Study("confirm").planned()
    rows = [{"run": p.config.name, "val_loss": 3 + 0.1 * place} for place, p in enumerate(first[:2])]
    (tmp_path / "confirm").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "confirm" / "runs.csv", index=False)
    study = Study("confirm")
    assert [study.loss(p.config.name) for p in first] == [3, 3.1, None, None, None, None]
    assert len(study.planned()) == len(first) + 2  # two searches ask for their second run
    assert study.find(study.planned()[1].config.name).config.optimizer == "adamw"
