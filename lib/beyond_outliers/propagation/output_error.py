"""R_L alone: the relative error of a quantized model's output, its interval over sequences, its floor from rounding.

`output_errors` gives it in three readings, the paper's and two without what softmax or the head add to it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beyond_outliers.modules import as_batches, copy_of, evaluating, forward
from beyond_outliers.passes import main_output, tensors
from beyond_outliers.propagation.norms import dot, pieces, quotient
from beyond_outliers.quantizers.watching import Runs

FEWEST = 10  # sequences before an interval may decide that they are enough


@dataclass(frozen=True)
class RelativeError:
    """R_L with its interval over sequences, and the tokens that bring the interval's half-width to 5 % of R_L."""

    value: float
    low: float
    high: float
    confidence: float
    n_sequences: int
    n_tokens: int
    tokens_for_5_percent: float

    def __float__(self) -> float:
        return self.value


def relative_error(
    model: nn.Module,
    quantized: nn.Module,
    batches,
    sample: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    tolerance: float | None = None,
) -> RelativeError:
    """R_L = ||dh_L||^2 / ||h_L||^2 of the models' outputs, in one pass of each: `decompose`'s last R, reduction global.

    `batches` as in `decompose`, the first dimension counting sequences. `sample`: the number of sequences to draw (at
    random, without replacement; `batches` is then listed first), None for all.

    R_L is a ratio of two sums over sequences, the independent units of text (tokens of one sequence are not). The
    interval is that of the ratio estimator: with residuals e_i = d_i - R n_i of the m sequences,
    R +- t_{m-1} * sd(e) / (sqrt(m) * mean(n)) (Cochran, Sampling Techniques, chapter 6; no finite-population
    correction, because the text itself is a sample). NaN for a single sequence. `tokens_for_5_percent` solves the same
    formula, with the normal quantile, for the m that gives a half-width of 0.05 R.

    `tolerance`: no more batches are read, in random order (`batches` is listed first), once the interval's half-width
    is at most this share of R, from 10 sequences on; an interval that decides when to stop is a little optimistic.

    Raises ValueError for no batches, `sample` below 2, `confidence` outside (0, 1), a tolerance that is not positive,
    and as `decompose` for quantized layers that did not run.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    batches = as_batches(batches)
    if sample is not None:
        if sample < 2:
            raise ValueError(f"sample must be at least 2 sequences, not {sample}")
        batches = _draw(list(batches), sample, seed)
    if tolerance is not None:
        if not tolerance > 0:
            raise ValueError(f"tolerance must be a positive share of R, not {tolerance}")
        listed = list(batches)
        batches = [listed[place] for place in np.random.default_rng(seed).permutation(len(listed))]
    errors, signals, n_tokens = [], [], 0
    runs = Runs(quantized)
    with evaluating(model, quantized), runs.counted():
        for batch in batches:
            answers = main_output(forward(model, batch)), main_output(forward(quantized, batch))
            pairs = list(zip(*answers, strict=True))
            if not pairs:
                raise ValueError(f"{type(model).__name__} returns no floating-point tensor")
            first = pairs[0][0]
            n_tokens += first[..., 0].numel()
            for i in range(len(first)):
                error: Tensor | float = 0.0
                signal: Tensor | float = 0.0
                for x, xq in pairs:
                    for h, hq in pieces((x[i], xq[i]), "global"):
                        dh = hq - h
                        error, signal = error + dot(dh, dh), signal + dot(h, h)
                errors.append(float(error))
                signals.append(float(signal))
            if tolerance is not None and len(errors) >= FEWEST:
                value, half, _ = _estimate(errors, signals, confidence)
                if half <= tolerance * value:
                    break
    if not errors:
        raise ValueError("there is no batch in batches")
    runs.check(batch)
    m = len(errors)
    value, half, needed = _estimate(errors, signals, confidence)
    return RelativeError(value, value - half, value + half, confidence, m, n_tokens, needed * n_tokens / m)


def _estimate(errors: list[float], signals: list[float], confidence: float) -> tuple[float, float, float]:
    """R, its interval's half-width, and how many sequences would bring that to 5 % of R."""
    from scipy import stats  # half a second that a process which only trains does not need

    d, n, m = np.array(errors), np.array(signals), len(errors)
    value = quotient(d.sum(), n.sum())
    if m < 2:
        return float(value), float("nan"), float("nan")
    spread = np.std(d - value * n, ddof=1) / n.mean()
    needed = (stats.norm.ppf((1 + confidence) / 2) * spread / (0.05 * value)) ** 2 if value else np.nan
    return float(value), float(stats.t.ppf((1 + confidence) / 2, m - 1) * spread / np.sqrt(m)), float(needed)


