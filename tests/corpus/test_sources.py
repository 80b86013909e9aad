"""Sources: pinned wheels, markup, ClimbMix, local files."""

import gzip
import json
from collections import Counter
from types import SimpleNamespace

import pytest

from beyond_outliers import paths
from beyond_outliers.config import CorpusConfig
from beyond_outliers.corpus import (
    SHORTEST,
    climbmix,
    corpus_folder,
    documents,
    fetch_source,
    local_text,
    open_corpus,
    pinned_sources,
    plain,
    sources,
)


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
    with pytest.raises(ValueError, match="did you mean botocore"):
        fetch_source("bootcore")


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    file = tmp_path / "wheels" / pinned_sources()["botocore"]["file"]
    file.parent.mkdir()
    file.write_bytes(b"not the wheel")
    with pytest.raises(RuntimeError, match="Delete the file"):
        fetch_source("botocore")


def test_climbmix_rows_of_token_ids_become_text(monkeypatch, corpus_config):
    """Rows as the hub streams them, with GPT-2 ids in `tokens` (here: of our tokenizer)."""
    tokenizer = open_corpus(corpus_config).tokenizer
    texts = ["lar sel tin", "ban dor kest fin"]
    rows = [{"tokens": tokenizer.encode(t).ids, "token_count": 3, "cluster_id": 7} for t in texts]
    rows += [{"tokens": None}, {"tokens": []}]
    monkeypatch.setattr("datasets.load_dataset", lambda repository, *, revision, **_: rows)
    monkeypatch.setattr(sources, "Tokenizer", SimpleNamespace(from_pretrained=lambda name, revision: tokenizer))
    skipped = Counter()
    found = list(climbmix(skipped))
    assert [text for _, text in found] == texts and skipped.total() == 2
    assert len({group for group, _ in found}) == 2
    rows.append({"text": "no ids"})
    with pytest.raises(ValueError, match=r"row 5 has the columns \['text'\], none of them called tokens"):
        list(climbmix())


def test_local_text_jsonl_and_parquet_give_the_same_documents(tmp_path):
    import pandas as pd

    texts = ["first document of three", "second document", "third one"]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "a.parquet")
    for kind in ("txt", "jsonl", "parquet"):
        assert [t.strip() for _, t in local_text(tmp_path / f"a.{kind}")] == texts
    assert len(list(local_text(tmp_path))) == 9


def write(path, rows):
    """Rows of {"text": ..., "group": ...} as .jsonl or .parquet."""
    import pandas as pd

    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_without_text_are_skipped_and_counted(tmp_path, kind):
    texts = ["one", None, "two", "", None, "three"]
    file = write(tmp_path / f"some.{kind}", [{"text": t} for t in texts])
    skipped = Counter()
    assert [text for _, text in local_text(file, skipped)] == ["one", "two", "three"]
    assert skipped == {str(file): 3}
    assert len(list(local_text(file))) == 3


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_document_without_group_is_a_group_of_its_own(tmp_path, kind):
    groups = ["a", None, "a", None, "b"]
    file = write(tmp_path / f"some.{kind}", [{"text": f"t{i}", "group": g} for i, g in enumerate(groups)])
    found = [group for group, _ in local_text(file)]
    assert found[0] == found[2] == "a" and found[4] == "b" and len(set(found)) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": 7}], r"row 2 has a int for a text: '7'"),
        ([{"text": "a"}, {"text": "b"}, {"text": ["c"]}], r"row 3 has a list for a text"),
        ([{"text": {"en": "a"}}], r"row 1 has a dict for a text"),
        ([{"text": "a"}, {"text": "b \ud800 c"}], r"row 2 has a text that UTF-8 cannot write"),
        ([{"text": "a"}, {"body": "b"}], r"row 2 has the columns \['body'\], none of them called text"),
        ([{"text": "a"}, ["b"]], r"row 2 is no JSON object but a list"),
    ],
)
def test_a_row_that_is_no_document_is_named(tmp_path, rows, message):
    file = write(tmp_path / "odd.jsonl", rows)
    with pytest.raises(ValueError, match=r"odd\.jsonl, " + message):
        list(local_text(file))


