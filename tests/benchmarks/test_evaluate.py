"""Seconds of scoring a task of HellaSwag's size by a 0.33M-parameter model (width 64, depth 4, vocabulary 2048).

Questions are synthetic, with HellaSwag's lengths at that vocabulary: four requests a question, 140 tokens a request in
the mean, 36 % of them continuation; contexts as long as they are.
"""

import time

import numpy as np
import pandas as pd
import torch

from benchmarking import on_threads
from beyond_outliers.evaluate import multiple_choice
from beyond_outliers.model import Olmo2, Olmo2Config

QUESTIONS, CHOICES = 10_042, 4


def requests(questions: int) -> list[tuple[list[int], int]]:
    """(ids, first token of the continuation), as `encode_requests` returns them; a question's share their context."""
    rng = np.random.default_rng(0)
    found = []
    for total in rng.normal(140, 55, questions).clip(20, 260).astype(int):
        first = max(1, total - int(0.36 * total))
        context = rng.integers(1, 2048, first).tolist()
        found += [(context + rng.integers(1, 2048, total - first).tolist(), first) for _ in range(CHOICES)]
    return found


def measure(questions: int = QUESTIONS, threads: int = 2) -> pd.DataFrame:
    torch.manual_seed(0)
    model = Olmo2(Olmo2Config(vocab_size=2048, width=64, depth=4, n_heads=4))
    encoded = requests(questions)
    with on_threads(threads):
        multiple_choice._score(model, encoded[:400], None)
        start = time.perf_counter()
        likelihoods = multiple_choice._score(model, encoded, None)
        seconds = time.perf_counter() - start
    assert np.isfinite(likelihoods).all() and (likelihoods < 0).all()
    row = {"benchmark": "scoring", "size": "0.33M", "what": f"{questions:,} questions", "threads": threads, "unit": "s"}
    return pd.DataFrame([row | {"value": seconds, "seconds": seconds, "rounds": 1}])


def test_a_few_questions_are_scored_and_timed():
    (row,) = measure(20, threads=1).to_dict("records")
    assert 0 < row["value"] < 60