def rounding_floor(
    model: nn.Module, batches, quantize: Callable[[nn.Module], nn.Module], times: int = 2, seed: int = 0
) -> float:
    """Spread of R_L under changes of the weights that mean nothing: relative ones of 1e-6, drawn from `seed`.

    A change that small moves entries next to a tie over it, these move others further on, and an encoder's R_L comes
    out some per cent away. No two R_L of one model on other machines or of nearly equal weights need agree better; the
    interval of `relative_error`, over sequences, knows nothing of it. Standard deviation, in units of R_L, over
    `times` + 1 evaluations of `batches` (a list; the first with the weights as they are).

    quantize: gives the quantized copy of a model. Weights in half precision change by up to their own rounding.
    """
    batches, found = list(as_batches(batches)), []
    generator = torch.Generator().manual_seed(seed)
    for time in range(times + 1):
        moved = copy_of(model)
        for weight in moved.parameters() if time else ():
            if weight.is_floating_point():
                size = max(1e-6, torch.finfo(weight.dtype).eps)
                change = size * torch.randn(weight.shape, generator=generator)
                weight.data.mul_((1 + change).to(weight.device, weight.dtype))
        found.append(relative_error(moved, quantize(moved), batches).value)
    return float(np.std(found, ddof=1))


def _draw(batches: list, sample: int, seed: int) -> Iterator:
    """`sample` sequences drawn from all batches, still in batches."""

    def take(value, rows):
        return value[rows] if isinstance(value, Tensor) else value

    sizes = [len(next(tensors(batch))) for batch in batches]
    total = sum(sizes)
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(sample, total), replace=False))
    for batch, start, size in zip(batches, np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        rows = torch.from_numpy(drawn[(drawn >= start) & (drawn < start + size)] - start)
        if not len(rows):
            continue
        if isinstance(batch, Mapping):
            yield {key: take(value, rows) for key, value in batch.items()}
        else:
            yield tuple(take(value, rows) for value in batch) if isinstance(batch, (tuple, list)) else batch[rows]


def output_errors(model: nn.Module, quantized: nn.Module, batches) -> dict[str, float]:
    """R at the network's end in three readings, one pass of each model; norms over all tokens, in float64.

    R_L: of the logits, the paper's (arXiv 2509.23500, section 5). R_L_centred: of the logits minus their mean over the
    vocabulary, position by position, an offset that softmax does not see. R_final_norm: of what the head reads.
    `batches`: token ids as in `decompose`. Raises ValueError for no batches, and for a model that does not split into
    `hidden` and `head`, as `Olmo2` does.
    """
    for one in (model, quantized):
        if not (hasattr(one, "hidden") and hasattr(one, "head")):
            raise ValueError(f"{type(one).__name__} does not split into `hidden` and `head`: use relative_error")
    exact: Any = model  # has `hidden` and `head`, as has the other
    rounded: Any = quantized
    sums = np.zeros((3, 2))  # readings by (error, signal)
    with evaluating(model, quantized) as device:
        for batch in as_batches(batches):
            hidden, hidden_q = (one.hidden(batch.to(device)) for one in (exact, rounded))
            logits, logits_q = exact.head(hidden), rounded.head(hidden_q)
            centred, centred_q = (z - z.mean(-1, keepdim=True) for z in (logits.double(), logits_q.double()))
            pairs = (logits, logits_q), (centred, centred_q), (hidden, hidden_q)
            sums += [[_squares(xq.double() - x.double()), _squares(x.double())] for x, xq in pairs]
    if not sums.any():
        raise ValueError("there is no batch in batches")
    return dict(zip(("R_L", "R_L_centred", "R_final_norm"), (sums[:, 0] / sums[:, 1]).tolist(), strict=True))


def _squares(x: Tensor) -> float:
    return x.square().sum().item()
