"""Runs trained as one batched model against the same runs by themselves."""

import math

import pytest
import torch
from safetensors.torch import load_file

from beyond_outliers.corpus import open_corpus
from beyond_outliers.evaluate import validation_loss
from beyond_outliers.optimizers import OPTIMIZERS, REGISTRY
from beyond_outliers.optimizers.runs import RunsAsOne
from beyond_outliers.train import can_be_stacked, load_result, run_folder, train, train_together, weights_path
from beyond_outliers.train import loop as training
from beyond_outliers.train import together as stacked

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
LR = {"adamw": 5e-3, "muon": 1e-2, "psgd": 5e-3, "scion": 1e-2, "shampoo": 5e-3, "soap": 5e-3}


@pytest.fixture
def run_configs(run_config):
    """Three runs of 50 steps that differ in seed and learning rates; of every optimizer."""

    def of(name: str, count: int = 3):
        size = run_config.model.n_parameters
        base = run_config.replace(
            optimizer=name, evaluations=2, tokens_per_parameter=50 * run_config.tokens_per_step / size
        )
        assert base.steps == 50
        return [
            base.replace(seed=i, lr=LR[name] * 2**i, hyper={"embedding_lr": 3e-3 * 1.5**i, "vector_lr": 2e-3 * 1.5**i})
            for i in range(count)
        ]

    return of


