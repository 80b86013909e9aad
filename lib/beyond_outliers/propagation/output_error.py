"""R_L alone: the relative error of a quantized model's output, its interval over sequences, its floor from rounding.

What else can be read at a network's end, most of it closer to the damage than R_L is, stands in `readings`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from beyond_outliers.config.parsing import choose
from beyond_outliers.modules import as_batches, copy_of, evaluating, forward
from beyond_outliers.passes import main_output, plain_settings, tensors, text_tokens
from beyond_outliers.propagation.norms import REDUCTIONS, Ratios, dot, pieces, quotient
from beyond_outliers.quantizers.record import Runs

FEWEST = 10  # sequences before an interval may decide that they are enough
TRUSTED = 8  # sequences from which on the spread among them says something of the text


def text_sequences(output: Tensor, text: Tensor | None) -> list[int]:
    """Places of the sequences of a batch that are not padding alone; text: see `text_tokens`."""
    return [i for i in range(len(output)) if text is None or bool(text[i].any())]


def text_of(x: Tensor, i: int, text: Tensor | None) -> Tensor:
    """The i-th sequence of x (B, ...) without its padding, where x has a row for each token."""
    return x[i] if text is None or x.shape[:2] != text.shape else x[i][text[i].to(x.device)]


@dataclass(frozen=True)
class RelativeError:
    """R_L with its interval over sequences, and the tokens that bring the interval's half-width to 5 % of R_L.

    `str` of it says so in words, and where the sequences are too few for the interval to be trusted.
    """

    value: float
    low: float
    high: float
    confidence: float
    n_sequences: int
    n_tokens: int
    tokens_for_5_percent: float

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        few = f"; fewer than {TRUSTED}: the interval is a guess" if self.n_sequences < TRUSTED else ""
        return f"R_L {self.value:.3g} [{self.low:.3g}, {self.high:.3g}] over {self.n_sequences} sequences{few}"


@plain_settings()
def relative_error(
    model: nn.Module,
    quantized: nn.Module,
    batches,
    sample: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    tolerance: float | None = None,
    reduction: str = "token",
    centred: bool = False,
) -> RelativeError:
    """R_L = ||dh_L||^2 / ||h_L||^2 of the models' outputs, in one pass of each: `decompose`'s last R.

    reduction: the mean over tokens of each token's ratio ("token"), or the ratio of the sums over all tokens
    ("global"). centred: without the mean over the last dimension, which softmax does not see. The paper defines R for
    one vector of raw logits; how its tables reduce tokens is not known (see `decomposition`).

    `batches` as in `decompose`, the first dimension counting sequences; padding counts neither as tokens nor as
    sequences. `sample`: the number of sequences to draw (at
    random, without replacement; `batches` is then listed first), None for all.

    R_L is a ratio of two sums over sequences, the independent units of text (tokens of one sequence are not): of
    squares, or of ratios and tokens. The interval is that of the ratio estimator, on the log scale, where a squared
    error has no negative bound: with residuals e_i = d_i - R n_i of the m sequences and the relative standard error
    s = sd(e) / (sqrt(m) * mean(n) * R), R * exp(+- t_{m-1} * s) (Cochran, Sampling Techniques, chapter 6; no
    finite-population correction, because the text itself is a sample). NaN for a single sequence.
    `tokens_for_5_percent` gives the m at which the normal quantile times s is 0.05.

    `tolerance`: no more batches are read, in random order (`batches` is listed first), once t * s is at most this, from
    10 sequences on; an interval that decides when to stop is a little optimistic.

    Raises ValueError for an unknown reduction, no batches, `sample` below 2, `confidence` outside (0, 1), a tolerance
    that is not positive, and as `decompose` for quantized layers that did not run.
    """
    from scipy import stats

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    choose("reduction", reduction, REDUCTIONS)
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
            text = text_tokens(batch)
            for i in text_sequences(pairs[0][0], text):
                ratio = Ratios(reduction)
                for pair in pairs:
                    for h, hq in pieces(tuple(text_of(x, i, text) for x in pair), reduction, centred):
                        ratio.add(dot(h, h), dot(hq - h, hq - h))
                n_tokens += text_of(pairs[0][0], i, text)[..., 0].numel()
                signal, error = ratio.sums.tolist() if ratio.sums.ndim else (0.0, 0.0)
                errors.append(error)
                signals.append(signal)
            if tolerance is not None and len(errors) >= FEWEST:
                *_, half = ratio_of_sums(errors, signals, confidence)
                if half <= tolerance:
                    break
    if not errors:
        raise ValueError("there is no batch in batches")
    runs.check(batch)
    value, low, high, half = ratio_of_sums(errors, signals, confidence)
    quantiles = stats.norm.ppf((1 + confidence) / 2) / stats.t.ppf((1 + confidence) / 2, len(errors) - 1)
    needed = n_tokens * (quantiles * half / 0.05) ** 2
    return RelativeError(value, low, high, confidence, len(errors), n_tokens, float(needed))


def ratio_of_sums(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    confidence: float,
    log: bool = True,
) -> tuple[float, float, float, float]:
    """Ratio of two sums over sequences, the ends of its interval, and half its width: of the logarithm with `log`."""
    from scipy import stats  # half a second that a process which only trains does not need

    d, n, m = np.array(numerators), np.array(denominators), len(numerators)
    ratio = quotient(d.sum(), n.sum())
    if m < 2:
        return ratio, np.nan, np.nan, np.nan
    half = float(stats.t.ppf((1 + confidence) / 2, m - 1) * np.std(d - ratio * n, ddof=1) / np.sqrt(m) / n.mean())
    if not log:
        return ratio, ratio - half, ratio + half, half
    half = half / ratio if ratio else 0.0
    return ratio, ratio * np.exp(-half), ratio * np.exp(half), half


def rounding_floor(
    model: nn.Module,
    batches,
    quantize: Callable[[nn.Module], nn.Module],
    times: int = 2,
    seed: int = 0,
    reduction: str = "token",
) -> float:
    """Spread of R_L under changes of the weights that mean nothing: relative ones of 1e-6, drawn from `seed`.

    A change that small moves entries next to a tie over it, these move others further on, and an encoder's R_L comes
    out some per cent away. No two R_L of one model on other machines or of nearly equal weights need agree better; the
    interval of `relative_error`, over sequences, knows nothing of it. Standard deviation, in units of R_L, over
    `times` + 1 evaluations of `batches` (a list; the first with the weights as they are).

    quantize: gives the quantized copy of a model. reduction: as in `relative_error`. Weights in half precision change
    by up to their own rounding.
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
        found.append(relative_error(moved, quantize(moved), batches, reduction=reduction).value)
    return float(np.std(found, ddof=1))


