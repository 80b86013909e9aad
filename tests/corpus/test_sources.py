"""Sources: pinned wheels, markup, ClimbMix, local files."""

import json

import pytest
from tokenizers import Tokenizer

from beyond_outliers import paths
from beyond_outliers.config import CorpusConfig
from beyond_outliers.corpus import SHORTEST, climbmix, documents, fetch_source, local_text, open_corpus, plain, sources


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("<p>Adds an <i>object</i> to a bucket.</p>", "Adds an object to a bucket."),
        ("Fish &amp; chips &lt;3", "Fish & chips <3"),
        ("See [the guide](https://example.org/x) or `Foo`.", "See the guide or Foo."),
        ("a\n\n  b\tc", "a b c"),
    ],
)
def test_markup_is_stripped(raw, text):
    assert plain(raw) == text


def test_an_unknown_source_is_refused():
    with pytest.raises(KeyError, match="botocore"):
        fetch_source("bootcore")


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    file = tmp_path / "wheels" / sources()["botocore"]["file"]
    file.parent.mkdir()
    file.write_bytes(b"not the wheel")
    with pytest.raises(RuntimeError, match="Delete the file"):
        fetch_source("botocore")


def test_a_wheel_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"put the file botocore-.*\.whl into"):
        fetch_source("botocore")


def test_climbmix_rows_of_token_ids_become_text(tmp_path, corpus_config):
    """A local folder of the same shape as the hub's: jsonl rows with GPT-2 ids in `tokens` (here: our tokenizer's)."""
    tokenizer = open_corpus(corpus_config).tokenizer
    texts = ["lar sel tin", "ban dor kest fin"]
    rows = [{"tokens": tokenizer.encode(t).ids, "token_count": 3, "cluster_id": 7} for t in texts]
    (tmp_path / "part_0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(climbmix(tmp_path, tokenizer=Tokenizer.from_str(tokenizer.to_str())))
    assert [text for _, text in found] == texts
    assert len({group for group, _ in found}) == 2


def test_local_text_jsonl_and_parquet_give_the_same_documents(tmp_path):
    import pandas as pd

    texts = ["first document of three", "second document", "third one"]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "a.parquet")
    for kind in ("txt", "jsonl", "parquet"):
        assert [t.strip() for _, t in local_text(tmp_path / f"a.{kind}")] == texts
    assert len(list(local_text(tmp_path))) == 9


def test_local_text_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        list(local_text(tmp_path / "missing"))
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"\.jsonl"):
        list(local_text(tmp_path / "a.csv"))
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "x"}))
    with pytest.raises(ValueError, match="body"):
        list(local_text(tmp_path / "b.jsonl"))


def test_the_embedded_corpus_is_prose_without_markup():
    """A slice of the pinned wheel: every service can be held out, nothing short, no tags."""
    config = CorpusConfig(wheels=("botocore",), vocab_size=320, limit_mb=0.5)
    pairs = list(documents(config))
    assert len({group for group, _ in pairs}) > 100
    assert all(len(text) >= SHORTEST for _, text in pairs)
    assert not any("<p>" in text or "&amp;" in text for _, text in pairs)
    assert 0.2e6 < sum(len(text) for _, text in pairs) < 0.5e6
    with pytest.raises(ValueError, match="google-api-python-client"):
        list(documents(CorpusConfig(wheels=("boto",))))
