"""Sizes that are not swept take the learning rates that another scale chose at the same size."""

import copy
import tomllib

import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.config import Protocol, Rates
from beyond_outliers.study import Study
from beyond_outliers.study import rates as study_rates
from scale_files import toml

POCKET, CONFIRM = (tomllib.loads((paths.SCALES / f"{name}.toml").read_text()) for name in ("pocket", "confirm"))
COMMITTED = pd.read_csv(paths.RESULTS / "confirm" / "learning_rates.csv")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads scale "pocket", changed, and its lender "confirm" with a table of chosen rates in the repository."""
    monkeypatch.setattr(paths, "SCALES", tmp_path)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    (tmp_path / "results" / "confirm").mkdir(parents=True)
    paths.own_results("pocket").mkdir(parents=True)

    def of(table=POCKET, chosen=COMMITTED) -> Protocol:
        (tmp_path / "pocket.toml").write_text(toml(table))
        (tmp_path / "confirm.toml").write_text(toml(CONFIRM))
        chosen.to_csv(tmp_path / "results" / "confirm" / "learning_rates.csv", index=False)
        return Protocol.load("pocket")

    return of


def changed(section: str, key: str, value):
    table = copy.deepcopy(POCKET)
    table[section][key] = value
    return table


def test_its_runs_are_those_of_the_lender_but_for_the_name_of_the_scale(load):
    protocol, lender = load(), Protocol.load("confirm")
    runs = [p.config for p in protocol.runs(protocol.rates()) if p.purpose in ("full_precision", "qat")]
    assert {config.size for config in runs} == {"0.08M"}  # 0.03M waits for its sweep
    assert {config.optimizer for config in runs} == set(protocol.optimizers)
    for config in runs:
        row = COMMITTED.query("size == '0.08M' and optimizer == @config.optimizer").iloc[0]
        scheme = (config.quantization or {}).get("scheme")
        twin = lender.config("0.08M", row.optimizer, row.lr, config.seed, scheme, True, row.auxiliary)
        assert config.replace(scale="confirm", evaluations=twin.evaluations) == twin


def test_a_swept_size_keeps_its_own_rates_and_lends_them_to_nobody(load, tmp_path):
    protocol = load()
    assert not any(of[0] == "0.03M" for of in protocol.rates())
    rows = [(at, name, 1e-3) for at in ("0.03M", "0.08M") for name in protocol.optimizers]
    table = pd.DataFrame(rows, columns=["size", "optimizer", "lr"])  # the second size must not count: it is lent
    table.to_csv(paths.own_results("pocket") / "learning_rates.csv", index=False)
    rates = protocol.rates()
    assert rates["0.03M", "soap"] == Rates(1e-3) and rates["0.08M", "soap"] == Rates(0.01, 0.02)
    assert protocol.config("0.08M", "soap").lr == 0.01
    # and only the swept size waits for a choice
    assert [protocol.tuning_size(size) for size in ("0.03M", "0.08M")] == ["0.03M", "0.08M"]
    assert "sweep" in protocol.purposes("0.03M") and "sweep" not in protocol.purposes("0.08M")


def test_the_table_that_is_written_comes_back_with_and_without_an_auxiliary_rate(load, monkeypatch):
    """What `choose` writes: rows of the sweep, which have no auxiliary rate, and the lent ones, which have."""
    load()
    study = Study("pocket")
    swept = [{"size": "0.03M", "optimizer": "soap", "lr": 0.1 + 0.2, "edge": False, "grid": "0.1 0.3", "n_runs": 2}]
    monkeypatch.setattr(study_rates, "_swept", lambda study, size: swept)
    table = study.choose_learning_rates("0.03M").set_index(["size", "optimizer"])
    assert table.chosen_by["0.03M", "soap"] == "pocket" and (table.chosen_by["0.08M"] == "confirm").all()
    assert Study("pocket").rates == study.protocol.lent | {("0.03M", "soap"): Rates(0.1 + 0.2)}


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("training", "batch_size", 16, "so its batch_size must be 8, not 16"),
        ("training", "tokens_per_parameter", 10, "so its steps must be 1606, not 803"),
        ("training", "weight_decay", 0.1, "so its weight_decay must be 0.0, not 0.1"),
        ("sizes", "0.08M", {"width": 32, "depth": 2, "n_heads": 2}, "so its model must be .*depth=4.*, not .*depth=2"),
        ("corpus", "vocab_size", 512, "so its model must be .*vocab_size=1024"),
    ],
)
def test_what_would_carry_a_rate_to_another_run_is_refused(load, section, key, value, message):
    with pytest.raises(ValueError, match=f"pocket: 0.08M takes its rates from confirm, {message}"):
        load(changed(section, key, value)).rates()


def test_a_lender_without_the_rate_is_refused(load):
    with pytest.raises(ValueError, match=r"confirm, which has none of soap there; valid sizes: 0\.08M"):
        load(chosen=COMMITTED.query("size == '0.08M' and optimizer != 'soap'")).rates()
    with pytest.raises(ValueError, match="unknown scale 'bank'; valid: confirm, pocket"):
        load({**POCKET, "rates_from": "bank"}).rates()
