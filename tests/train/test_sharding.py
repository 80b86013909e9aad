"""Weights divided among two workers (FSDP2 over gloo): the numbers of one process, and runs that go on either way."""

import pytest

from beyond_outliers.train import evaluation_steps, load_result, run_folder, train
from beyond_outliers.train.__main__ import main
from beyond_outliers.train.machine import check_shares
from torchrun import furthest, trained, weights

SHARD = {"shard": True}


@pytest.mark.slow
def test_sharded_workers_equal_one_process_in_float64(run_config, tmp_path):
    """Two micro-batches a worker, an odd number of heads' scales, activations kept and recomputed."""
    base = run_config.replace(micro_batch=2, evaluations=2, lr=1e-3)
    configs = [base, base.replace(optimizer="sgd", lr=1e-2), base.replace(clip=0.1)]
    for workers, options in ((1, {}), (2, SHARD)):
        done, _ = trained(configs, tmp_path / f"{workers}", workers, "float64", options=options)
        assert done.returncode == 0, done.stderr[-3000:]
    for config in configs:
        assert furthest(weights(config, tmp_path / "1"), weights(config, tmp_path / "2")) < 1e-9, config.optimizer
        one, two = (load_result(run_folder(config, tmp_path / f"{workers}")).row for workers in (1, 2))
        assert one["val_loss"] == pytest.approx(two["val_loss"], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [((1, {}), (2, SHARD)), ((2, SHARD), (1, {}))], ids=["to", "from"])
def test_a_run_goes_on_sharded_or_not(run_config, tmp_path, first, then):
    config = run_config.replace(lr=1e-3)
    train(config, root=tmp_path / "whole", progress=False)
    workers, options = first
    stopped, _ = trained([config], tmp_path, workers, fails_at=evaluation_steps(config)[1] + 2, options=options)
    assert stopped.returncode != 0 and load_result(run_folder(config, tmp_path)) is None
    workers, options = then
    done, _ = trained([config], tmp_path, workers, options={**options, "recompute": True})
    assert done.returncode == 0, done.stderr[-3000:]
    assert furthest(weights(config, tmp_path / "whole"), weights(config, tmp_path)) < 1e-4


@pytest.mark.slow
def test_workers_agree_that_a_sharded_run_has_diverged(run_config, tmp_path):
    config = run_config.replace(lr=1e8)
    done, _ = trained([config], tmp_path, 2, options=SHARD)
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_result(run_folder(config, tmp_path)).row["status"] == "diverged"


def test_what_cannot_be_sharded_is_refused(run_config, capsys):
    with pytest.raises(ValueError, match=r"muon updates whole matrices.*valid: adamw, sgd"):
        check_shares(run_config.replace(optimizer="muon"), 2, shard=True)
    with pytest.raises(ValueError, match="'quest' rounds whole weights"):
        quantization = {"scheme": "quest", "weights": "int4", "activations": "int4"}
        check_shares(run_config.replace(quantization=quantization), 2, shard=True)
    with pytest.raises(ValueError, match="one worker has nothing to shard"):
        train(run_config, shard=True)
    given = ["--scale", "smoke", "--size", "tiny", "--optimizer", "adamw", "--lr", "0.01", "--shard"]
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit):
            main([*given, *more])
        assert "valid: " in capsys.readouterr().err
