"""Where text comes from: the embedded corpus, ClimbMix, local files -> (group, text) documents."""

import gzip
import hashlib
import html
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from beyond_outliers.config.run import CorpusConfig
from beyond_outliers.corpus.wheels import fetch_source, sources

SHORTEST = 20  # characters; shorter documentation strings are labels, not prose


# -------------------------------------------------------------------------------------------------------- documents


_TAG = re.compile(r"<[^<>]*>")
_LINK = re.compile(r"\[([^\[\]]*)\]\([^()]*\)")
_SPACE = re.compile(r"\s+")


def plain(text: str) -> str:
    """Prose without HTML tags, entities, Markdown links and backticks, white space folded."""
    text = _LINK.sub(r"\1", html.unescape(_TAG.sub(" ", text))).replace("`", "")
    return _SPACE.sub(" ", text).replace(" .", ".").replace(" ,", ",").strip()


def _strings(node, keys: frozenset[str]) -> Iterator[str]:
    """Every string under one of `keys` anywhere in a parsed JSON document, in file order."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in keys and isinstance(value, str):
                yield value
            elif key in keys and isinstance(value, list):
                yield from (item for item in value if isinstance(item, str))
            else:
                yield from _strings(value, keys)
    elif isinstance(node, list):
        for item in node:
            yield from _strings(item, keys)


def _botocore(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    for name in sorted(n for n in archive.namelist() if n.endswith("/service-2.json.gz")):
        service = name.split("/")[2]  # botocore/data/SERVICE/VERSION/service-2.json.gz
        for text in _strings(json.loads(gzip.decompress(archive.read(name))), frozenset({"documentation"})):
            yield f"botocore/{service}", text


def _google(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    keys = frozenset({"description", "enumDescriptions"})
    for name in sorted(n for n in archive.namelist() if "discovery_cache/documents/" in n and n.endswith(".json")):
        service = Path(name).name.split(".")[0]  # documents/SERVICE.VERSION.json: versions belong together
        for text in _strings(json.loads(archive.read(name)), keys):
            yield f"google/{service}", text


READERS = {"botocore": _botocore, "google-api-python-client": _google}


def _embedded(wheels: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for wheel in wheels:
        if wheel not in READERS:
            raise ValueError(f"unknown corpus wheel {wheel!r}; valid: {sorted(READERS)}")
        with zipfile.ZipFile(fetch_source(wheel)) as archive:
            for group, text in READERS[wheel](archive):
                text = plain(text)
                if len(text) >= SHORTEST:
                    yield group, text


def climbmix(repository: str | None = None, *, tokenizer: Tokenizer | None = None) -> Iterator[tuple[str, str]]:
    """Documents of ClimbMix, streamed: each row's GPT-2 ids (column `tokens`) turned back into text.

    `repository`: None for the pinned revision on the hub; a local folder of the same jsonl files otherwise.
    """
    from datasets import load_dataset

    pin = sources()["climbmix"]
    if repository is None:
        rows = load_dataset(
            pin["repository"], data_files=pin["files"], revision=pin["revision"], split="train", streaming=True
        )
    else:
        rows = load_dataset("json", data_files=str(Path(repository) / pin["files"]), split="train", streaming=True)
    tokenizer = tokenizer or Tokenizer.from_pretrained(pin["tokenizer"], revision=pin["tokenizer_revision"])
    for number, row in enumerate(rows):
        yield f"row {number}", tokenizer.decode(row["tokens"])


def local_text(path: Path) -> Iterator[tuple[str, str]]:
    """Documents of .txt (one a file's paragraph), .jsonl or .parquet files (column `text`), or of a folder of them.

    An optional column `group` says what belongs together, for the validation split; without it every document is
    its own group.
    """
    from datasets import load_dataset

    kinds = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
    if not path.exists():
        raise FileNotFoundError(f"no such corpus file or folder: {path}")
    files = sorted(f for f in path.rglob("*") if f.suffix in kinds) if path.is_dir() else [path]
    if not files or any(f.suffix not in kinds for f in files):
        raise ValueError(f"{path} holds no file of a known kind; valid: {sorted(kinds)}")
    for file in files:
        options = {"sample_by": "paragraph"} if file.suffix == ".txt" else {}
        rows = load_dataset(kinds[file.suffix], data_files=str(file), split="train", streaming=True, **options)
        for number, row in enumerate(rows):
            if "text" not in row:
                raise ValueError(f"{file} has the columns {sorted(row)}, none of them called text")
            yield str(row.get("group", f"{file.name}:{number}")), row["text"]


def documents(config: CorpusConfig) -> Iterator[tuple[str, str]]:
    """(group, text) pairs of a corpus, in a fixed order, at most `limit_mb` megabytes of them.

    With a limit, the embedded corpus is thinned evenly over its services rather than cut off: a fixed share of the
    documents, picked by a hash of their text, so that the split by service still has services to split.
    """
    if config.source == "embedded":
        stream = _embedded(config.wheels)
        if config.limit_mb is not None:
            share = config.limit_mb / 99  # the two wheels hold 99 MB of prose, duplicates included
            stream = (pair for pair in stream if uniform(pair[1]) < share)
    elif config.source == "climbmix":
        stream = climbmix()
    else:
        stream = local_text(Path(config.source))
    room = float("inf") if config.limit_mb is None else config.limit_mb * 1e6
    for group, text in stream:
        room -= len(text.encode())
        if room < 0:
            return
        yield group, text


def uniform(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, the same on every platform."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
