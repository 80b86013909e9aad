"""Zero-shot accuracy on multiple-choice tasks, scored as the LM Evaluation Harness does.

The choice with the highest log-likelihood after the question wins. Everything runs in the model's own dtype and under
the caller's `torch.autocast`, if there is one.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from beyond_outliers.config.parsing import choose
from beyond_outliers.config.run import CorpusConfig
from beyond_outliers.corpus.bpe import BOUNDARY
from beyond_outliers.corpus.encoding import TextEncoder
from beyond_outliers.corpus.tokens import open_corpus
from beyond_outliers.evaluate.loss import logits_of
from beyond_outliers.evaluate.tasks import FOLDERS, TASKS, Question, cloze_questions, wheel_questions
from beyond_outliers.model.loss import cross_entropy
from beyond_outliers.modules import evaluating

# Tokens of a scoring batch: on a CPU the activations of a batch should stay in its cache.
BATCH_TOKENS = {"cpu": 4096, "cuda": 32_768}


# ------------------------------------------------------------------------------------------------- log-likelihoods


def encode_requests(tokenizer, requests: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """(context, continuation) strings -> (ids, first): the continuation's tokens are ids[first:].

    The harness's rule: white space that ends the context belongs to the continuation, and the continuation's tokens
    are those of encode(context + continuation) from position len(encode(context)) on. `<|endoftext|>`, where the
    tokenizer has it, comes first, as it came before every training document; inside a text it is text.
    tokenizer: of `tokenizers` or `transformers`, as in `TextEncoder`; padding and truncation stored in it do not count.
    Raises ValueError for a request whose continuation has no token, or whose first token has nothing before it. Warns
    when more than 5 % of the tokens are unknown.
    """
    encoder = TextEncoder(tokenizer)
    boundary = encoder.token_to_id(BOUNDARY)
    start = [] if boundary is None else [boundary]
    heads = [context.rstrip() for context, _ in requests]
    wholes = encoder([c + continuation for c, continuation in requests])
    unique = list(dict.fromkeys(heads))  # the choices of a question share their context
    lengths = {head: len(part) for head, part in zip(unique, encoder(unique), strict=True)}
    encoder.warn_of_unknown(wholes, "the requests")
    encoded = []
    for request, head, whole in zip(requests, heads, wholes, strict=True):
        ids, first = start + whole, len(start) + lengths[head]
        if not 1 <= first < len(ids):
            reason = "nothing comes before the continuation" if first < 1 else "the continuation has no token"
            raise ValueError(f"cannot score the request {request!r}: {reason}")
        encoded.append((ids, first))
    return encoded


def score(
    model: nn.Module,
    tokenizer,
    requests: Sequence[tuple[str, str]],
    context: int | None = None,
) -> np.ndarray:
    """Log-likelihoods (nats, float64) of the continuations of (context, continuation) strings, in their order.

    `context`: the most tokens the model may read at once (its training context); None: no limit. A longer request is
    cut on the left, the boundary first, as a training window may begin inside a document. A continuation that is
    longer than `context` by itself is scored whole, in consecutive windows that share one token.
    Requests are batched by length and padded on the right, where a causal model cannot look. (A model that quantizes
    activations with one scale for the whole batch is not causal in that sense.)
    `model`: as in `logits_of`. Raises ValueError as `encode_requests`, and for a model without logits.
    """
    return _score(model, encode_requests(tokenizer, requests), context)


class _Window(NamedTuple):
    """One forward pass of one request: reads ids[begin : end - 1], predicts ids[first:end]."""

    request: int
    begin: int
    first: int
    end: int

    @property
    def length(self) -> int:  # tokens read
        return self.end - 1 - self.begin


def _windows(encoded: list[tuple[list[int], int]], context: int | None) -> Iterator[_Window]:
    for request, (ids, first) in enumerate(encoded):
        limit = context or len(ids)
        while first < len(ids):
            end = min(len(ids), first + limit)
            yield _Window(request, max(0, end - 1 - limit), first, end)
            first = end


def _score(
    model: nn.Module,
    encoded: list[tuple[list[int], int]],
    context: int | None,
    description: str | None = None,
) -> np.ndarray:
    if context is not None and context < 1:
        raise ValueError(f"context must be at least 1 token, not {context}")
    totals = np.zeros(len(encoded))
    # the largest batch first: it shows what fits
    windows = sorted(_windows(encoded, context), key=lambda window: window.length, reverse=True)
    with (
        evaluating(model) as device,
        tqdm(total=len(windows), desc=description, unit=" seq", disable=description is None, leave=False) as bar,
    ):
        budget = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
        while windows:
            size = max(1, budget // windows[0].length)
            batch, windows = windows[:size], windows[size:]
            found = _score_batch(model, [encoded[w.request][0] for w in batch], batch, device)
            np.add.at(totals, [w.request for w in batch], found)
            bar.update(len(batch))
    return totals


def _score_batch(model: nn.Module, sequences: list[list[int]], batch: list[_Window], device) -> np.ndarray:
    """Summed log-likelihood of every window's targets, (len(batch),) float64."""
    ids = torch.zeros(len(batch), batch[0].length, dtype=torch.int64)
    places, targets = [], []
    for row, (sequence, w) in enumerate(zip(sequences, batch, strict=True)):
        ids[row, : w.length] = torch.tensor(sequence[w.begin : w.end - 1])
        places += [(row, column) for column in range(w.first - 1 - w.begin, w.length)]
        targets += sequence[w.first : w.end]
    rows, columns = torch.tensor(places, device=device).T
    ids = ids.to(device)
    hidden, head = getattr(model, "hidden", None), getattr(model, "head", None)
    if hidden is not None and head is not None:
        # the head is most of a small model's work, and a context's logits are not needed
        logits = head(hidden(ids)[rows, columns])
    else:
        lengths = torch.tensor([[w.length] for w in batch], device=device)
        logits = logits_of(model, ids, torch.arange(ids.shape[1], device=device) < lengths)[rows, columns]
    losses = cross_entropy(logits, torch.tensor(targets, device=device), "none").double().cpu().numpy()
    return -np.bincount(rows.cpu().numpy(), weights=losses, minlength=len(batch))


