"""MMR, kurtosis and the two predictors, against NumPy and SciPy in float64."""

import weakref

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from beyond_outliers.metrics import activation_metrics, average, kurtosis, mmr
from beyond_outliers.model import Olmo2, Olmo2Config
from beyond_outliers.quantizers import QuantSpec, quantize_tensor


def small_model(**changes) -> Olmo2:
    torch.manual_seed(0)
    return Olmo2(Olmo2Config(vocab_size=300, width=32, depth=2, n_heads=2, **changes))


@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 33), (10,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mmr_and_kurtosis_agree_with_numpy(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    size = np.abs(x.double().numpy()).reshape(-1, shape[-1])
    assert float(mmr(x)) == pytest.approx((size.max(1) / np.median(size, axis=1)).mean(), rel=1e-6)
    assert float(mmr(x, center="mean")) == pytest.approx((size.max(1) / size.mean(1)).mean(), rel=1e-6)
    rows = x.double().numpy().reshape(-1, shape[-1])
    assert mmr(x).dtype == kurtosis(x).dtype == torch.float64
    assert float(kurtosis(x)) == pytest.approx(scipy.stats.kurtosis(rows, axis=1, fisher=False).mean(), rel=1e-6)


def test_rows_without_a_ratio_are_left_out_and_nan_is_not():
    x = torch.tensor([[0.0, 0.0, 0.0, 8.0], [1.0, 1.0, 1.0, 3.0]])
    assert float(mmr(x)) == 3.0
    assert np.isnan(float(mmr(torch.zeros(2, 4))))
    assert np.isnan(float(kurtosis(torch.full((2, 4), 0.1))))
    assert np.isnan(float(mmr(torch.tensor([[1.0, float("nan"), 2.0], [1.0, 1.0, 2.0]]))))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"mode.*median"):
        mmr(torch.ones(2, 2), center="mode")
    with pytest.raises(ValueError, match="shape"):
        kurtosis(torch.tensor(1.0))
    with pytest.raises(ValueError, match="no linear layer"):
        activation_metrics(nn.Sequential(nn.ReLU()), [torch.ones(2, 2)])
    with pytest.raises(ValueError, match="no batch"):
        activation_metrics(small_model(), [])


def test_table_agrees_with_captured_inputs_over_unequal_batches():
    model = small_model()
    batches = [torch.randint(0, 300, (n, 16), generator=torch.Generator().manual_seed(n)) for n in (1, 4, 2)]
    captured = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, args, out, name=name: captured.setdefault(name, []).append((args[0][..., :], out))
            )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    table = activation_metrics(model, iter(batches)).set_index("name")
    assert list(table.index) == list(captured)
    assert list(table["kind"].unique()) == ["q", "k", "v", "out", "up", "down", "head"]
    for name, pairs in captured.items():
        x, y = (torch.cat([pair[i].flatten(0, -2) for pair in pairs[:3]]).double() for i in (0, 1))
        weight, row = model.get_submodule(name).weight.detach().double(), table.loc[name]
        assert row["n_tokens"] == len(x) == 7 * 16
        assert row["skipped"] == (np.median(x.abs().numpy(), axis=1) == 0).sum()
        error = quantize_tensor(x, "int4") - x
        gain = weight.square().mean() * len(weight) / (y.square().sum() / x.square().sum())
        expected = {"mmr": mmr(x), "mmr_mean": mmr(x, "mean"), "kurtosis": kurtosis(x), "noise_gain": gain}
        expected["expected_error"] = gain * (row["input_error"] + row["weight_error"])
        assert row[list(expected)].to_dict() == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)
        # a value that float32 rounds to the other neighbour moves the sum a little
        assert row["input_error"] == pytest.approx(float(error.square().sum() / x.square().sum()), rel=1e-3)
    assert table.loc["blocks.0.mlp.down", "skipped"] > 0  # ReLU leaves rows whose median is zero
    assert average(table)["mmr"] == pytest.approx(table["mmr"].mean())


def test_expected_error_predicts_the_error_of_a_quantized_layer():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(256, 128, bias=False)
    layer.weight.data = torch.randn(128, 256, generator=generator)
    x = torch.randn(2000, 256, generator=generator)

    def rounded(t):
        scale = t.abs().amax(-1, keepdim=True) / 7
        return (t / scale).round() * scale

    exact, quantized = x @ layer.weight.data.T, rounded(x) @ rounded(layer.weight.data).T
    measured = float((quantized - exact).square().sum() / exact.square().sum())
    assert activation_metrics(layer, [x])["expected_error"][0] == pytest.approx(measured, rel=0.05)


def test_errors_are_those_of_the_grid_and_basis_asked_for():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(50, 64)
    x[:, 0] *= 40  # an outlier feature, which the rotation spreads out
    specs = QuantSpec(), QuantSpec(rotate=True), QuantSpec("none", "int4", granularity="block", block=16)
    plain, rotated, blocks = (activation_metrics(layer, x, spec).iloc[0] for spec in specs)
    assert rotated["input_error"] < 0.6 * plain["input_error"]
    assert rotated["mmr"] == plain["mmr"] and blocks["weight_error"] == 0  # MMR is of the input as it is
    error = quantize_tensor(x, "int4", "block", 16) - x
    expected = float(error.double().square().sum() / x.double().square().sum())
    assert blocks["input_error"] == pytest.approx(expected, rel=1e-5)


def test_memory_does_not_grow_with_the_batches():
    alive, most = [], 0

    def stream():
        nonlocal most
        for _ in range(6):
            most = max(most, sum(reference() is not None for reference in alive))
            x = torch.randn(64, 16)
            alive.append(weakref.ref(x))
            yield x

    activation_metrics(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), stream())
    assert most <= 1  # the batch that the loop variables still name


class Branches(nn.Module):
    """One layer for all rows, one for rows of a positive first feature, and a head whose width fits no block of 32."""

    def __init__(self):
        super().__init__()
        self.all, self.some, self.lm_head = nn.Linear(32, 33), nn.Linear(33, 33), nn.Linear(33, 8)

    def forward(self, x):
        y = self.all(x)
        y = torch.where(x[:, :1] > 0, 1.0, 0.0) * y
        chosen = x[:, 0] > 0
        y[chosen] = self.some(y[chosen])
        return self.lm_head(y)


def test_a_layer_without_tokens_and_a_head_without_blocks():
    torch.manual_seed(0)
    model, x = Branches(), torch.rand(6, 32)
    table = activation_metrics(model, [-x, x, -x])
    assert table.set_index("name")["n_tokens"].to_dict() == {"all": 18, "some": 6, "lm_head": 18}
    idle = activation_metrics(model, -x).set_index("name").loc["some"]
    assert idle["n_tokens"] == 0 and np.isnan(idle["mmr"]) and np.isnan(idle["input_error"])
    alone = activation_metrics(model, x).set_index("name").loc["some"]
    both = table.set_index("name").loc["some"]
    assert both["mmr"] == pytest.approx(alone["mmr"]) and both["input_error"] == pytest.approx(alone["input_error"])

    model.some = nn.Identity()
    blocks = activation_metrics(model, x, QuantSpec("mxfp4", "mxfp4")).set_index("name")
    assert np.isnan(blocks.loc["lm_head", "expected_error"]) and blocks.loc["lm_head", "mmr"] > 1
    assert blocks.loc["all", "input_error"] > 0
    with pytest.raises(ValueError, match=r"layer 'lm_head': mxfp4: blocks of 32 do not divide the width 33"):
        activation_metrics(model, x, QuantSpec("mxfp4", "mxfp4", head=True))
