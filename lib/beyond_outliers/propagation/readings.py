"""What can be read at a network's end: R in several readings, the KL divergence and its second order, the loss.

With z the logits of the model, zq those of the quantized one, dz = zq - z and p = softmax(z), all of one token:

    raw               ||dz||^2 / ||z||^2                       R_L as arXiv 2509.23500 defines it, for one vector
    centred           the same of z - mean(z), dz - mean(dz)   softmax does not see an offset common to all words
    softmax-weighted  Var_p(dz) / Var_p(z)                     words count by their probability; no offset either
    second-order KL   Var_p(dz) / 2 = KL(p || pq) + O(dz^3)    in nats, absolute
    final norm        ||dx||^2 / ||x||^2 of the head's input   before the head adds its share

Over tokens: the mean of each token's ratio, or the ratio of the sums over all tokens. Which of the two the paper's
tables hold is not known: it defines R for one vector, and its code is not public. The committed tables of the scales
up to `confirm` hold the raw ratio of sums. A row added to all rows of the head's weight changes no probability and
moves raw R; the centred and the softmax-weighted readings stay.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from beyond_outliers.modules import evaluating, find_head, forward, text_batches
from beyond_outliers.passes import main_output, plain_settings, tensors, text_tokens
from beyond_outliers.propagation.norms import dot, pieces
from beyond_outliers.propagation.output_error import ratio_of_sums, text_sequences
from beyond_outliers.quantizers.record import Runs

RELATIVE = ("R_L", "R_L_centred", "R_softmax", "R_final_norm")
SIGNED = ("top1_agreement", "loss", "loss_quantized", "increase")  # not on the log scale
READINGS = (*(name + end for name in RELATIVE for end in ("", "_token")), "kl", "kl_second_order", *SIGNED)


def second_order_kl(logits: Tensor, logits_q: Tensor) -> Tensor:
    """Var_p(dz) / 2 in nats, (..., V) -> (...,) float64: KL(p || pq) up to terms of third order in dz."""
    z = logits.double()
    return _variance(z.softmax(-1), logits_q.double() - z) / 2


def softmax_weighted_error(logits: Tensor, logits_q: Tensor) -> Tensor:
    """Var_p(dz) / Var_p(z), (..., V) -> (...,) float64: the relative error, every word counted by its probability."""
    z = logits.double()
    p = z.softmax(-1)
    return _variance(p, logits_q.double() - z) / _variance(p, z)


def _variance(p: Tensor, x: Tensor) -> Tensor:
    """(...,): variance of x (..., V) under the probabilities p."""
    return (p * (x - (p * x).sum(-1, keepdim=True)).square()).sum(-1)


@plain_settings()
def output_readings(model: nn.Module, quantized: nn.Module, batches, confidence: float = 0.95) -> pd.DataFrame:
    """All readings of the module docstring, with the loss, in one pass of each model, in float64.

    One row a reading, which is the index: R_L, R_L_centred, R_softmax, R_final_norm (ratios of sums over all tokens),
    each with `_token` (the mean of the tokens' ratios); kl, kl_second_order (nats per token); top1_agreement (share of
    tokens whose likeliest word stays); loss, loss_quantized and their difference, increase (nats per token, of the next
    token within a sequence). Columns: value; low, high, its interval over sequences (as in `relative_error`; not on
    the log scale for what may be zero or negative); n, sequences.

    `batches`: as in `decompose`, the first dimension counting sequences, padding left out. `input_ids`, else the first
    tensor (B, T), are the targets of the loss. A model without an output head has R_L of its answer; what needs logits
    is NaN then, and R_final_norm where the head is not called. Raises ValueError for no batches, and for quantized
    layers that did not run.
    """
    sequences: list[dict[str, Tensor]] = []
    runs, head = Runs(quantized), find_head(model)
    with evaluating(model, quantized), runs.counted(), _inputs_of(head, model, quantized) as inputs:
        for batch in text_batches(model, batches):
            answers = [main_output(forward(one, batch)) for one in (model, quantized)]
            read = list(inputs.values()) if len(inputs) == 2 else []
            tokens, places = _tokens(batch, answers[0][0]), len(answers[0])
            for values in text_sequences(text_tokens(batch, model), [*answers[0], *answers[1], *tokens, *read]):
                sums = _Sums()
                for pair in zip(values[:places], values[places : 2 * places], strict=True):
                    sums.add_relative("R_L", pair)
                if read:
                    sums.add_relative("R_final_norm", values[-2:])
                if head is not None:
                    sums.add_logits(values[0], values[places], values[2 * places] if tokens else None)
                sequences.append(sums)
    if not sequences:
        raise ValueError("there is no batch in batches")
    runs.check(batch)
    rows = {}
    for name in READINGS:
        of_name = [sums[name].tolist() if name in sums else (0.0, np.nan) for sums in sequences]
        rows[name] = ratio_of_sums(of_name, confidence, log=name not in SIGNED)[:3]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"])
    return table.assign(n=len(sequences)).rename_axis("reading")


class _Sums(dict[str, Tensor]):
    """Reading -> (denominator, numerator), float64, of one sequence."""

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
        self.add_relative("R_L_centred", (logits, logits_q), centred=True)
        first = 0
        for z, zq in pieces((logits, logits_q), "token"):
            log_p, log_q = z.log_softmax(-1), zq.log_softmax(-1)
            p, one = log_p.exp(), torch.ones_like(z[:, 0])
            change = _variance(p, zq - z)
            self.add_ratios("R_softmax", _variance(p, z), change)
            self.add("kl", one, (p * (log_p - log_q)).sum(-1))
            self.add("kl_second_order", one, change / 2)
            self.add("top1_agreement", one, (z.argmax(-1) == zq.argmax(-1)).double())
            if tokens is not None:
                targets = tokens[first + 1 : first + len(z) + 1, None].to(z.device)
                loss, loss_q = (-x[: len(targets)].gather(1, targets)[:, 0] for x in (log_p, log_q))
                for name, values in (("loss", loss), ("loss_quantized", loss_q), ("increase", loss_q - loss)):
                    self.add(name, one[: len(targets)], values)
            first += len(z)


def _tokens(batch, output: Tensor) -> list[Tensor]:
    """The token ids (B, T) of a batch, where the output has a row for each; nothing where they are not there."""
    ids = batch["input_ids"] if isinstance(batch, Mapping) and "input_ids" in batch else next(tensors(batch), output)
    return [] if ids.is_floating_point() or ids.shape != output.shape[:-1] else [ids.long()]


@contextmanager
def _inputs_of(head: str | None, *models: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Place of the model -> what its head was given last; empty where there is no head, or nothing calls it."""
    inputs: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for place, model in enumerate(models if head else ()):

            def keep(module, args, kwargs, place=place):
                inputs[place] = next(tensors(args, kwargs))

            stack.enter_context(model.get_submodule(head or "").register_forward_pre_hook(keep, with_kwargs=True))
        yield inputs
