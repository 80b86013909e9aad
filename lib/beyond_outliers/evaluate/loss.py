"""Validation loss in nats per token, on windows spread evenly over the validation tokens.

Everything runs in the model's own dtype and under the caller's `torch.autocast`, if there is one.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from beyond_outliers.model.loss import cross_entropy
from beyond_outliers.modules import evaluating
from beyond_outliers.passes import main_output


@dataclass(frozen=True)
class ValidationLoss:
    """`loss` in nats per token, `standard_error` over sequences (NaN for one), `bits_per_byte`, tokens predicted."""

    loss: float
    standard_error: float
    bits_per_byte: float
    n_tokens: int


def window_starts(n_tokens: int, context: int, max_tokens: int | None = None) -> np.ndarray:
    """Where validation windows of `context` + 1 tokens begin, (windows,) int64: they do not overlap.

    With `max_tokens`, the largest number of windows that predict no more than that many tokens is spread evenly, so
    that a sample crosses all documents. ValueError if there is no room for one window.
    """
    available = n_tokens // (context + 1)
    n_windows = available if max_tokens is None else min(available, max_tokens // context)
    if n_windows < 1:
        raise ValueError(
            f"a window needs {context + 1} tokens and predicts {context}; "
            f"there are {n_tokens} tokens, and max_tokens is {max_tokens}"
        )
    return np.arange(n_windows) * available // n_windows * (context + 1)


def logits_of(model: nn.Module, ids: Tensor, text: Tensor | None = None) -> Tensor:
    """Logits (B, T, V) of ids (B, T), of a model that returns them or, as in `transformers`, a mapping that has them.

    text: bool (B, T), False for padding; only models that take an `attention_mask` are told. ValueError for a model
    that gives hidden states and no logits.
    """
    told = {}
    if text is not None and not text.all() and "attention_mask" in inspect.signature(model.forward).parameters:
        told["attention_mask"] = text.long()
    output = model(ids, **told)
    if isinstance(output, Mapping) and "logits" not in output:
        raise ValueError(
            f"{type(model).__name__} gives {', '.join(output)}; valid: a language model, which gives logits"
        )
    logits = main_output(output)
    if not logits or logits[0].shape[:-1] != ids.shape:
        raise ValueError(f"{type(model).__name__} gives no logits for each token of ids {tuple(ids.shape)}")
    return logits[0]


def validation_loss(
    model: nn.Module,
    tokens: np.ndarray,
    context: int,
    batch_size: int = 32,
    max_tokens: int | None = None,
    token_bytes: np.ndarray | None = None,
) -> ValidationLoss:
    """Mean next-token cross-entropy over windows of `context` + 1 tokens that do not overlap.

    `model(ids)` maps (B, T) int64 to logits (B, T, V), see `logits_of`; it may be compiled: all calls have one shape.
    `tokens` is 1-D uint16, in memory or mapped. With `max_tokens`, the largest number of windows that predict no more
    than that many tokens is spread evenly over `tokens`, so that a sample crosses all documents.
    `token_bytes` (V,) counts the UTF-8 bytes of every token and turns nats into bits a byte; without it they are NaN.
    Raises ValueError if `tokens` or `max_tokens` do not hold one window, or if a token is missing in `token_bytes`.
    """
    starts = window_starts(len(tokens), context, max_tokens)
    n_windows = len(starts)
    batch_size = min(batch_size, n_windows)
    sums = np.empty(n_windows)  # nats a window
    n_bytes = 0
    with evaluating(model) as device:
        for first in range(0, n_windows, batch_size):
            real = min(batch_size, n_windows - first)
            # the last batch is filled up with repetitions: another shape would compile the model again
            chosen = starts[(first + np.arange(batch_size)) % n_windows]
            window = torch.from_numpy(tokens[chosen[:, None] + np.arange(context + 1)].astype(np.int64)).to(device)
            targets = window[:, 1:]
            losses = cross_entropy(logits_of(model, window[:, :-1]), targets, "none").view(batch_size, context)
            sums[first : first + real] = losses.sum(1, dtype=torch.float64)[:real].cpu().numpy()
            if token_bytes is not None:
                if (ids := targets[:real].cpu().numpy()).max() >= len(token_bytes):
                    raise ValueError(f"token {ids.max()} has no entry in token_bytes of length {len(token_bytes)}")
                n_bytes += int(token_bytes[ids].sum())
    n_tokens = n_windows * context
    return ValidationLoss(
        loss=float(sums.sum() / n_tokens),
        standard_error=float(sums.std(ddof=1) / context / n_windows**0.5) if n_windows > 1 else float("nan"),
        bits_per_byte=float(sums.sum() / np.log(2) / n_bytes) if n_bytes else float("nan"),
        n_tokens=n_tokens,
    )
