"""Tokens and batches: building, opening, and what stands in the files."""

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from beyond_outliers import paths
from beyond_outliers.config import CorpusConfig
from beyond_outliers.corpus import (
    BOUNDARY,
    Batches,
    bpe,
    corpus_folder,
    documents,
    open_corpus,
    sample,
    split,
)
from beyond_outliers.corpus import tokens as corpus
from beyond_outliers.evaluate import cloze_questions, encode_requests


@pytest.fixture(scope="module")
def built(corpus_config):
    return open_corpus(corpus_config)


def test_tokens_decode_to_the_documents(built, corpus_config, tmp_path):
    with split(documents(corpus_config), corpus_config.validation_share, tmp_path) as (train, validation):
        assert list(built.heldout) == list(validation)
        assert int((built.train == 0).sum()) == len(list(train))
    assert built.train.dtype == np.uint16
    assert built.tokenizer.token_to_id(BOUNDARY) == 0


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder for a corpus of the test's own, cache and all."""
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return tmp_path


def write_rows(path, texts, groups=None):
    groups = groups or [None] * len(texts)
    path.write_text("".join(json.dumps({"text": t, "group": g}) + "\n" for t, g in zip(texts, groups, strict=True)))
    return CorpusConfig(source=str(path), vocab_size=270, validation_share=0.1)


def prose(n, seed=0):
    rng, words = random.Random(seed), [a + b for a in "acegi" for b in "bd"]
    return [" ".join(rng.choices(words, k=20)) + f" {i}" for i in range(n)]


def test_the_boundary_inside_a_text_is_text(own):
    shapes = ["{} see <|endoftext|> here", "<|endoftext|>{}", "{}<|endoftext|>", "<|endoftext|>" * 3 + "{}"]
    texts = [shapes[i % 4].format(text) for i, text in enumerate(prose(200))]
    built = open_corpus(write_rows(own / "rows.jsonl", texts))
    train, validation = np.asarray(built.train), np.asarray(built.validation)
    assert (train == 0).sum() == built.meta["train"]["documents"]
    assert (validation == 0).sum() == built.meta["validation"]["documents"] == len(list(built.heldout))
    assert set(list(built.heldout)) <= set(texts)
    assert built.token_bytes[validation].sum() == built.meta["validation"]["bytes"]
    # the same tokens wherever the corpus's tokenizer is used later
    first = built.heldout[0]
    end = np.flatnonzero(validation == 0)[1]
    assert built.tokenizer.encode(first).ids == validation[1:end].tolist()
    reopened = Tokenizer.from_file(str(built.folder / "tokenizer.json"))
    assert encode_requests(reopened, [("x", first)]) == encode_requests(built.tokenizer, [("x", first)])


def test_tokens_do_not_depend_on_the_size_of_a_chunk(built, tmp_path, monkeypatch):
    texts = [*prose(50), "long " * 500]
    whole = corpus.write_tokens(tmp_path / "whole.bin", built.tokenizer, texts)
    monkeypatch.setattr(corpus, "CHUNK", 100)
    assert corpus.write_tokens(tmp_path / "parts.bin", built.tokenizer, texts) == whole


def test_heldout_documents_are_decoded_when_they_are_asked_for(built):
    texts = list(built.heldout)
    assert len(built.heldout) == len(texts) > 10
    assert built.heldout[3] == texts[3] and built.heldout[-1] == texts[-1]
    assert cloze_questions(built.heldout, 20) == cloze_questions(texts, 20)
    with pytest.raises(IndexError):
        built.heldout[len(texts)]


def test_rows_without_text_are_counted_in_the_corpus(own):
    config = write_rows(own / "rows.jsonl", [*prose(200), None, "", None])
    with pytest.warns(UserWarning, match=r"3 rows without text were skipped: .*rows\.jsonl"):
        meta = open_corpus(config).meta
    assert meta["skipped"] == {config.source: 3}
    assert meta["train"]["documents"] + meta["validation"]["documents"] == 200


def nothing_kept(config):
    folder = corpus_folder(config)
    return not folder.exists() and not list(folder.parent.glob(".building-*"))


def test_a_validation_side_without_text_is_an_error_and_not_kept(own):
    """Every held-out text stands in training, too."""
    texts = prose(30)
    config = write_rows(own / "rows.jsonl", texts * 10, [f"g{i}" for i in range(10) for _ in texts])
    for _ in range(2):
        with pytest.raises(ValueError, match="no text is left"), pytest.warns(UserWarning, match=r"0\.00% of the text"):
            open_corpus(config)
        assert nothing_kept(config)


def test_a_side_too_short_for_a_window_is_an_error_and_not_kept(own):
    config = write_rows(own / "rows.jsonl", prose(200))
    tokens = open_corpus(replace(config, vocab_size=271)).meta["validation"]["tokens"]
    with pytest.raises(ValueError, match=rf"the validation side has \d+ tokens, windows of {2 * tokens} need at least"):
        open_corpus(config, context=2 * tokens)
    assert nothing_kept(config)
    built = open_corpus(config, context=32)  # long enough for these
    n = built.meta["validation"]["tokens"]
    assert open_corpus(config, context=n - 1).meta == built.meta
    with pytest.raises(ValueError, match=f"the validation side has {n} tokens, windows of {n} need at least {n + 1}"):
        open_corpus(config, context=n)
    assert built.folder.exists()  # good for shorter windows


class Text(list):
    """Texts in memory with the size that `sample` asks for."""

    bytes = property(lambda self: sum(len(t.encode()) for t in self))