def final(result):
    return load_file(weights_path(result.folder, result.row["steps"]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_many_optimizers_as_one_are_their_own(name):
    """In float64, on random gradients, for 50 steps: matrices of two shapes, a vector, and an embedding."""
    shapes = {"a": (12, 8), "b": (12, 8), "c": (6, 20), "gain": (8,), "table": (40, 6)}
    torch.manual_seed(0)
    start = {key: torch.randn(3, *shape, dtype=torch.float64) for key, shape in shapes.items()}

    def optimizer(params: dict, run: int):
        groups = [
            {"params": [params["a"], params["b"], params["c"]], "role": "matrix", "lr": 0.01 * 2**run},
            {"params": [params["gain"]], "role": "vector", "lr": 0.02 * 2**run},
            {"params": [params["table"]], "role": "embedding", "lr": 0.03 * 2**run},
        ]
        return REGISTRY[name].optimizer(groups, weight_decay=0.1)

    singles = [{key: value[run].clone().requires_grad_() for key, value in start.items()} for run in range(3)]
    alone = [optimizer(params, run) for run, params in enumerate(singles)]
    leaves = {key: value.clone().requires_grad_() for key, value in start.items()}
    slices = [{key: leaf.detach()[run].requires_grad_() for key, leaf in leaves.items()} for run in range(3)]
    each = [optimizer(params, run) for run, params in enumerate(slices)]
    one = RunsAsOne(each, {id(slices[0][key]): leaf for key, leaf in leaves.items()})
    for step in range(50):
        factor = 1.0 if step < 40 else 0.5
        for key, leaf in leaves.items():
            leaf.grad = torch.randn_like(leaf)
            for run, params in enumerate(singles):
                params[key].grad = leaf.grad[run].clone()
        for single in alone:
            for group in single.param_groups:
                group["lr"] = factor * group["initial_lr"]
            single.step()
        one.step(factor)
    one.settle()
    for run, params in enumerate(singles):
        for key, p in params.items():
            torch.testing.assert_close(leaves[key][run], p, rtol=1e-9, atol=1e-9, msg=f"{key} of run {run}")
        ours, theirs = each[run].state_dict()["state"], alone[run].state_dict()["state"]
        for place, state in theirs.items():
            assert {k: torch.as_tensor(v).shape for k, v in ours[place].items()} == {
                k: torch.as_tensor(v).shape for k, v in state.items()
            }
            torch.testing.assert_close(ours[place], state, rtol=1e-7, atol=1e-9, check_dtype=False)


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def both(configs, root):
    """The runs by themselves and as one model."""
    singles = [train(config, root=root / "single", progress=False, compile=False) for config in configs]
    stack = train_together(configs, root=root / "stack", progress=False)
    for one, other in zip(singles, stack, strict=True):
        assert other.row["run_id"] == one.row["run_id"] and other.row["steps"] == 50
        assert other.row["device_name"] == f"{one.row['device_name']}, 2 runs as one"
        assert list(other.metrics.step) == list(one.metrics.step)
    return singles, stack


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_50_steps_equal_those_of_single_runs(run_configs, name, tmp_path):
    """Weights are as near as those of a single run whose sums are taken in another order (micro-batches of 4)."""
    configs = run_configs(name, 2)
    singles, stack = both(configs, tmp_path)
    twins = [
        train(config.replace(micro_batch=4), root=tmp_path / "rounded", progress=False, compile=False)
        for config in configs
    ]
    for one, twin, other in zip(singles, twins, stack, strict=True):
        weights, start = final(one), training.build_model(one.config).state_dict()

        def distance(to, weights=weights):
            return math.hypot(*((weights[key] - to[key]).norm() for key in weights))

        moved, rounding, apart = distance(start), distance(final(twin)), distance(final(other))
        assert apart < max(4 * rounding, 1e-5 * moved) and apart < 0.03 * moved
        corpus, config = open_corpus(one.config.corpus, one.config.context), one.config
        found = validation_loss(
            other.load_model(), corpus.validation, config.context, max_tokens=config.validation_tokens
        )
        assert other.row["val_loss"] == pytest.approx(found.loss, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "soap"])
def test_50_steps_in_float64_equal_those_of_single_runs(in_float64, run_configs, name, tmp_path):
    """To 1e-9 (found 1e-12 or less). SOAP's bases amplify rounding even there: only the control above holds it."""
    for one, other in zip(*both(run_configs(name, 2), tmp_path), strict=True):
        theirs = final(one)
        assert theirs["embedding.weight"].dtype == torch.float64
        for key, weight in final(other).items():
            torch.testing.assert_close(weight, theirs[key], rtol=1e-9, atol=1e-9, msg=key)
        assert other.row["val_loss"] == pytest.approx(one.row["val_loss"], abs=1e-9)


def test_an_interrupted_stack_goes_on_to_the_same_weights(run_configs, tmp_path, monkeypatch):
    """Saved at step 25 of 50, then gone on together, and one run by itself from the state that the stack left."""
    configs = run_configs("psgd", 2)
    whole = train_together(configs, root=tmp_path / "whole", progress=False)
    step = stacked._Together._step

    def interrupted(self):
        if self.runs[0].step == 26:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(stacked._Together, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_together(configs, root=tmp_path / "cut", progress=False)
    monkeypatch.undo()
    state = run_folder(configs[0], tmp_path / "cut") / "state-000025.pt"
    held = torch.load(state, weights_only=True)["model"]["embedding.weight"]
    assert held.untyped_storage().nbytes() == held.nbytes, "a run's state holds its own numbers alone"
    again = train_together(configs, root=tmp_path / "cut", progress=False)
    for one, other in zip(whole, again, strict=True):
        mine, theirs = final(one), final(other)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_run_that_diverges_leaves_the_others_to_go_on(run_configs, tmp_path, monkeypatch):
    """By a gradient that is not finite at step 10, in one run of three."""
    configs = run_configs("muon")
    step = stacked.RunsAsOne.step

    def spoiled(self, factor):
        if len(self.optimizers) == 3 and self.stacks[0][0].count("step") == 10:
            next(iter(self.leaves.values())).grad[1, 0, 0] = math.nan
        step(self, factor)

    monkeypatch.setattr(stacked.RunsAsOne, "step", spoiled)
    first, broken, last = train_together(configs, root=tmp_path, progress=False)
    assert (first.row["status"], broken.row["status"], last.row["status"]) == ("finished", "diverged", "finished")
    assert "embedding.weight" in broken.row["reason"] and broken.row["steps"] == 10
    single = train(configs[2], root=tmp_path / "single", progress=False, compile=False)
    assert last.row["val_loss"] == pytest.approx(single.row["val_loss"], abs=1e-3)


def test_runs_that_differ_in_more_than_seed_and_rates_are_refused(run_configs, tmp_path):
    one, two = run_configs("muon", 2)
    with pytest.raises(ValueError, match="differ in more than seed and learning rates"):
        train_together([one, two.replace(hyper={"ns_steps": 3})], root=tmp_path)
    quantized = one.replace(quantization={"scheme": "quest", "weights": "int4", "activations": "int4"})
    assert can_be_stacked(one) and not can_be_stacked(quantized) and not can_be_stacked(one.replace(optimizer="sgd"))
    with pytest.raises(ValueError, match="cannot be trained together"):
        train_together([quantized], root=tmp_path)
    assert load_result(run_folder(one, tmp_path)) is None