# -------------------------------------------------------------------------------------------------- zero-shot tasks


def zero_shot(
    model: nn.Module,
    tokenizer,
    tasks: Sequence[str] = TASKS,
    limit: int | None = None,
    heldout: Sequence[str] | None = None,
    context: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Accuracy of a language model on multiple-choice tasks, one row a task.

    `tasks`: of TASKS, or "arc_easy_test". `limit`: that many questions of each task, spread evenly over it. `heldout`:
    the documents that `cloze` is made of; None: the validation documents of the embedded corpus. `context`: as in
    `score`.

    Columns: task; n, the questions; accuracy, where the choice with the highest log-likelihood (summed over the
    tokens of " " + choice) divided by the number of characters of the choice (without that space) wins: the harness's
    `acc_norm`; accuracy_raw, the same undivided: its `acc`; chance, the mean of 1 / (number of choices);
    standard_error of accuracy, sqrt(accuracy (1 - accuracy) / (n - 1)); truncated, the share of questions of which
    some choice was cut to `context`. The first of equal choices wins.
    Raises ValueError for an unknown task or a `limit` below 1.
    """
    for task in tasks:
        choose("task", task, (*FOLDERS, "cloze"))
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 question, not {limit}")
    rows = []
    for task in tasks:
        questions: Sequence[Question]
        if task == "cloze":
            questions = cloze_questions(open_corpus(CorpusConfig()).heldout if heldout is None else heldout)
        else:
            questions = wheel_questions(task)
        if limit is not None and limit < len(questions):
            questions = [questions[i * len(questions) // limit] for i in range(limit)]
        encoded = encode_requests(tokenizer, [(q.context, " " + choice) for q in questions for choice in q.choices])
        likelihoods = _score(model, encoded, context, task if progress else None)
        rows.append({"task": task} | _accuracy(questions, likelihoods, encoded, context))
    return pd.DataFrame(rows)


def _accuracy(questions: Sequence[Question], likelihoods: np.ndarray, encoded: list, context: int | None) -> dict:
    ends = np.cumsum([len(q.choices) for q in questions])
    found = []  # by question: whether it is answered rightly, the same undivided, chance, whether it was cut
    for question, end in zip(questions, ends, strict=True):
        here = slice(end - len(question.choices), end)
        characters = np.array([max(1, len(choice)) for choice in question.choices])
        right, right_raw = (np.argmax(x) == question.gold for x in (likelihoods[here] / characters, likelihoods[here]))
        cut = context is not None and any(len(ids) - 1 > context for ids, _ in encoded[here])
        found.append((right, right_raw, 1 / len(characters), cut))
    n, (accuracy, raw, chance, truncated) = len(questions), (float(np.mean(part)) for part in zip(*found, strict=True))
    return {
        "n": n,
        "accuracy": accuracy,
        "accuracy_raw": raw,
        "chance": chance,
        "standard_error": (accuracy * (1 - accuracy) / (n - 1)) ** 0.5 if n > 1 else float("nan"),
        "truncated": truncated,
    }