def test_a_tokenizer_is_trained_on_all_of_a_small_corpus_and_a_spread_of_a_large_one(monkeypatch):
    texts = Text(f"text {i} " + "ä" * (i % 50) for i in range(3000))
    assert list(sample(texts, texts.bytes)) == texts
    part = list(sample(texts, 10_000))
    assert part == list(sample(texts, 10_000)) and 8_000 < sum(len(t.encode()) for t in part) < 12_000
    numbers = np.array([int(t.split()[1]) for t in part])
    assert (np.histogram(numbers, 10, (0, 3000))[0] > 5).all()  # from all over the corpus
    monkeypatch.setattr(bpe, "LONGEST_IN_SAMPLE", 100)  # of a large document its beginning
    assert {len(t) for t in sample(Text("x" * 100_000 for _ in range(20)), 10**6)} == {100}


def test_a_corpus_is_hashed_once_a_process(built, corpus_config, monkeypatch):
    before, hashed = hashlib.file_digest, []
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: hashed.append(Path(file.name).name) or before(file, kind)
    )
    assert open_corpus(corpus_config) is built and not hashed
    corpus._open.cache_clear()  # as in another process
    for _ in range(3):
        assert open_corpus(corpus_config).meta == built.meta
    assert sorted(hashed) == ["meta.json", "prose.jsonl", "tokenizer.json", "train.bin", "validation.bin"]


def test_damage_of_any_kind_is_noticed(own, capsys):
    config = write_rows(own / "rows.jsonl", prose(200))
    meta = open_corpus(config).meta

    def cut(path):
        path.write_bytes(path.read_bytes()[:-2])

    def flip(path):
        raw = path.read_bytes()
        path.write_bytes(bytes([*raw[:100], raw[100] ^ 1, *raw[101:]]))

    damages = [
        ("meta.json", cut),
        ("train.bin", cut),
        ("train.bin", flip),
        ("tokenizer.json", flip),
        ("validation.bin", Path.unlink),
        ("tokenizer.json", Path.unlink),
        ("SHA256SUMS", flip),
        ("meta.json", Path.unlink),
    ]
    for name, damage in damages:
        damage(corpus_folder(config) / name)
        corpus._open.cache_clear()
        assert open_corpus(config).meta == meta
        assert "damaged" in capsys.readouterr().err


BUILD = """
import sys, time
from pathlib import Path
from beyond_outliers import paths
from beyond_outliers.config import CorpusConfig
from beyond_outliers.corpus import open_corpus, tokens
source, paths.CACHE = sys.argv[1], Path(sys.argv[2])
before = tokens._build
def build(*arguments):
    with (paths.CACHE / "builds").open("a") as file:
        file.write("x")
    time.sleep(2)
    return before(*arguments)
tokens._build = build
print(open_corpus(CorpusConfig(source=source, vocab_size=270, validation_share=0.1)).meta["train"]["sha256"])
"""


def test_processes_that_need_a_corpus_at_once_build_it_once(own):
    write_rows(own / "rows.jsonl", prose(200))
    command = [sys.executable, "-c", BUILD, str(own / "rows.jsonl"), str(own)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate(timeout=120)[0] for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(printed) == 1 and len(printed.pop()) == 65
    assert (own / "builds").read_text() == "x"


def test_other_settings_give_another_folder(built, corpus_config, text_file):
    assert corpus_folder(replace(corpus_config, vocab_size=300)) != built.folder
    before = corpus_folder(corpus_config)
    original = text_file.read_text()
    text_file.write_text(original + json.dumps({"text": "a new document", "group": "new"}) + "\n")
    assert corpus_folder(corpus_config) != before
    text_file.write_text(original)
    assert corpus_folder(corpus_config) == before


# ------------------------------------------------------------------------------------------------------------- batches


def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(5000, dtype=np.uint16)
    one, two = Batches(tokens, 16, 8, seed=3), Batches(tokens, 16, 8, seed=3)
    for step in (90, 4, 39, 40):  # in any order, across epochs
        assert (one(step)[0] == two(step)[0]).all()
    assert (Batches(tokens, 16, 8, seed=4)(0)[0] != one(0)[0]).any()
    ids, targets = one(7)
    assert ids.shape == targets.shape == (8, 16) and ids.dtype == np.int64
    assert (targets == ids + 1).all()  # the tokens count upwards


@pytest.mark.parametrize("world", [2, 4, 8])
def test_workers_share_the_global_batch(world):
    batches = Batches(np.arange(5000, dtype=np.uint16), 16, 8, seed=0)
    for step in (0, 38, 77):
        parts = [batches(step, rank, world)[0] for rank in range(world)]
        assert (np.concatenate(parts) == batches(step)[0]).all()


def test_an_epoch_visits_every_window_once():
    batches = Batches(np.arange(5000, dtype=np.uint16), 16, 1, seed=0)
    starts = [batches(step)[0][0, 0] for step in range(batches.windows)]
    assert len(set(starts)) == batches.windows
    assert len({start % 16 for start in starts}) == 1  # one offset an epoch
    second = [batches(step)[0][0, 0] for step in range(batches.windows, 2 * batches.windows)]
    assert sorted(second) != second and second != starts


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="too few"):
        Batches(np.zeros(20, np.uint16), 16, 1, seed=0)
    with pytest.raises(ValueError, match="3 workers"):
        Batches(np.zeros(500, np.uint16), 16, 8, seed=0)(0, 0, 3)
