"""Corpus: split, tokens, batches."""

import hashlib
import json

import numpy as np
import pytest

from beyond_outliers.corpus import BOUNDARY, Batches, bytes_per_token, corpus_folder, documents, open_corpus, split
from beyond_outliers.corpus import tokens as corpus


@pytest.fixture(scope="module")
def built(corpus_config):
    return open_corpus(corpus_config)


def test_the_split_is_by_group_and_drops_duplicates_across_it():
    pairs = [(f"g{i}", f"text {i} number {j}") for i in range(50) for j in range(4)]
    pairs += [(f"g{i}", "the same sentence everywhere") for i in range(50)]
    train, validation = split(pairs, 0.1)
    assert "the same sentence everywhere" in train and "the same sentence everywhere" not in validation
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 201
    groups = [{text.split()[1] for text in part if text.startswith("text")} for part in (train, validation)]
    assert not groups[0] & groups[1]
    assert 3 <= len(groups[1]) <= 7
    assert split(reversed(pairs), 0.1)[1] != [] and set(split(reversed(pairs), 0.1)[1]) == set(validation)


def test_a_corpus_of_one_group_cannot_be_split():
    with pytest.raises(ValueError, match="at least two groups"):
        split([("only", "a"), ("only", "b")], 0.1)


def test_tokens_decode_to_the_documents(built, corpus_config):
    train, validation = split(documents(corpus_config), corpus_config.validation_share)
    assert built.heldout_documents() == validation
    assert int((built.train == 0).sum()) == len(train)
    assert built.train.dtype == np.uint16
    assert built.tokenizer.token_to_id(BOUNDARY) == 0


def test_bytes_per_token_count_the_bytes_of_the_text(built):
    text = "naïve ☃ prose, plain prose"
    ids = built.tokenizer.encode(text).ids
    assert built.token_bytes[ids].sum() == len(text.encode())
    assert bytes_per_token(built.tokenizer)[0] == 0
    assert built.token_bytes[np.asarray(built.validation)].sum() == built.meta["validation"]["bytes"]


def test_opening_again_builds_nothing(built, corpus_config, monkeypatch):
    monkeypatch.setattr(corpus, "_build", lambda *_: pytest.fail("built again"))
    assert open_corpus(corpus_config).meta == built.meta


def test_other_settings_give_another_folder(built, corpus_config, text_file):
    from dataclasses import replace

    assert corpus_folder(replace(corpus_config, vocab_size=300)) != built.folder
    before = corpus_folder(corpus_config)
    original = text_file.read_text()
    text_file.write_text(original + json.dumps({"text": "a new document", "group": "new"}) + "\n")
    assert corpus_folder(corpus_config) != before
    text_file.write_text(original)
    assert corpus_folder(corpus_config) == before


def test_damaged_tokens_are_built_again(built, corpus_config, capsys):
    path = built.folder / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    again = open_corpus(corpus_config)
    assert "damaged" in capsys.readouterr().err
    assert (
        hashlib.sha256(path.read_bytes()).hexdigest() == again.meta["train"]["sha256"] == built.meta["train"]["sha256"]
    )


def test_an_interrupted_build_leaves_nothing(corpus_config, monkeypatch):
    from dataclasses import replace

    config = replace(corpus_config, vocab_size=290)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus, "write_tokens", interrupted)
        open_corpus(config)
    assert not corpus_folder(config).exists()
    assert not list(corpus_folder(config).parent.glob(".building-*"))


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
