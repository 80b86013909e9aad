"""Measurements along a run: every checkpoint, averaged weights, interpolation in the loss."""

import numpy as np
import pytest
import torch

from beyond_outliers.quantizers import QuantSpec, quantize_model
from beyond_outliers.study import trajectory
from beyond_outliers.train import train


@pytest.fixture(scope="module")
def result(tmp_path_factory, corpus_config):
    from beyond_outliers.config import Olmo2Config, RunConfig

    model = Olmo2Config(vocab_size=320, width=32, depth=1, n_heads=2)
    config = RunConfig(
        scale="test", size="tiny", optimizer="adamw", lr=5e-3, model=model, corpus=corpus_config, context=32,
        batch_size=8, micro_batch=8, tokens_per_parameter=0.5, evaluations=10, validation_tokens=1024,
    )  # fmt: skip
    return train(config, root=tmp_path_factory.mktemp("runs"), compile=False, progress=False)


def test_every_checkpoint_and_two_averages_have_two_rows(result):
    table = trajectory.trajectory_table(result, QuantSpec(head=True), validation_tokens=512, propagation_tokens=256)
    own = table[table.averaged == 1]
    assert own.groupby("spec", sort=False).step.apply(list).to_dict() == {
        name: result.evaluations.step.tolist() for name in ("none", "W4A4+head")
    }
    averaged = table[table.averaged == trajectory.AVERAGED]
    constant = result.evaluations.step[result.evaluations.step <= 0.8 * result.row["steps"]].max()
    assert averaged.step.unique().tolist() == [constant, result.row["steps"]]
    base = table[table.spec == "none"].set_index(["step", "averaged"]).val_loss
    quantized = table[table.spec == "W4A4+head"].set_index(["step", "averaged"])
    assert np.allclose(quantized.val_loss - quantized.increase, base)
    assert table[table.spec == "none"][["mmr", "kurtosis"]].notna().all().all()
    assert quantized[["R_L", "R_L_centred", "R_final_norm"]].gt(0).all().all()


def test_averaged_weights_are_the_mean(result):
    steps = result.evaluations.step.tolist()[-3:]
    model = trajectory.averaged_model(result, steps)
    expected = torch.stack([result.load_model(step).blocks[0].mlp.up.weight for step in steps]).double().mean(0)
    assert torch.allclose(model.blocks[0].mlp.up.weight.double(), expected, atol=1e-7)
    assert model.head.weight is model.embedding.weight
    quantize_model(model, QuantSpec(head=True))