def _draw(batches: list, sample: int, seed: int) -> Iterator:
    """`sample` sequences drawn from all batches, still in batches."""

    def take(value, rows, size: int):
        return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    sizes = [_sequences(batch) for batch in batches]
    total = sum(sizes)
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(sample, total), replace=False))
    for batch, start, size in zip(batches, np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        rows = torch.from_numpy(drawn[(drawn >= start) & (drawn < start + size)] - start)
        if not len(rows):
            continue
        if isinstance(batch, Mapping):
            yield {key: take(value, rows, size) for key, value in batch.items()}
        else:
            yield tuple(take(value, rows, size) for value in batch) if isinstance(batch, (tuple, list)) else batch[rows]


def _sequences(batch) -> int:
    """How many sequences a batch has: those of its token ids, by name or as the integers (B, T) with most rows.

    Positions, masks and rotary tables beside them may be shared by all sequences.
    """
    named = [batch[key] for key in ("input_ids", "inputs_embeds") if isinstance(batch, Mapping) and key in batch]
    given = [x for x in tensors(batch) if x.ndim]
    tables = [x for x in given if x.ndim > 1]
    ids = [x for x in tables if not x.is_floating_point() and x.dtype != torch.bool]
    return max(map(len, next(filter(None, ([x for x in named if x is not None], ids, tables, given)))))
