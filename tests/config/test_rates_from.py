"""Sizes that are not swept have the learning rates that another scale chose at the same size."""

import tomllib

import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.config import Protocol, Rates
from beyond_outliers.study import Study
from beyond_outliers.study import rates as study_rates

COMMITTED = pd.read_csv(paths.RESULTS / "confirm" / "learning_rates.csv").query("size == '0.08M'")


@pytest.fixture
def protocol(tmp_path, monkeypatch) -> Protocol:
    """Scale "pocket" before its sweep."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    paths.own_results("pocket").mkdir(parents=True)
    return Protocol.load("pocket")


def test_its_runs_are_those_of_the_other_scale_but_for_its_name(protocol):
    other = Protocol.load("confirm")
    runs = [p.config for p in protocol.runs(protocol.rates()) if p.purpose in ("full_precision", "qat")]
    assert {config.size for config in runs} == {"0.08M"}  # 0.03M waits for its sweep
    assert {config.optimizer for config in runs} == set(protocol.optimizers)
    for config in runs:
        row = COMMITTED.query("optimizer == @config.optimizer").iloc[0]
        scheme = (config.quantization or {}).get("scheme")
        twin = other.config("0.08M", row.optimizer, row.lr, config.seed, scheme, True, row.auxiliary)
        assert config.replace(scale="confirm", evaluations=twin.evaluations) == twin


def test_a_swept_size_keeps_its_own_rates_and_lends_them_to_nobody(protocol):
    assert not any(of[0] == "0.03M" for of in protocol.rates())
    rows = [(at, name, 1e-3) for at in ("0.03M", "0.08M") for name in protocol.optimizers]
    table = pd.DataFrame(rows, columns=["size", "optimizer", "lr"])  # the second size must not count: it has its own
    table.to_csv(paths.own_results("pocket") / "learning_rates.csv", index=False)
    rates = protocol.rates()
    assert rates["0.03M", "soap"] == Rates(1e-3) and rates["0.08M", "soap"] == Rates(0.01, 0.02)
    assert protocol.config("0.08M", "soap").lr == 0.01
    # and only the swept size waits for a choice
    assert [protocol.tuning_size(size) for size in ("0.03M", "0.08M")] == ["0.03M", "0.08M"]
    assert "sweep" in protocol.purposes("0.03M") and "sweep" not in protocol.purposes("0.08M")


def test_the_table_that_is_written_comes_back_with_and_without_an_auxiliary_rate(protocol, monkeypatch):
    """What `choose` writes: rows of the sweep, which have no auxiliary rate, and those of the file, which have."""
    swept = [{"size": "0.03M", "optimizer": "soap", "lr": 0.1 + 0.2, "edge": False, "grid": "0.1 0.3", "n_runs": 2}]
    monkeypatch.setattr(study_rates, "_swept", lambda study, size: swept)
    table = Study("pocket").choose_learning_rates("0.03M").set_index(["size", "optimizer"])
    assert table.chosen_by["0.03M", "soap"] == "pocket" and (table.chosen_by["0.08M"] == "confirm").all()
    assert Study("pocket").rates == protocol.lent | {("0.03M", "soap"): Rates(0.1 + 0.2)}


@pytest.mark.parametrize(
    ("key", "value"),
    [("rates", {}), ("rates_from", None), *(("rates", {size: {}}) for size in ("0.08M", "0.03M", "1M"))],
)
def test_rates_that_do_not_fit_are_refused(tmp_path, monkeypatch, key, value):
    from scale_files import toml

    table = tomllib.loads((paths.SCALES / "pocket.toml").read_text()) | {key: value}
    monkeypatch.setattr(paths, "SCALES", tmp_path)
    (tmp_path / "own.toml").write_text(toml({name: part for name, part in table.items() if part is not None}))
    with pytest.raises(ValueError, match=r"own\.toml: (rates_from = .* ask for each other|rates\.\S+ must be of)"):
        Protocol.load("own")
