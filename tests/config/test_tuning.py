"""Tuned scales: the search run by run, and the main runs that take its rates."""

import itertools
import math

import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.config import Protocol, Rates, auxiliary_rates, line_search, read_rates, tune
from beyond_outliers.config.rates import pair_search
from beyond_outliers.config.scale import Tuning

QUEST = {"scheme": "quest", "weights": "int4", "activations": "int4"}


def tuned_config(protocol: Protocol, size: str, optimizer: str, lr: float, auxiliary: float):
    return protocol.config(size, optimizer, lr, protocol.tuning.seeds[0], auxiliary=auxiliary)


@pytest.fixture
def protocol():
    return Protocol.load("confirm")


def made_up_loss(config) -> float:
    """A bowl in both log rates, whose bottom moves with the width; beyond it the run diverges."""
    lr, auxiliary = (math.log2(rate) for rate in (config.lr, config.hyper["embedding_lr"]))
    steep = {"adamw": 0.05, "muon": 0.002}.get(config.optimizer, 0.02)
    loss = 3 + steep * (lr + 5 + config.model.width / 32) ** 2 + steep * (auxiliary + 4) ** 2
    return math.nan if lr > -1 or auxiliary > 2 else loss


@pytest.mark.parametrize("tolerance", [0.0, 0.015, 0.2])
@pytest.mark.parametrize("bottom", [-7.3, -5.0, -1.6, 3.2])
@pytest.mark.parametrize("cliff", [1, 4, math.inf])
def test_a_line_search_chooses_by_the_rule(bottom, cliff, tolerance):
    """By brute force over a long line: the smallest rate within tolerance of the best, none beside a cliff."""

    def loss(rate: float) -> float:
        return 0.03 * (math.log2(rate) - bottom) ** 2 if math.log2(rate) < bottom + cliff else math.nan

    found = line_search(loss, 0.1, 2, tolerance)
    line = [float(f"{0.1 * 2.0**k:.6g}") for k in range(-40, 40)]
    safe = [rate for rate, above in itertools.pairwise(line) if math.isfinite(loss(rate) + loss(above))]
    best = min(safe, key=loss)
    assert found["rate"] == min(rate for rate in safe if loss(rate) <= loss(best) + tolerance)
    tried = list(found["tried"])
    assert tried[0] < found["rate"] < tried[-1] and tried == sorted(tried)
    assert found["tried"] == pytest.approx({rate: loss(rate) for rate in tried}, nan_ok=True)


def test_the_search_goes_on_from_run_to_run(protocol):
    """Each round trains what is pending: at most one run a size and optimizer, and in the end all that `tune` asks."""
    losses: dict[str, float] = {}
    for _ in range(200):
        planned = protocol.sweep_runs(losses=losses.get)
        assert {p.purpose for p in planned} == {"sweep"} and set(losses) <= {p.config.name for p in planned}
        pending = [p.config for p in planned if p.config.name not in losses]
        assert len({(c.size, c.optimizer) for c in pending}) == len(pending)
        if not pending:
            break
        losses |= {config.name: made_up_loss(config) for config in pending}
    asked = set()

    def val_loss(config):
        asked.add(config.name)
        return made_up_loss(config)

    for size in protocol.sizes:
        for optimizer in protocol.optimizers:
            tune(protocol, size, optimizer, val_loss)
    assert set(losses) == asked and len(planned) == len(asked)
    at = protocol.sweep_runs("0.16M", losses=losses.get)
    assert at == [p for p in planned if p.config.size == "0.16M"] and {p.config.seed for p in at} == {100}


def test_main_runs_take_the_rates_of_their_own_size(protocol):
    rates = {
        (size, optimizer): Rates(1e-2 / 2**i, 2e-2 * 2**j)
        for i, size in enumerate(protocol.sizes)
        for j, optimizer in enumerate(protocol.optimizers)
    }
    runs = protocol.runs(rates)
    assert len(runs) == 2 * 6 * (10 + 10 + 6)
    for (size, optimizer), chosen in rates.items():
        tuned = tuned_config(protocol, size, optimizer, chosen.lr, chosen.auxiliary).replace(seed=200)
        of = {p.purpose: p.config for p in runs if p.config.replace(quantization=None) == tuned}
        assert of["full_precision"].run_id == tuned.run_id
        assert of["qat"].run_id == tuned.replace(quantization={**QUEST, "head": True}).run_id
        assert tuned.hyper == auxiliary_rates(optimizer, chosen.auxiliary, protocol.model(size).width)
    some = {("0.08M", name): Rates(1e-2, 1e-2) for name in protocol.optimizers}
    assert {p.config.size for p in protocol.runs(some)} == {"0.08M"}, "no size takes another's rates"
    with pytest.raises(ValueError, match="lacks the auxiliary rate of scale confirm"):
        protocol.runs({("0.08M", "muon"): Rates(1e-2)})


