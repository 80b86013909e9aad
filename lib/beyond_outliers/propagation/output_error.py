"""R_L alone: the relative error of a quantized model's output, its interval over sequences, its floor from rounding.

What else can be read at a network's end, most of it closer to the damage than R_L is, stands in `readings`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from beyond_outliers.config.parsing import choose
from beyond_outliers.modules import as_batches, copy_of, evaluating, forward, text_batches
from beyond_outliers.passes import main_output, plain_settings, tensors, text_tokens
from beyond_outliers.propagation.norms import REDUCTIONS, Ratios, dot, pieces, quotient
from beyond_outliers.quantizers.record import Runs

FEWEST = 10  # sequences before an interval may decide that they are enough
TRUSTED = 8  # sequences from which on the spread among them says something of the text


def text_sequences(text: Tensor | None, values: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors (B, ...), sequence by sequence, without padding where they have a row for each token.

    text: see `text_tokens`. Sequences of padding alone are left out.
    """
    for i in range(len(values[0])):
        if text is None or text[i].any():
            yield [x[i] if text is None or x.shape[:2] != text.shape else x[i][text[i].to(x.device)] for x in values]


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
    batches = text_batches(model, batches)
    if sample is not None:
        if sample < 2:
            raise ValueError(f"sample must be at least 2 sequences, not {sample}")
        batches = _draw(list(batches), sample, seed)
    if tolerance is not None:
        if not tolerance > 0:
            raise ValueError(f"tolerance must be a positive share of R, not {tolerance}")
        listed = list(batches)
        batches = [listed[place] for place in np.random.default_rng(seed).permutation(len(listed))]
    sums: list[list[float]] = []  # squares of the output and of its error, or tokens and their ratios
    n_tokens, runs = 0, Runs(quantized)
    with evaluating(model, quantized), runs.counted():
        for batch in batches:
            answers = [main_output(forward(one, batch)) for one in (model, quantized)]
            if not answers[0]:
                raise ValueError(f"{type(model).__name__} returns no floating-point tensor")
            for values in text_sequences(text_tokens(batch, model), [*answers[0], *answers[1]]):
                ratio, places = Ratios(reduction), len(answers[0])
                for pair in zip(values[:places], values[places:], strict=True):
                    for h, hq in pieces(pair, reduction, centred):
                        ratio.add(dot(h, h), dot(hq - h, hq - h))
                sums.append(ratio.sums.tolist() if ratio.sums.ndim else [0.0, 0.0])
                n_tokens += values[0][..., 0].numel()
            if tolerance is not None and len(sums) >= FEWEST and ratio_of_sums(sums, confidence)[3] <= tolerance:
                break
    if not sums:
        raise ValueError("there is no batch in batches")
    runs.check(batch)
    value, low, high, half = ratio_of_sums(sums, confidence)
    quantiles = stats.norm.ppf((1 + confidence) / 2) / stats.t.ppf((1 + confidence) / 2, len(sums) - 1)
    needed = float(n_tokens * (quantiles * half / 0.05) ** 2)
    return RelativeError(value, low, high, confidence, len(sums), n_tokens, needed)


def ratio_of_sums(
    sums: Sequence[Sequence[float]], confidence: float, log: bool = True
) -> tuple[float, float, float, float]:
    """Ratio of two sums over sequences, the ends of its interval, and half its width: of the logarithm with `log`.

    sums: (denominator, numerator) of each sequence.
    """
    from scipy import stats  # half a second that a process which only trains does not need

    n, d = np.array(sums).T
    ratio = quotient(d.sum(), n.sum())
    if len(d) < 2:
        return ratio, np.nan, np.nan, np.nan
    half = stats.t.ppf((1 + confidence) / 2, len(d) - 1) * np.std(d - ratio * n, ddof=1) / len(d) ** 0.5 / n.mean()
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
                change = size * torch.randn(weight.shape, dtype=torch.float32, generator=generator)
                weight.data.mul_((1 + change).to(weight.device, weight.dtype))
        found.append(relative_error(moved, quantize(moved), batches, reduction=reduction).value)
        del moved  # before the next copy is made
    return float(np.std(found, ddof=1))


def _draw(batches: list, sample: int, seed: int) -> Iterator:
    """`sample` sequences drawn from all batches, still in batches."""

    sizes = [_sequences(batch) for batch in batches]
    total = sum(sizes)
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(sample, total), replace=False))
    for batch, start, size in zip(batches, np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        rows = torch.from_numpy(drawn[(drawn >= start) & (drawn < start + size)] - start)

        def take(value, rows=rows, size=size):
            return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

        if len(rows):
            if isinstance(batch, Mapping):
                yield {key: take(value) for key, value in batch.items()}
            else:
                yield tuple(map(take, batch)) if isinstance(batch, (tuple, list)) else take(batch)


def _sequences(batch) -> int:
    """How many sequences a batch has: those of its token ids (B, T) or embeddings (B, T, n).

    Positions, masks and rotary tables beside them may be shared by all sequences: the most rows count.
    """
    given = list(tensors(batch))
    rows = [x for x in given if x.ndim > 1 + x.is_floating_point() and x.dtype != torch.bool]
    return max(map(len, rows or given[:1]))
