"""Training: schedule, folder, resume, divergence, accumulation, data parallelism."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from beyond_outliers.config import OPTIMIZER_NAMES
from beyond_outliers.config.scale import Runs
from beyond_outliers.quantizers import QuestQuantizer
from beyond_outliers.study import verify
from beyond_outliers.train import (
    build_model,
    evaluation_steps,
    load_result,
    machine,
    rate_factor,
    run_folder,
    train,
    weights_path,
)
from beyond_outliers.train import loop as training


def final_weights(result):
    return load_file(weights_path(result.folder, result.row["steps"]))


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_the_schedule_is_a_trapezoid():
    factors = [rate_factor(step, 100, 0.05, 0.20) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:81] == [1.0] * 76
    assert factors[80:] == pytest.approx([1 - i / 20 for i in range(20)])
    assert rate_factor(3, 10, 0, 0) == 1.0


def test_evaluations_are_spread_and_end_at_the_end(run_config):
    steps = evaluation_steps(run_config)
    assert len(steps) == run_config.evaluations and steps[-1] == run_config.steps
    assert 0 not in steps


def test_a_run_leaves_its_folder(run_config, tmp_path):
    result = train(run_config, root=tmp_path, progress=False)
    assert result.folder == run_folder(run_config, tmp_path)
    assert json.loads((result.folder / "config.json").read_text()) == json.loads(run_config.to_json())
    assert result.row["status"] == "finished" and result.row["run_id"] == run_config.run_id
    for column in ("seed", "lr", "device", "torch", "commit", "tokens_per_second", "threads", "epochs"):
        assert column in result.row
    metrics = result.metrics
    assert metrics.step.is_monotonic_increasing and metrics.step.iloc[0] == 0
    assert metrics.tokens.iloc[-1] == run_config.steps * run_config.tokens_per_step
    assert metrics.val_loss.dropna().iloc[-1] < metrics.val_loss.iloc[0] - 0.3
    assert list(result.evaluations.step) == evaluation_steps(run_config)
    assert not list(result.folder.glob("state*"))
    assert not list(result.folder.glob("**/*.tmp"))
    model = result.load_model()
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.state_dict()["final_norm.gain"], final_weights(result)["final_norm.gain"])


def test_what_the_caller_has_set_in_torch_changes_no_bit(run_config, tmp_path):
    config = run_config.replace(optimizer="soap", hyper={"frequency": 3})
    expected = train(config, root=tmp_path / "plain", progress=False)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found = train(config, root=tmp_path / "set", progress=False)
            assert build_model(config).embedding.weight.dtype == torch.float32
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_weights(final_weights(found), final_weights(expected))
    assert found.row["val_loss"] == expected.row["val_loss"]


def test_a_finished_run_is_only_loaded(run_config, tmp_path, monkeypatch):
    first = train(run_config, root=tmp_path, progress=False)
    monkeypatch.setattr(training, "_Run", lambda *_: pytest.fail("trained again"))
    assert train(run_config, root=tmp_path, progress=False).row == first.row


def test_the_initial_weights_depend_on_the_seed_alone(run_config):
    assert_same_weights(
        build_model(run_config).state_dict(), build_model(run_config.replace(optimizer="muon")).state_dict()
    )
    other = build_model(run_config.replace(seed=1)).state_dict()
    assert not torch.equal(build_model(run_config).state_dict()["embedding.weight"], other["embedding.weight"])


QUEST = {"scheme": "quest", "weights": "int4", "activations": "int4"}
RESUMED = [(name, None) for name in ("adamw", "muon", "psgd", "scion", "shampoo", "soap")]
RESUMED += [("adamw", QUEST), ("soap", QUEST), ("muon", {**QUEST, "scheme": "lsq"})]


@pytest.mark.parametrize("optimizer", OPTIMIZER_NAMES)
def test_a_branch_is_the_run_of_its_length(run_config, tmp_path, optimizer):
    trunk = run_config.replace(optimizer=optimizer, evaluations=5)
    ((branch, start),) = Runs(sizes=("tiny",), seeds=(0,), at=(0.4,)).branches(trunk)
    assert branch.steps == 1.25 * start and branch.warmup * branch.steps == trunk.warmup * trunk.steps
    options = {"trunk": trunk, "start": start, "compile": False, "progress": False}
    whole = train(branch, root=tmp_path / "whole", **options)  # no trunk has left a state there
    left = train(trunk, root=tmp_path, keep=[start], compile=False, progress=False)
    assert (kept := left.folder / f"trunk-{start:06d}.pt").exists()
    part = train(branch, root=tmp_path, **options)
    assert not kept.exists() and part.row["val_loss"] == whole.row["val_loss"]
    assert part.metrics.dropna(subset="val_loss").step.tolist() == [0, branch.steps]
    assert_same_weights(final_weights(part), final_weights(whole))
    assert not verify.damages(tmp_path)


@pytest.mark.parametrize(("optimizer", "quantization"), RESUMED)
def test_an_interrupted_run_resumes_to_the_same_weights(run_config, tmp_path, monkeypatch, optimizer, quantization):
    config = run_config.replace(optimizer=optimizer, lr=1e-3, quantization=quantization)
    whole = train(config, root=tmp_path / "whole", progress=False)

    # killed in the middle of an optimizer step after the second evaluation, then started again
    stop, step = evaluation_steps(config)[1] + 2, training._Run._step

    def killed(self):
        if self.step == stop:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training._Run, "_step", killed)
        train(config, root=tmp_path / "parts", progress=False)
    assert load_result(run_folder(config, tmp_path / "parts")) is None
    resumed = train(config, root=tmp_path / "parts", progress=False)
    assert_same_weights(final_weights(whole), final_weights(resumed))
    columns = ["step", "train_loss", "val_loss"]
    pd.testing.assert_frame_equal(whole.metrics[columns], resumed.metrics[columns])


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e4), ("sgd", 1e6)])
def test_a_diverged_run_ends_cleanly(run_config, tmp_path, optimizer, lr):
    result = train(run_config.replace(optimizer=optimizer, lr=lr), root=tmp_path, progress=False)
    assert result.row["status"] == "diverged" and result.row["reason"]
    assert pd.isna(result.row["val_loss"])
    assert result.row["steps"] <= run_config.steps


@pytest.mark.parametrize(
    ("losses", "diverged_at"),
    [
        ([5, 4, 6, 3, 2], None),  # one bump
        ([5, 6, 4, 6, 3], None),  # two, not in a row
        ([5, 6, 5.5, 3, 2], 2),
        ([5, 4, 3, 2, 5.1], 4),  # nothing comes after the last
        ([5, 4, math.nan, 3, 2], 2),
        ([5, 4, math.inf, 3, 2], 2),
        ([math.nan, 4, 3, 2, 1], 0),
    ],
)
def test_a_run_has_diverged_when_its_loss_stays_above_the_start(run_config, tmp_path, monkeypatch, losses, diverged_at):
    config = run_config.replace(evaluations=4)
    steps, scripted = [0, *evaluation_steps(config)], iter(losses)

    def validation_loss(*_, **__):
        loss = next(scripted)
        return SimpleNamespace(loss=loss, standard_error=0.1, bits_per_byte=loss)

    monkeypatch.setattr(training, "validation_loss", validation_loss)
    result = train(config, root=tmp_path, progress=False)
    assert result.row["status"] == ("finished" if diverged_at is None else "diverged")
    assert result.row["steps"] == steps[-1 if diverged_at is None else diverged_at]


def test_accumulated_gradients_are_those_of_the_whole_batch(run_config, tmp_path):
    whole = train(run_config, root=tmp_path, progress=False)
    parts = train(run_config.replace(micro_batch=2), root=tmp_path, progress=False)
    one, two = final_weights(whole), final_weights(parts)
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name
    assert parts.row["val_loss"] == pytest.approx(whole.row["val_loss"], abs=1e-4)


def test_quantized_weights_are_held_over_micro_batches(run_config, tmp_path, monkeypatch):
    """Once a step instead of once a micro-batch, and the same run up to rounding."""
    config = run_config.replace(quantization=QUEST)
    rounded, quantize = [], QuestQuantizer.round
    monkeypatch.setattr(QuestQuantizer, "round", lambda self, x: rounded.append(x.ndim) or quantize(self, x))
    whole = train(config, root=tmp_path, progress=False)
    weights = rounded.count(2)
    rounded.clear()
    parts = train(config.replace(micro_batch=2), root=tmp_path, progress=False)
    assert rounded.count(2) == weights and rounded.count(3) > 0
    assert parts.row["val_loss"] == pytest.approx(whole.row["val_loss"], abs=0.02)


def test_clipping_bounds_the_update(run_config, tmp_path):
    free = train(run_config.replace(optimizer="sgd", lr=0.1), root=tmp_path, progress=False)
    clipped = train(run_config.replace(optimizer="sgd", lr=0.1, clip=1e-3), root=tmp_path, progress=False)
    start = build_model(run_config).state_dict()["embedding.weight"]
    moved = [(final_weights(r)["embedding.weight"] - start).norm() for r in (free, clipped)]
    # the lr-weighted number of steps times clip, momentum 0.9 on top, is as far as clipping lets it go
    assert moved[1] <= 0.1 * run_config.steps * 1e-3 / (1 - 0.9)
    assert moved[0] > 3 * moved[1]


def test_other_devices_and_ways_to_compile_are_refused():
    with pytest.raises(ValueError, match="auto, cpu, cuda"):
        machine.device_named("gpu")
    with pytest.raises(ValueError, match="compile"):
        machine.should_compile("yes", None, torch.device("cpu"))


@pytest.mark.cuda
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "psgd", "scion", "shampoo", "soap"])
def test_a_run_on_cuda_learns_what_one_on_cpu_learns(run_config, tmp_path, optimizer):
    config = run_config.replace(optimizer=optimizer, lr=1e-3, tokens_per_parameter=2)
    cpu = train(config, root=tmp_path / "cpu", device="cpu", progress=False)
    cuda = train(config, root=tmp_path / "cuda", device="cuda", compile=False, progress=False)
    assert cuda.row["device"] == "cuda" and cuda.row["status"] == "finished"
    assert cuda.row["val_loss"] == pytest.approx(cpu.row["val_loss"], abs=0.05)


def test_a_share_that_is_no_whole_number_of_micro_batches_is_refused(run_config):
    """9 sequences a worker in parts of 2 would never be summed over the workers; 7 would weigh their parts alike."""
    for batch, micro, world in ((18, 2, 2), (14, 2, 2), (12, 4, 2), (4, 2, 8)):
        with pytest.raises(ValueError, match=f"batch_size {batch} over {world} workers .*micro_batch {micro}; valid"):
            machine.check_shares(dataclasses.replace(run_config, batch_size=batch, micro_batch=micro), world)
    for batch, micro, world in ((8, 4, 2), (8, 8, 2), (18, 3, 2), (16, 2, 4), (6, 2, 1)):
        machine.check_shares(dataclasses.replace(run_config, batch_size=batch, micro_batch=micro), world)
