"""An optimizer from outside beside a scale: its definition, its rates, its Common Loss, and the tables of both."""

import tomllib
from datetime import date
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.claims import decisions
from beyond_outliers.claims.estimates import compare as compare_runs
from beyond_outliers.config import OPTIMIZER_NAMES, Protocol, RunConfig
from beyond_outliers.config.outside import Outside, optimizer_file, read_outside
from beyond_outliers.config.registry import entry
from beyond_outliers.study import MissingResults, Study
from beyond_outliers.study.common_loss import common_loss
from beyond_outliers.study.compare import begin, compare, define, search_rates, source_of

SGD = "torch.optim:SGD"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")


def written(scale="smoke", **changes):
    beside, one = define(Study(scale), SGD, hyper={"momentum": 0.9}, rates=(0.1, 0.3, 1.0))
    one = Outside(**{**vars(one), **changes})
    one.write(optimizer_file(beside))
    return beside, one


@pytest.mark.parametrize("scale", ["smoke", "pocket", "laptop", "confirm"])
def test_the_scale_is_the_same_but_for_its_optimizer(scale):
    name, _ = written(scale)
    own, base = Protocol.load(name), Protocol.load(scale)
    assert own.optimizers == (SGD,)
    assert own.measure == base.measure and own.corpus == base.corpus and own.sizes == base.sizes
    rates = {(size, SGD): own.guess(SGD) for size in own.sizes}
    ours = {(p.purpose, p.config.size, p.config.seed) for p in own.runs(rates)}
    theirs = base.runs({(size, "adamw"): base.guess("adamw") for size in base.sizes})
    assert ours == {(p.purpose, p.config.size, p.config.seed) for p in theirs if p.purpose != "schemes"}
    for planned in own.runs(rates):
        assert planned.config.scale == name and planned.config.hyper["momentum"] == 0.9
        assert not set(planned.config.name) & set(":/\\") and planned.config.optimizer == SGD
        assert planned.config.from_json(planned.config.to_json()) == planned.config


def test_the_rates_are_searched_until_the_best_lies_inside(monkeypatch):
    name, one = written(learning_rates=(1e-3,))
    tried = []

    def trained(self, planned):
        tried.append(planned)
        return SimpleNamespace(row={"val_loss": 3 + np.log(planned.config.lr / 0.05) ** 2})

    monkeypatch.setattr(Study, "run", trained)
    rates = search_rates(Study(name), one)
    assert rates == tuple(sorted({p.config.lr for p in tried})) and len(tried) == len(rates)
    best = min(rates, key=lambda lr: abs(np.log(lr / 0.05)))
    assert rates[0] < best < rates[-1] and np.allclose(np.diff(np.log(rates)), np.log(3), rtol=1e-5)
    assert {(p.purpose, p.config.size, p.config.seed) for p in tried} == {("sweep", "tiny", 0)}


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: define(Study("smoke"), "lion"), ["'lion'", "module:name"]),
        (lambda: source_of("muon"), ["study's own"]),
        (
            lambda: define(Study("smoke"), SGD, hyper={"momentum": 0.5}),
            ["smoke+sgd", "momentum': 0.9", "momentum': 0.5"],
        ),
        (lambda: define(Study("smoke"), "torch.optim:SDG"), ["'SDG'"]),
        (lambda: Study("smoke+lion"), ["smoke+lion", "make compare"]),
        (lambda: Study("smoke+a+b"), ["smoke+a+b", "one '+'"]),
        (lambda: Outside(source="sgd", label="x", learning_rates=(0.1,)), ["module:Class", "'sgd'"]),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    written()
    with pytest.raises(ValueError) as refusal:
        call()
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


