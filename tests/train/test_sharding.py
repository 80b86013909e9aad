"""Weights divided among two workers (FSDP2 over gloo): the numbers of one process, and runs that go on either way."""

import json

import pytest

from beyond_outliers.cli import main
from beyond_outliers.train import evaluation_steps, load_result, run_folder, train
from beyond_outliers.train.machine import check_shares
from torchrun import furthest, launched, trained, weights

SHARD = {"shard": True}
QUEST = {"scheme": "quest", "weights": "int4", "activations": "int4"}


KEEPING = """
import json, pathlib, sys, torch
from beyond_outliers.config import Olmo2Config
from beyond_outliers.model import Olmo2
from beyond_outliers.optimizers import build_optimizer
from beyond_outliers.train.machine import LossModule
from beyond_outliers.train.workers import Workers
workers = Workers(torch.device("cpu"), shard=True)
model = Olmo2(Olmo2Config(vocab_size=64, width=32, depth=4, n_heads=2))
workers.take(model)
optimizer = build_optimizer(model, "soap", lr=1e-3)
loss = workers.join(LossModule(model, False), optimizer)
ids = torch.arange(64).view(2, 32)
loss(ids, ids).backward()
optimizer.step()
tensors = {name: [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
           for name, p in optimizer.named_parameters()}
mine = [name for name, kept in tensors.items() if not any(v.is_meta for v in kept)]
state = optimizer.state_dict()["state"]
whole = not any(v.is_meta for e in state.values() for v in e.values() if isinstance(v, torch.Tensor))
held = sum(v.numel() for name in mine for v in tensors[name])
found = {"kept": mine, "held": held, "all": list(tensors), "whole": whole}
pathlib.Path(sys.argv[1], f"{workers.rank}.json").write_text(json.dumps(found))
workers.leave()
"""


@pytest.mark.slow
def test_sharded_workers_equal_one_process_in_float64(run_config, tmp_path):
    """Two micro-batches a worker, an odd number of heads' scales, activations kept and recomputed.

    SOAP amplifies roundings, however many workers there are; its control is one process with other micro-batches.
    """
    base = run_config.replace(micro_batch=2, evaluations=2, lr=1e-3)
    configs = [base, base.replace(optimizer="sgd", lr=1e-2), base.replace(clip=0.1)]
    configs += [base.replace(optimizer=name) for name in ("muon", "psgd", "scion", "shampoo")]
    configs += [base.replace(quantization={**QUEST, "scheme": scheme}) for scheme in ("quest", "ste")]
    configs += [base.replace(optimizer="muon", quantization=QUEST)]
    soap, control = (base.replace(optimizer="soap", micro_batch=size) for size in (2, 4))
    for workers, runs, options in ((1, [*configs, soap, control], {}), (2, [*configs, soap], SHARD)):
        done, _ = trained(runs, tmp_path / f"{workers}", workers, "float64", options=options)
        assert done.returncode == 0, done.stderr[-3000:]
    amplified = furthest(weights(soap, tmp_path / "1"), weights(control, tmp_path / "1"))
    assert furthest(weights(soap, tmp_path / "1"), weights(soap, tmp_path / "2")) < 3 * amplified
    for config in configs:
        assert furthest(weights(config, tmp_path / "1"), weights(config, tmp_path / "2")) < 1e-9, config.name
        one, two = (load_result(run_folder(config, tmp_path / f"{workers}")).row for workers in (1, 2))
        assert one["val_loss"] == pytest.approx(two["val_loss"], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [((1, {}), (2, SHARD)), ((2, SHARD), (1, {}))], ids=["to", "from"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "psgd"])
def test_a_run_goes_on_sharded_or_not(run_config, tmp_path, optimizer, first, then):
    config = run_config.replace(lr=1e-3, optimizer=optimizer)
    train(config, root=tmp_path / "whole", progress=False)
    workers, options = first
    stopped, _ = trained([config], tmp_path, workers, fails_at=evaluation_steps(config)[1] + 2, options=options)
    assert stopped.returncode != 0 and load_result(run_folder(config, tmp_path)) is None
    workers, options = then
    done, _ = trained([config], tmp_path, workers, options={**options, "recompute": True})
    assert done.returncode == 0, done.stderr[-3000:]
    assert furthest(weights(config, tmp_path / "whole"), weights(config, tmp_path)) < 1e-4


@pytest.mark.slow
def test_a_worker_keeps_whole_copies_and_states_of_its_own_parameters_alone(tmp_path):
    """Every parameter has one owner, the two hold about as much, and the first worker's state_dict has all of it."""
    done, _ = launched(KEEPING, tmp_path, 2, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert not set(first["kept"]) & set(second["kept"])
    assert {*first["kept"], *second["kept"]} == set(first["all"])
    assert 0.4 < first["held"] / (first["held"] + second["held"]) < 0.6
    assert first["whole"] and not second["whole"]


@pytest.mark.slow
def test_workers_agree_that_a_sharded_run_has_diverged(run_config, tmp_path):
    config = run_config.replace(lr=1e8)
    done, _ = trained([config], tmp_path, 2, options=SHARD)
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_result(run_folder(config, tmp_path)).row["status"] == "diverged"


def test_what_cannot_be_sharded_is_refused(run_config, capsys):
    with pytest.raises(ValueError, match=r"torch.optim:Adamax comes from outside.*valid: adamw, muon"):
        check_shares(run_config.replace(optimizer="torch.optim:Adamax"), 2, shard=True)
    with pytest.raises(ValueError, match=r"'lsq' sets its steps in the first forward pass.*valid with shard: 'quest'"):
        check_shares(run_config.replace(quantization={**QUEST, "scheme": "lsq"}), 2, shard=True)
    with pytest.raises(ValueError, match="one worker has nothing to shard"):
        train(run_config, shard=True)
    given = ["--scale", "smoke", "--size", "tiny", "--optimizer", "adamw", "--lr", "0.01", "--shard"]
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit):
            main(["train", *given, *more])
        assert "valid: " in capsys.readouterr().err