def test_a_parquet_column_that_is_no_text_is_named(tmp_path):
    for number, values in enumerate(([1, 2], [b"a", b"b"], [1.5, None])):
        file = write(tmp_path / f"odd{number}.parquet", [{"text": v} for v in values])
        with pytest.raises(ValueError, match=rf"odd{number}\.parquet, row 1 has a (int|bytes|float) for a text"):
            list(local_text(file))


def test_files_that_are_no_text_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        list(local_text(tmp_path / "latin.txt"))
    with pytest.raises(FileNotFoundError, match="missing"):
        list(local_text(tmp_path / "missing"))
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"\.jsonl"):
        list(local_text(tmp_path / "a.csv"))
    (tmp_path / "cut.jsonl").write_text('{"text": "whole"}\n\n{"text": "cut')
    with pytest.raises(ValueError, match=r"cut\.jsonl, row 2 is no JSON"):
        list(local_text(tmp_path / "cut.jsonl"))


def test_line_ends_marks_and_blank_lines_do_not_matter(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \t\r\nthree\r\n")
    assert [text for _, text in local_text(tmp_path / "dos.txt")] == ["one\ntwo", "three"]
    (tmp_path / "dos.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert [text for _, text in local_text(tmp_path / "dos.jsonl")] == ["one", "two"]
    (tmp_path / "LOUD.TXT").write_text("three")
    assert len(list(local_text(tmp_path))) == 2 + 2 + 1


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


def folder_of(root, files):
    """Files below a folder, each a jsonl line that holds its own name, or the given bytes."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = (json.dumps({"text": f"text of {name}"}) + "\n").encode()
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)


def names_read(path):
    return [text.removeprefix("text of ") for _, text in local_text(path)]


@pytest.mark.filterwarnings("error")
def test_a_folder_is_read_through_links_and_without_what_is_hidden(tmp_path):
    root, elsewhere = tmp_path / "corpus", tmp_path / "disk2"
    folder_of(root, ["a.jsonl", "deep/b.JSONL", "c.jsonl.gz", ".ipynb_checkpoints/a.jsonl", ".d.jsonl"])
    folder_of(elsewhere, ["e.jsonl", "below/f.jsonl"])
    (root / "more").symlink_to(elsewhere)
    (root / "g.jsonl").symlink_to(elsewhere / "e.jsonl")
    (elsewhere / "round").symlink_to(root)  # a walk that follows it would never end
    assert sorted(names_read(root)) == sorted(
        ["a.jsonl", "deep/b.JSONL", "c.jsonl.gz", "e.jsonl", "e.jsonl", "below/f.jsonl"]
    )
    # only what lies below is hidden: the corpus itself may be in a hidden folder
    folder_of(tmp_path / ".cache" / "text", ["a.jsonl"])
    assert names_read(tmp_path / ".cache" / "text") == ["a.jsonl"]


def test_files_that_are_not_read_are_named(tmp_path):
    folder_of(tmp_path, ["a.jsonl", "b.json", "more/c.csv.gz"])
    with pytest.warns(UserWarning, match=r"2 files are not read \(b\.json, more/c\.csv\.gz\); valid: .*jsonl"):
        assert names_read(tmp_path) == ["a.jsonl"]
    whole = gzip.compress(b"{}" * 1000)
    for damaged in (b"no gzip", whole[:-9], whole[:12] + b"????" + whole[16:]):
        (tmp_path / "d.jsonl.gz").write_bytes(damaged)
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"d\.jsonl\.gz is no whole gzip"):
            names_read(tmp_path)


def test_what_is_not_read_does_not_decide_which_corpus_it_is(tmp_path):
    folder_of(tmp_path, ["a.jsonl"])
    config = CorpusConfig(source=str(tmp_path), vocab_size=300)
    before = corpus_folder(config)
    folder_of(tmp_path, [".ipynb_checkpoints/a.jsonl"])
    assert corpus_folder(config) == before
    folder_of(tmp_path, ["b.jsonl.gz"])
    assert corpus_folder(config) != before
