"""Several processes under torchrun (gloo): the same run as one process, and an end when one of them fails."""

import pytest
import torch

from beyond_outliers.optimizers import OPTIMIZERS
from beyond_outliers.train import evaluation_steps, load_result, run_folder, train
from torchrun import furthest, trained, weights

pytestmark = pytest.mark.slow


def test_two_workers_equal_one_in_float64_for_every_optimizer(run_config, tmp_path):
    """Over fifty steps, weights of size one: what differs is rounding alone.

    SOAP amplifies it, however many workers there are: the embedding's first covariance has fewer directions than rows,
    the basis of the rest is rounding, and later gradients are scaled in that basis. Its control is one process with
    another micro-batch.
    """
    base = run_config.replace(tokens_per_parameter=0.57, evaluations=1, lr=1e-3)
    assert base.steps == 50
    configs = [base.replace(optimizer=name) for name in OPTIMIZERS]
    control = base.replace(optimizer="soap", micro_batch=4)
    for workers, runs in ((1, [*configs, control]), (2, configs)):
        done, _ = trained(runs, tmp_path / f"{workers}", workers, "float64")
        assert done.returncode == 0, done.stderr[-3000:]
    found = {c.optimizer: furthest(weights(c, tmp_path / "1"), weights(c, tmp_path / "2")) for c in configs}
    print(found)
    assert weights(configs[0], tmp_path / "1")["embedding.weight"].dtype == torch.float64
    assert max(value for name, value in found.items() if name != "soap") < 1e-9, found
    assert found["soap"] < 3 * furthest(weights(configs[-1], tmp_path / "1"), weights(control, tmp_path / "1"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])  # muon's state is divided between the two workers
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_workers(run_config, tmp_path, first, then, optimizer):
    config = run_config.replace(lr=1e-3, optimizer=optimizer)
    whole = train(config, root=tmp_path / "whole", progress=False)
    stopped, _ = trained([config], tmp_path / "parts", first, fails_at=evaluation_steps(config)[1] + 2)
    assert stopped.returncode != 0 and load_result(run_folder(config, tmp_path / "parts")) is None
    assert len(list(run_folder(config, tmp_path / "parts").glob("state-*.pt"))) == 2
    done, _ = trained([config], tmp_path / "parts", then)
    assert done.returncode == 0, done.stderr[-3000:]
    assert furthest(weights(config, tmp_path / "whole"), weights(config, tmp_path / "parts")) < 1e-4
    assert load_result(run_folder(config, tmp_path / "parts")).row["val_loss"] == pytest.approx(
        whole.row["val_loss"], abs=1e-4
    )


def test_a_worker_that_fails_ends_the_job_within_a_minute(run_config, tmp_path):
    done, seconds = trained([run_config], tmp_path, 2, fails_at=5)
    assert done.returncode != 0 and "exitcode  : 3" in done.stderr
    assert seconds < 60
