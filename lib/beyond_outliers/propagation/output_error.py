"""What can be read at a network's end: R in several readings, the KL divergence and its second order, the loss.

With z the logits of the model, zq those of the quantized one, dz = zq - z and p = softmax(z), all of one token:

    raw               ||dz||^2 / ||z||^2                       R_L as arXiv 2509.23500 defines it, for one vector
    centred           the same of z - mean(z), dz - mean(dz)   softmax does not see an offset common to all words
    softmax-weighted  Var_p(dz) / Var_p(z)                     words count by their probability; no offset either
    second-order KL   Var_p(dz) / 2 = KL(p || pq) + O(dz^3)    in nats, absolute
    final norm        ||dx||^2 / ||x||^2 of the head's input   before the head adds its share
    offset share      ||mean(z)||^2 / ||z||^2                  the part of the logits that softmax does not see

Over tokens: the mean of each token's ratio, or the ratio of the sums over all tokens. Which of the two the paper's
tables hold is not known: it defines R for one vector, and its code is not public. The committed tables of the scales
up to `confirm` hold the raw ratio of sums. A row added to all rows of the head's weight changes no probability and
moves raw R; the centred and the softmax-weighted readings stay.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from beyond_outliers.config.parsing import choose
from beyond_outliers.modules import as_batches, copy_of, evaluating, find_head, forward, hooked, text_batches
from beyond_outliers.passes import main_output, mapped, plain_settings, tensors, text_tokens
from beyond_outliers.propagation.norms import REDUCTIONS, dot, pieces, quotient
from beyond_outliers.quantizers.record import Runs

RELATIVE = ("R_L", "R_L_centred", "R_softmax", "R_final_norm")
SIGNED = ("offset_share", "top1_agreement", "loss", "loss_quantized", "increase")  # not on the log scale
READINGS = (*(name + end for name in RELATIVE for end in ("", "_token")), "kl", "kl_second_order", *SIGNED)
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
    """R_L with its interval over sequences.

    `str` of it says so in words, and where the sequences are too few for the interval to be trusted.
    """

    value: float
    low: float
    high: float
    n_sequences: int
    n_tokens: int

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

    Raises ValueError for an unknown reduction, no batches, `sample` below 2, `confidence` outside (0, 1), and as
    `decompose` for quantized layers that did not run.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    choose("reduction", reduction, REDUCTIONS)
    batches = text_batches(model, batches)
    if sample is not None:
        if sample < 2:
            raise ValueError(f"sample must be at least 2 sequences, not {sample}")
        batches = _draw(list(batches), sample, seed)
    name = "R_L" + "_centred" * centred + "_token" * (reduction == "token")

    sequences = _sums(model, quantized, batches, (centred,))
    estimate = ratio_of_sums([sums.of(name) for sums in sequences], confidence)
    return RelativeError(**estimate, n_sequences=len(sequences), n_tokens=sum(sums.tokens for sums in sequences))


@plain_settings()
def output_readings(model: nn.Module, quantized: nn.Module, batches, confidence: float = 0.95) -> pd.DataFrame:
    """All readings of the module docstring, with the loss, in one pass of each model, in float64.

    One row a reading, which is the index: R_L, R_L_centred, R_softmax, R_final_norm (ratios of sums over all tokens),
    each with `_token` (the mean of the tokens' ratios); kl, kl_second_order (nats per token); offset_share;
    top1_agreement (share of tokens whose likeliest word stays); loss, loss_quantized and their difference, increase
    (nats per token, of the next token within a sequence). Columns: value; low, high, its interval over sequences (as in
    `relative_error`; not on the log scale for what may be zero or negative); n, sequences.

    `batches`: as in `decompose`, the first dimension counting sequences, padding left out. `input_ids`, else the first
    tensor (B, T), are the targets of the loss. A model without an output head has R_L of its answer; what needs logits
    is NaN then, and R_final_norm where the head is not called. Raises ValueError for no batches, and for quantized
    layers that did not run.
    """
    sequences = _sums(model, quantized, text_batches(model, batches))
    rows = [ratio_of_sums([s.of(name) for s in sequences], confidence, log=name not in SIGNED) for name in READINGS]
    return pd.DataFrame(rows, index=READINGS).assign(n=len(sequences)).rename_axis("reading")


def _variance(p: Tensor, x: Tensor) -> Tensor:
    """(...,): variance of x (..., V) under the probabilities p."""
    return (p * (x - (p * x).sum(-1, keepdim=True)).square()).sum(-1)


class _Sums(dict[str, Tensor]):
    """Reading -> (denominator, numerator), float64, of one sequence of so many `tokens`."""

    tokens = 0

    def of(self, name: str) -> list[float]:
        """Both; of what was not read, NaN."""
        return self[name].tolist() if name in self else [0.0, np.nan]

    def add(self, name: str, denominators: Tensor, numerators: Tensor):
        self[name] = self.get(name, 0) + torch.stack([denominators.sum(), numerators.sum()])

    def add_ratios(self, name: str, signal: Tensor, error: Tensor):
        self.add(name, signal, error)
        kept = signal != 0  # a row of zeros has no relative error
        self.add(name + "_token", kept.double(), error[kept] / signal[kept])

    def add_relative(self, name: str, pair: Sequence[Tensor], centred: bool = False):
        for x, xq in pieces(tuple(pair), "token", centred):
            self.add_ratios(name, dot(x, x), dot(xq - x, xq - x))

    def add_logits(self, logits: Tensor, logits_q: Tensor, tokens: Tensor | None):
        first = 0
        for z, zq in pieces((logits, logits_q), "token"):
            log_p, log_q = z.log_softmax(-1), zq.log_softmax(-1)
            p, one = log_p.exp(), torch.ones_like(z[:, 0])
            change = _variance(p, zq - z)
            self.add_ratios("R_softmax", _variance(p, z), change)
            self.add("offset_share", dot(z, z), z.shape[-1] * z.mean(-1).square())
            self.add("kl", one, (p * (log_p - log_q)).sum(-1))
            self.add("kl_second_order", one, change / 2)
            self.add("top1_agreement", one, (z.argmax(-1) == zq.argmax(-1)).double())
            if tokens is not None:
                targets = tokens[first + 1 : first + len(z) + 1, None].to(z.device)
                loss, loss_q = (-x[: len(targets)].gather(1, targets)[:, 0] for x in (log_p, log_q))
                for name, values in (("loss", loss), ("loss_quantized", loss_q), ("increase", loss_q - loss)):
                    self.add(name, one[: len(targets)], values)
            first += len(z)


def _sums(model: nn.Module, quantized: nn.Module, batches, centred: Sequence[bool] | None = None) -> list[_Sums]:
    """The sums of every sequence. centred: of R_L alone, in these readings."""
    head, sequences = find_head(model) if centred is None else None, list[_Sums]()
    runs, ways = Runs(quantized), centred or (False, True)[: 1 + (head is not None)]
    heads = [one.get_submodule(head) for one in (model, quantized)] if head else []
    inputs: dict[nn.Module, Tensor] = {}

    def keep(module, args, kwargs):
        inputs[module] = next(tensors(args, kwargs))

    with evaluating(model, quantized), runs.counted(), hooked(heads, keep):
        for batch in batches:
            answers = [main_output(forward(one, batch)) for one in (model, quantized)]
            if not answers[0]:
                raise ValueError(f"{type(model).__name__} returns no floating-point tensor")
            read = [inputs[module] for module in heads] if len(inputs) == 2 else []  # where something calls the heads
            tokens, places = _tokens(batch, answers[0][0]), len(answers[0])
            for values in text_sequences(text_tokens(batch, model), [*answers[0], *answers[1], *tokens, *read]):
                sums = _Sums()
                sums.tokens = values[0][..., 0].numel()
                for pair in zip(values[:places], values[places : 2 * places], strict=True):
                    for way in ways:
                        sums.add_relative("R_L" + "_centred" * way, pair, way)
                if read:
                    sums.add_relative("R_final_norm", values[-2:])
                if head is not None:
                    sums.add_logits(values[0], values[places], values[2 * places] if tokens else None)
                sequences.append(sums)
    if not sequences:
        raise ValueError("there is no batch in batches")
    runs.check(batch)
    return sequences


def _tokens(batch, output: Tensor) -> list[Tensor]:
    """The token ids (B, T) of a batch, where the output has a row for each; nothing where they are not there."""
    ids = batch["input_ids"] if isinstance(batch, Mapping) and "input_ids" in batch else next(tensors(batch), output)
    return [] if ids.is_floating_point() or ids.shape != output.shape[:-1] else [ids.long()]


def ratio_of_sums(sums: Sequence[Sequence[float]], confidence: float = 0.95, log: bool = True) -> dict[str, float]:
    """Ratio of two sums over sequences and the ends of its interval: value, low, high; on the log scale with `log`.

    sums: (denominator, numerator) of each sequence.
    """
    from scipy import stats  # half a second that a process which only trains does not need

    n, d = np.array(sums).T
    ratio = quotient(d.sum(), n.sum())
    if len(d) < 2:
        return {"value": ratio, "low": np.nan, "high": np.nan}
    half = stats.t.ppf((1 + confidence) / 2, len(d) - 1) * np.std(d - ratio * n, ddof=1) / len(d) ** 0.5 / n.mean()
    if not log:
        return {"value": ratio, "low": ratio - half, "high": ratio + half}
    half = half / ratio if ratio else 0.0
    return {"value": ratio, "low": ratio * np.exp(-half), "high": ratio * np.exp(half)}


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
        for weight in moved.parameters():
            if time and weight.is_floating_point():
                size = max(1e-6, torch.finfo(weight.dtype).eps)
                change = size * torch.randn(weight.shape, dtype=torch.float32, generator=generator)
                weight.data.mul_((1 + change).to(weight.device, weight.dtype))
        found.append(relative_error(moved, quantize(moved), batches, reduction=reduction).value)
        del moved  # before the next copy is made
    return float(np.std(found, ddof=1))


def _draw(batches: list, sample: int, seed: int) -> Iterator:
    """`sample` sequences drawn from all batches, one a batch. What all sequences share stays as it is."""
    places = [(batch, row) for batch in batches for row in range(_sequences(batch))]
    drawn = np.random.default_rng(seed).choice(len(places), min(sample, len(places)), replace=False)
    for batch, row in (places[place] for place in np.sort(drawn)):
        size = _sequences(batch)

        def take(x: Tensor, row=row, size=size) -> Tensor:
            return x[row : row + 1] if x.ndim and len(x) == size else x

        yield mapped(take, batch)


def _sequences(batch) -> int:
    """How many sequences a batch has: those of its token ids (B, T) or embeddings (B, T, n).

    Positions, masks and rotary tables beside them may be shared by all sequences: the most rows count.
    """
    given = list(tensors(batch))
    rows = [x for x in given if x.ndim > 1 + x.is_floating_point() and x.dtype != torch.bool]
    return max(map(len, rows or given[:1]))
