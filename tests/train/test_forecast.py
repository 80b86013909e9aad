"""What `--dry-run` says of a run: known counts, a time that the probe bears out, and nothing written."""

import dataclasses
import re
import time

import numpy as np
import pytest
import torch

from beyond_outliers import paths
from beyond_outliers.cli import main
from beyond_outliers.config import Olmo2Config, Protocol
from beyond_outliers.optimizers import build_optimizer
from beyond_outliers.optimizers.psgd import PSGD
from beyond_outliers.train import build_model
from beyond_outliers.train.forecast import _share_of_refreshes, forecast, operations, pace


def test_operations_are_those_of_the_matrix_products():
    """6 a parameter and token, and 12 depth width a token and position attended to; recomputing adds a third."""
    model = Olmo2Config(vocab_size=320, width=32, depth=2, n_heads=2)
    assert operations(model, 64) == 64 * (6 * model.n_parameters + 12 * 2 * 32 * 64)
    assert operations(model, 64, recompute=True) == pytest.approx(4 / 3 * operations(model, 64))


def test_refreshes_are_counted_as_often_as_they_happen():
    p = torch.nn.Parameter(torch.zeros(2, 2))
    psgd = PSGD([p], lr=0.1)
    due = np.clip(np.exp(-0.001 * (np.arange(3000) - 500)), 0.03, 1).mean()
    assert _share_of_refreshes(psgd, 3000) == pytest.approx(due, rel=0.01)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for name, share in (("shampoo", 1 / 20), ("soap", 1 / 10), ("muon", 1), ("adamw", 1)):
        assert _share_of_refreshes(build_optimizer(model, name, 0.1), 100) == share


@pytest.mark.slow
def test_the_dry_run_says_what_the_run_will_be_and_writes_nothing(capsys):
    given = ["--scale", "smoke", "--size", "small", "--optimizer", "soap", "--lr", "0.01", "--dry-run"]
    assert main(["train", *given]) == 0
    said, config = capsys.readouterr().out, Protocol.load("smoke").config("small", "soap", lr=0.01)
    assert f"parameters  {config.model.n_parameters:,} " in said
    assert (
        f"tokens      {config.steps * config.tokens_per_step:,} " in said and f"steps       {config.steps} of" in said
    )
    for part in ("memory", "weights", "gradients", "optimizer", "activations", "logits"):
        assert re.search(rf"^ *{part} +[\d.,]+ [MG]B", said, re.M), part
    assert re.search(r"^time +about [\d.]+ (s|min|h)", said, re.M)
    assert not list(paths.RUNS.rglob("*.json"))


@pytest.mark.slow
def test_a_probe_that_is_cut_says_so(run_config, monkeypatch):
    """Fewer sequences, then fewer blocks; matrices whose eigenvectors would take minutes are not tried."""
    config = run_config.replace(model=Olmo2Config(vocab_size=320, width=32, depth=4, n_heads=2), optimizer="shampoo")
    monkeypatch.setattr("beyond_outliers.train.forecast.PROBE", 1.5 * operations(config.model, config.context))
    assert (pace(config).rows, pace(config).depth) == (1, 4)
    monkeypatch.setattr("beyond_outliers.train.forecast.PROBE", 0.5 * operations(config.model, config.context))
    monkeypatch.setattr("beyond_outliers.train.forecast.LARGEST", 100)
    found = pace(config)
    assert (found.rows, found.depth, found.update) == (1, 1, None)
    said = forecast(config)
    assert "1 x 32 tokens and 1 of 4 blocks" in said and "without the optimizer's step" in said


@pytest.mark.slow
def test_the_time_of_a_step_is_that_of_steps(run_config):
    """Within a factor of three, as busy as machines are that run tests; a sequence or a block missed would be more."""
    model = Olmo2Config(vocab_size=320, width=64, depth=4, n_heads=2)
    config = run_config.replace(model=model, optimizer="soap", batch_size=64, micro_batch=8)
    trained = build_model(config)
    optimizer = build_optimizer(trained, "soap", 1e-3)
    ids, times = torch.randint(320, (8, config.context)), []
    for _ in range(11):
        start = time.perf_counter()
        for _ in range(8):
            trained.loss(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    measured = float(np.mean(times[1:]))
    assert measured / 3 < pace(config).step < 3 * measured
    deeper = dataclasses.replace(model, depth=8)
    assert pace(config.replace(model=deeper)).step > pace(config).step


def test_shares_that_do_not_divide_are_refused(run_config):
    with pytest.raises(ValueError, match="batch_size 8 over 3 workers"):
        forecast(run_config, workers=3)
