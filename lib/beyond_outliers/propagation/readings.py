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

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from beyond_outliers.modules import as_batches, evaluating, find_head, forward
from beyond_outliers.passes import main_output, plain_settings, tensors, text_tokens
from beyond_outliers.propagation.norms import dot, pieces
from beyond_outliers.propagation.output_error import ratio_of_sums, text_of, text_sequences
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
    each with `_token` (the mean of the tokens' ratios); kl, kl_second_order (nats a token); top1_agreement (share of
    tokens whose likeliest word stays); loss, loss_quantized and their difference, increase (nats a token, of the next
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
        for batch in as_batches(batches):
            answers = [main_output(forward(one, batch)) for one in (model, quantized)]
            tokens, text = _tokens(batch, answers[0][0]), text_tokens(batch)
            for i in text_sequences(answers[0][0], text):
                read = tuple(text_of(inputs[place], i, text) for place in (0, 1)) if len(inputs) == 2 else None
                pairs = [(text_of(x, i, text), text_of(xq, i, text)) for x, xq in zip(*answers, strict=True)]
                targets = None if tokens is None else text_of(tokens, i, text)
                sequences.append(_of_sequence(pairs, read, head is not None, targets))
    if not sequences:
        raise ValueError("there is no batch in batches")
    runs.check(batch)
    rows = {}
    for name in READINGS:
        sums = [sums[name].tolist() if name in sums else (0.0, np.nan) for sums in sequences]
        denominators, numerators = map(list, zip(*sums, strict=True))
        rows[name] = ratio_of_sums(numerators, denominators, confidence, log=name not in SIGNED)[:3]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"])
    return table.assign(n=len(sequences)).rename_axis("reading")


def _of_sequence(pairs: list, read: tuple | None, logits: bool, tokens: Tensor | None) -> dict[str, Tensor]:
    """Reading -> (denominator, numerator), float64, of one sequence: outputs and head inputs of both models."""
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def add(name: str, denominators: Tensor, numerators: Tensor):
        sums[name] = sums[name] + torch.stack([denominators.sum(), numerators.sum()]).cpu()

    def add_relative(name: str, signal: Tensor, error: Tensor):
        add(name, signal, error)
        kept = signal != 0  # a row of zeros has no relative error
        add(name + "_token", kept.double(), error[kept] / signal[kept])

    compared = [("R_L", pair, False) for pair in pairs]
    compared += [("R_L_centred", pairs[0], True)] if logits else []
    compared += [("R_final_norm", read, False)] if read else []
    for name, pair, centred in compared:
        for x, xq in pieces(pair, "token", centred):
            add_relative(name, dot(x, x), dot(xq - x, xq - x))
    first = 0
    for z, zq in pieces(pairs[0], "token") if logits else ():
        log_p, log_q = z.log_softmax(-1), zq.log_softmax(-1)
        p, one = log_p.exp(), torch.ones_like(z[:, 0])
        change = _variance(p, zq - z)
        add_relative("R_softmax", _variance(p, z), change)
        add("kl", one, (p * (log_p - log_q)).sum(-1))
        add("kl_second_order", one, change / 2)
        add("top1_agreement", one, (z.argmax(-1) == zq.argmax(-1)).double())
        if tokens is not None:
            targets = tokens[first + 1 : first + len(z) + 1, None].to(z.device)
            loss, loss_q = (-x[: len(targets)].gather(1, targets)[:, 0] for x in (log_p, log_q))
            for name, values in (("loss", loss), ("loss_quantized", loss_q), ("increase", loss_q - loss)):
                add(name, torch.ones_like(values), values)
        first += len(z)
    return sums


def _tokens(batch, output: Tensor) -> Tensor | None:
    """(B, T) token ids of a batch, where the output has a row for each; None where they are not there."""
    given = batch["input_ids"] if isinstance(batch, Mapping) and "input_ids" in batch else next(tensors(batch), None)
    if given is None or given.is_floating_point() or given.shape != output.shape[:-1]:
        return None
    return given.long()


@contextmanager
def _inputs_of(head: str | None, *models: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Place of the model -> what its head was given last; empty where there is no head, or nothing calls it."""
    inputs: dict[int, Tensor] = {}

    def keep(place: int):
        def hook(module, args, kwargs):
            inputs[place] = next(tensors(args, kwargs))

        return hook

    modules = [model.get_submodule(head) for model in models] if head else []
    handles = [m.register_forward_pre_hook(keep(i), with_kwargs=True) for i, m in enumerate(modules)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
