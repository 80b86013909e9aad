"""Outlier metrics of activations: MMR and kurtosis, and two predictors that see more for the same price.

Paper: arXiv 2509.23500, section 4 (max-to-median ratio; the abstract says max-to-mean: both are offered). A row is one
token, its entries are the features that one AbsMax scale covers.

The two predictors that this project adds come from the first-order error of a linear layer, y = W x, whose input and
weight are rounded. Taking the rounding errors e_x and E as white (no preferred direction) and independent,

    E||W e_x||^2 = ||W||_F^2 / n * ||e_x||^2        E||E x||^2 = ||E||_F^2 / n * ||x||^2        (n input features)

so that, relative to ||W x||^2, the layer's newly injected error (the B term of `propagation`) is expected to be

    expected_error = noise_gain * (input_error + weight_error)
    noise_gain     = (||W||_F^2 / n) / (||W x||^2 / ||x||^2)   what the layer does to white noise against its signal
    input_error    = ||Q(x) - x||^2 / ||x||^2,   weight_error = ||Q(W) - W||_F^2 / ||W||_F^2

Of this product MMR is about `input_error` alone, and there only about what a row's largest entry does to its scale:
nothing of the weight, of the layer's gain, or of formats with blocks. `noise_gain` is also the gain G = A / R_in
that the layer has on an accumulated error without direction: what the paper calls alignment, from full precision alone.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from beyond_outliers.config.parsing import choose
from beyond_outliers.modules import (
    evaluating,
    find_head,
    forward,
    hooked,
    is_linear,
    linear_weight,
    module_names,
    text_batches,
)
from beyond_outliers.passes import plain_settings, tensors, text_rows, text_tokens
from beyond_outliers.quantizers.formats import quantize_tensor
from beyond_outliers.quantizers.hadamard import hadamard_block, hadamard_transform
from beyond_outliers.quantizers.spec import QuantSpec

CENTERS = ("median", "mean")
METRICS = ["mmr", "mmr_mean", "kurtosis", "input_error", "weight_error", "noise_gain", "expected_error"]


# ------------------------------------------------------------------------------------------------- of one tensor


def _rows(x: Tensor) -> Tensor:
    """(..., features) -> (rows, features), at least float32."""
    x = x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))  # not in whatever the default dtype is
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"x must hold at least one row of features, not the shape {tuple(x.shape)}")
    return _wide(x.reshape(-1, x.shape[-1]))


def _wide(x: Tensor) -> Tensor:
    """At least float32: squares of half precision overflow from 256 on and vanish below 2e-4."""
    return x if x.dtype == torch.float64 else x.float()


def _absolute(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max, median and mean of |x| in every row, float64; the median of an even count is the mean of the middle two."""
    size = x.abs()
    middle = upper = size.median(-1, keepdim=True).values  # torch gives the lower of the middle two
    if size.shape[-1] % 2 == 0:  # a third of the time of sorting
        below = size <= middle
        following = size.masked_fill(below, float("inf")).amin(-1, keepdim=True)
        upper = torch.where(below.sum(-1, keepdim=True) > size.shape[-1] // 2, middle, following)
    median = (middle.double() + upper.double()).squeeze(-1) / 2
    return size.amax(-1).double(), median, size.mean(-1, dtype=torch.float64)


def _mean_ratio(numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the ratios over the rows whose denominator is not zero, and the number of those rows."""
    valid = denominator != 0
    return torch.where(valid, numerator / torch.where(valid, denominator, 1.0), 0.0).sum(), valid.sum().double()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Fourth central moment and squared variance (population) of every row, float64.

    The float64 copy of x is made in pieces: a cache's worth, or enough to keep a GPU busy.
    """
    fourth, second = [], []
    for piece in x.split(max(1, (2**16 if x.device.type == "cpu" else 2**24) // x.shape[-1])):
        # a constant row must come out as exactly zero, which its mean in floating point need not give
        piece = piece.double() - piece[:, :1].double()
        square = (piece - piece.mean(-1, keepdim=True)).square()
        fourth.append(square.square().mean(-1))
        second.append(square.mean(-1).square())
    return torch.cat(fourth), torch.cat(second)


def mmr(x: Tensor, center: str = "median") -> Tensor:
    """Mean over rows of max|x| / median|x| (or / mean|x| with center="mean"). Paper, section 4.

    `x` (..., features), any real dtype -> 0-d float64 tensor. Rows whose centre is zero have no ratio: they are left
    out of the mean (`activation_metrics` counts them); NaN when no row is left. ValueError for another `center`.
    """
    choose("center", center, CENTERS)
    largest, median, mean = _absolute(_rows(x))
    total, count = _mean_ratio(largest, median if center == "median" else mean)
    return total / count


def kurtosis(x: Tensor) -> Tensor:
    """Mean over rows of E[(x - mu)^4] / sigma^4, population moments, 3 for a Gaussian. Paper, section 4.

    `x` (..., features), any real dtype -> 0-d float64 tensor. Constant rows are left out; NaN when no row is left.
    """
    total, count = _mean_ratio(*_moments(_rows(x)))
    return total / count


def _rounding_error(x: Tensor, format: str, spec: QuantSpec) -> Tensor:
    """||Q(x) - x||^2 over all of x (..., features), 0-d float64, in the basis in which `spec` rounds.

    NaN where the rows do not divide into the spec's blocks: only a layer that is left alone may have such rows.
    """
    try:
        spec.check_width(x.shape[-1])
    except ValueError:
        return torch.full((), torch.nan, dtype=torch.float64, device=x.device)
    if spec.rotate:
        x = hadamard_transform(x, hadamard_block(x.shape[-1]))
    error = _wide(quantize_tensor(x, format, spec.granularity, spec.block)) - _wide(x)
    return error.square().sum(dtype=torch.float64)


def _input_sums(x: Tensor, spec: QuantSpec) -> Tensor:
    """(9,) float64: what is summed over the rows of a linear layer's input."""
    if x.numel() == 0:  # an expert without tokens
        return torch.zeros(9, dtype=torch.float64, device=x.device)
    x = _rows(x)
    largest, median, mean = _absolute(x)
    error = _rounding_error(x, spec.activations, spec)
    sums = *_mean_ratio(largest, median), *_mean_ratio(largest, mean), *_mean_ratio(*_moments(x))
    return torch.stack([error.new_tensor(len(x)), *sums, x.square().sum(dtype=torch.float64), error])


@plain_settings()
def activation_metrics(model: nn.Module, batches, spec: QuantSpec | None = None) -> pd.DataFrame:
    """MMR, kurtosis and the two predictors on the input of every linear layer; one row a layer, in order of first call.

    `batches`: an iterable of inputs (see `forward`), or one tensor or mapping. Padding, as an `attention_mask` (B, T)
    tells it, does not count; autocast is off. One pass; per layer a handful of float64 sums are kept, whatever
    the number of batches. `spec` names the formats and the basis whose rounding the errors describe (default W4A4); a
    head that `spec` leaves alone has its row all the same, with NaN for the errors where its width fits no block. A
    layer that got no token has a row of n_tokens 0 and NaN.

    Columns: index, name, kind (last part of the name: q, up, ...), mmr (median), mmr_mean, kurtosis (means over
    tokens), n_tokens, skipped (tokens left out of mmr because the median of |x| is zero: ReLU leaves many), and the
    ratios of sums over tokens input_error, weight_error, noise_gain, expected_error (module docstring). NaN where
    nothing was left to average. Raises ValueError for a model without linear layers, or no batches.
    """
    spec = spec or QuantSpec()
    linears = {module: name for module, name in module_names(model).items() if is_linear(module)}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no linear layer")
    head = None if spec.head else find_head(model)
    for module, name in linears.items():
        try:
            if name != head:
                spec.check_width(linear_weight(module).shape[1])
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    sums: dict[str, Tensor] = {}
    previous: list = [None, None, None]  # q, k and v read the same tensor: its sums are taken once

    def hook(module, args, kwargs, output):
        (x,) = (*args, *kwargs.values())[:1]
        if x is not previous[0] or x._version != previous[1]:  # the same tensor, and not changed in place since
            previous[:] = x, x._version, _input_sums(text_rows(x, text), spec)
        output = _wide(text_rows(next(tensors(output)), text))  # I-BERT's layers return a scale beside it
        bare = output if module.bias is None else output - _wide(module.bias)
        row = torch.cat([previous[2], bare.square().sum(dtype=torch.float64)[None]])
        name = linears[module]
        sums[name] = sums[name] + row if name in sums else row

    with hooked(linears, after=hook), evaluating(model):
        for batch in text_batches(model, batches):
            text = text_tokens(batch, model)
            forward(model, batch)
            previous[:] = None, None, None
    if not sums:
        raise ValueError("there is no batch in batches")
    weights = {name: linear_weight(module).detach() for module, name in linears.items()}
    return pd.DataFrame([_row(i, name, sums[name], weights[name], spec) for i, name in enumerate(sums)])


def _row(index: int, name: str, sums: Tensor, weight: Tensor, spec: QuantSpec) -> dict:
    """Table row of one layer from its ten sums."""
    n, mmr_sum, mmr_rows, mean_sum, mean_rows, fourth_sum, fourth_rows, signal, error, output = sums.tolist()
    size = weight.double().square().sum().item()
    weight_error = _divide(_rounding_error(weight, spec.weights, spec).item(), size)
    input_error = _divide(error, signal)
    noise_gain = _divide(size / weight.shape[1] * signal, output)
    return {
        "index": index,
        "name": name,
        "kind": name.rpartition(".")[2],
        "mmr": _divide(mmr_sum, mmr_rows),
        "mmr_mean": _divide(mean_sum, mean_rows),
        "kurtosis": _divide(fourth_sum, fourth_rows),
        "n_tokens": int(n),
        "skipped": int(n - mmr_rows),
        "input_error": input_error,
        "weight_error": weight_error,
        "noise_gain": noise_gain,
        "expected_error": noise_gain * (input_error + weight_error),
    }


def _divide(a: float, b: float) -> float:
    return a / b if b else float("nan")


def average(table: pd.DataFrame) -> pd.Series:
    """Mean of every metric over the linear layers of an `activation_metrics` table, as in the paper; NaN left out.

    Drop rows before to leave layers out, for instance the head: `average(table[table.kind != "head"])`. Layers that
    read ReLU outputs have most medians near zero: look at `skipped` before reading an average that includes them.
    """
    return table[METRICS].mean()


def without_down(table: pd.DataFrame) -> pd.DataFrame:
    """Inputs without those of the MLP's second layer: squared ReLU makes their median near zero, their MMR enormous."""
    return table[table["kind"] != "down"]