@pytest.mark.parametrize(
    ("hyper", "label"),
    [
        ("growth_rate = inf, floor = -inf, eps = 1e-30", "Prodigy"),
        ('"my key" = 1, "a.b" = "c = 2", "" = 0', "X\t\\n"),
        ("number = 3, real = 3.0, groups = {matrix = {use_muon = true}}, betas = [0.9, 1]", "größer 'once' \U0001f981"),
    ],
)
def test_a_definition_comes_back_as_it_was_written(hyper, label):
    given = tomllib.loads(f"hyper = {{ {hyper} }}")["hyper"]
    name, one = written(hyper=given, label=label)
    found = read_outside(name)
    assert found == one and Protocol.load(name).settings.labels == {SGD: label} and entry(SGD).label == label
    assert {key: type(value) for key, value in found.hyper.items()} == {k: type(v) for k, v in given.items()}
    # and every later step goes by it: the scale with it, its runs, their JSON
    config = Study(name).planned()[0].config
    assert config.hyper == given and RunConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("hyper", [{"a": float("nan")}, {"a": {"b": [None]}}, {"a": date(2026, 1, 1)}])
def test_values_that_no_file_gives_back_are_refused_before_one_is_written(hyper):
    with pytest.raises(ValueError, match=r"hyper\.a.* must be true or false, a number, .*not "):
        written(hyper=hyper)


def test_hyperparameters_are_checked_before_anything_is_trained():
    name, _ = written(hyper={"momentun": 0.9})
    with pytest.raises(ValueError, match=r"hyper\.torch\.optim:SGD: .*momentun; valid: .*momentum"):
        Study(name).check()


def test_without_tables_to_stand_beside_there_is_no_comparison():
    name, one = written()
    with pytest.raises(MissingResults, match="make reproduce SCALE=smoke"):
        compare(begin(Study("smoke"), name, one), one)


def test_the_common_loss_of_the_six_holds_for_yours():
    runs = pd.DataFrame(
        [(f"r{size}{seed}", size, SGD, seed, "finished", 30) for size in "ab" for seed in (0, 1)],
        columns=["run", "size", "optimizer", "seed", "status", "steps"],
    )
    losses = {"ra0": [3.0, 2.5, 2.1], "ra1": [3.0, 2.45, 2.3], "rb0": [2.9, 2.8, 2.7], "rb1": [2.9, 2.6, 2.4]}
    rows = [(run, 10 * (i + 1), loss) for run, values in losses.items() for i, loss in enumerate(values)]
    evaluations = pd.DataFrame(rows, columns=["run", "step", "val_loss"])
    given = pd.DataFrame({"size": ["a", "a", "b"], "seed": [0, 1, 0], "common_loss": [2.48, 2.48, 2.5]})
    found = common_loss(runs, evaluations, given=given).set_index("run")
    assert found.step.to_dict() == {"ra0": 30, "ra1": 20, "rb1": 30}  # rb0 never gets there
    assert found.common_loss.to_dict() == {"ra0": 2.48, "ra1": 2.48, "rb1": 2.5}
    by_seed = common_loss(runs, evaluations, ("size", "seed"), given).set_index("run")
    assert by_seed.step.to_dict() == {"ra0": 30, "ra1": 20}  # of b the six have seed 0 alone


def test_places_and_differences_are_those_of_the_means():
    rows = pd.DataFrame(
        [(size, name, seed, 2 + place / 10 + seed / 1000)
         for size in ("a", "b") for place, name in enumerate([*OPTIMIZER_NAMES[:3], SGD, *OPTIMIZER_NAMES[3:]])
         for seed in range(3)],
        columns=["size", "optimizer", "seed", "loss"],
    )  # fmt: skip
    study = SimpleNamespace(yours=SGD, protocol=SimpleNamespace(optimizers=OPTIMIZER_NAMES))
    found = compare_runs(study, rows, "loss")
    assert decisions.place(study, found) == "4 of 7"
    parts = {"all": (rows, "loss"), "six": (rows[rows.optimizer != SGD], "loss")}
    table = decisions.standing(study, parts).set_index("quantity")
    row = table.loc["all"]
    assert row["yours"].startswith("2.301 [2.3") and row["lowest of the six"].startswith("AdamW 2.001 [")
    assert row["yours minus lowest"].startswith("0.300 [") and row["runs"] == "over a and b, n 6"
    assert table.yours["six"] == "no size at which all of them have one"
