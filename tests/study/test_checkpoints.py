"""Checkpoints that are committed: written in bfloat16, loaded as the run's model."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from beyond_outliers import paths
from beyond_outliers.config import Protocol
from beyond_outliers.config.protocol import Planned
from beyond_outliers.study import checkpoints, measure
from beyond_outliers.train import train


@pytest.fixture
def study(tmp_path, monkeypatch, run_config):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path / "checkpoints")
    results = {
        seed: train(run_config.replace(seed=seed), root=tmp_path / "runs", compile=False, progress=False)
        for seed in (4, 3)
    }
    planned = [Planned("full_precision", result.config) for result in results.values()]
    return SimpleNamespace(scale="test", planned=lambda: planned, result=lambda p: results[p.config.seed])


def test_the_lowest_seed_is_kept_and_loads_within_bfloat16(study):
    (file,) = checkpoints.keep(study)
    assert checkpoints.checkpoints("test") == {file.stem: file}
    config, model = checkpoints.load_checkpoint(file)
    assert config.seed == 3 and file.stem == config.name
    original = study.result(SimpleNamespace(config=config)).load_model()
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16().float()), name
    assert model.head.weight is model.embedding.weight and not model.training


def test_foreign_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no config"):
        checkpoints.load_checkpoint(tmp_path / "x.safetensors")


def test_a_checkpoint_is_replayed_beside_its_rows(study):
    (file,) = checkpoints.keep(study)
    settings = Protocol.load("smoke").measure
    config, model = checkpoints.load_checkpoint(file)
    rows = measure.measure_model(model, config, "light", settings)  # as if the run itself had been in bfloat16
    tables = {name: table.assign(run=config.name, checkpoint="final") for name, table in rows.items()}
    later = {name: table.assign(checkpoint="common") for name, table in tables.items()}  # other rows of the run
    later["ptq"] = later["ptq"].assign(increase=9.0, val_loss=9.0)
    tables = {name: pd.concat([table, later[name]]) for name, table in tables.items()}
    study.protocol, study.table = SimpleNamespace(measure=settings), tables.__getitem__
    (row,) = checkpoints.replay(study).to_dict("records")
    assert (row["run"], row["seed"]) == (config.name, 3)
    for name in ("loss", "damage", "mmr", "R_L"):
        assert row[name] == pytest.approx(row[f"{name}_replayed"], rel=1e-6) and row[name] != 0, name
    study.table = {name: table.assign(run="another") for name, table in tables.items()}.__getitem__
    with pytest.raises(ValueError, match="belongs to no run of the tables of test"):
        checkpoints.replay(study)
    file.unlink()
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoints.replay(study)