def test_rates_come_back_from_the_table_as_they_went_in(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    assert read_rates("confirm") == {}
    (tmp_path / "confirm").mkdir()
    third = float(f"{0.02 / 3:.17g}")  # a number whose last bit a quick parser loses
    rows = [("0.08M", "muon", third, 0.02), ("0.16M", "muon", 0.1 + 0.2, third)]
    table = pd.DataFrame(rows, columns=["size", "optimizer", "lr", "auxiliary"])
    table.to_csv(tmp_path / "confirm" / "learning_rates.csv", index=False)
    rates = read_rates("confirm")
    assert rates == {("0.08M", "muon"): Rates(third, 0.02), ("0.16M", "muon"): Rates(0.1 + 0.2, third)}
    config = Protocol.load("confirm").config("0.16M", "muon", seed=3)
    assert (config.lr, config.hyper["embedding_lr"]) == (0.1 + 0.2, third)


def test_only_tuned_scales_have_a_rule_and_only_swept_ones_grids(protocol):
    with pytest.raises(ValueError, match=r"smoke has no \[tuning\]"):
        Protocol.load("smoke").tuning  # noqa: B018
    with pytest.raises(ValueError, match="confirm has no grids"):
        protocol.grid("adamw")


def test_a_rate_without_effect_ends_the_search_after_three_runs():
    tried = []

    def loss(rate: float) -> float:
        tried.append(rate)
        return 5.25

    with pytest.raises(ValueError, match=r"0\.05, 0\.1, 0\.2.* loss 5\.25: the learning rate has no effect"):
        line_search(loss, 0.1, 2, 0.0)
    assert len(tried) == 3


GRID = Tuning(seeds=(1, 2, 3), factor=2, tolerance=0.05, start={}, shape=(5, 3), finalists=4)


def bowl(lr: float, auxiliary: float, seed: int, bottom=(3.0, 1.0)) -> float:
    """Lowest at 2^bottom; a seed shifts all pairs alike; the matrix rates from 2^9 on diverge."""
    x, y = math.log2(lr) - bottom[0], math.log2(auxiliary) - bottom[1]
    return math.nan if lr >= 2**9 else 0.04 * (x * x + x * y + y * y) + 0.01 * seed


@pytest.mark.parametrize("bottom", [(2.2, 1.1), (6.4, 1.0), (1.0, -4.3), (-3.1, 5.05), (8.7, 2.0)])
@pytest.mark.parametrize("cross_seeds", [0, 2])
def test_a_search_over_pairs_chooses_by_the_rule_wherever_the_lowest_loss_lies(bottom, cross_seeds):
    asked = []

    def loss(lr, auxiliary, seed):
        asked.append((lr, auxiliary, seed))
        return bowl(lr, auxiliary, seed, bottom)

    found = pair_search(loss, Rates(1.0, 1.0), GRID, cross_seeds)
    assert len(asked) == len(set(asked)) == found["n_runs"]
    safe = {(x, y) for x in range(-10, 8) for y in range(-10, 10)}  # 2^8 stands beside a diverged rate
    every = {pair: bowl(2.0 ** pair[0], 2.0 ** pair[1], 0, bottom) for pair in safe}
    best = min(every, key=every.get)
    last = cross_seeds or len(GRID.seeds)
    first, trained = ({(math.log2(x), math.log2(y)) for x, y, seed in asked if seed == n} for n in (1, last))
    if not cross_seeds:
        assert trained == set(sorted(first & safe, key=every.get)[:4])
    assert best in trained
    within = [pair for pair in trained & safe if every[pair] <= every[best] + GRID.tolerance]
    assert (math.log2(found["lr"]), math.log2(found["auxiliary"])) == min(within)


def test_a_search_over_pairs_that_never_ends_or_has_no_number_says_so():
    with pytest.raises(ValueError, match="another start"):
        pair_search(lambda lr, auxiliary, seed: lr, Rates(1.0, 1.0), GRID)
    with pytest.raises(ValueError, match="diverged"):
        pair_search(lambda lr, auxiliary, seed: math.nan, Rates(1.0, 1.0), GRID, 1)
