"""Documents -> split -> BPE tokenizer -> memory-mapped uint16 tokens.

`open_corpus(config)` returns the tokens of a `CorpusConfig`, building them first if they are not in data/cache. A build
streams: its memory does not grow with the corpus (see `_build`). It goes to a temporary folder and is renamed into
place when complete, so that an interrupted one leaves nothing behind.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from beyond_outliers import checksums, paths
from beyond_outliers.config.run import CorpusConfig
from beyond_outliers.corpus.bpe import bytes_per_token, sample, train_tokenizer
from beyond_outliers.corpus.encoding import TextEncoder
from beyond_outliers.corpus.sources import READERS, documents, text_files
from beyond_outliers.corpus.store import split
from beyond_outliers.corpus.wheels import pinned_sources
from beyond_outliers.lock import held

BUILDERS = {"embedded": 1, "other": 4}  # raise when the same settings would give other tokens
CHECKSUM_UP_TO = 2**32  # bytes; larger token files are checked by size only when opened, `make verify` reads them
CHUNK = 2**20  # characters that are tokenized at a time


def write_tokens(path: Path, tokenizer: Tokenizer, texts: Iterable[str]) -> dict:
    """Writes boundary + tokens of every text as uint16; returns counts and the checksum."""
    encoder, checksum = TextEncoder(tokenizer), hashlib.sha256()
    n_tokens = n_bytes = n_documents = 0
    bar = tqdm(texts, desc=f"tokens {path.stem}", unit=" texts", leave=False, disable=None)
    with path.open("wb") as file:
        for chunk in _chunks(bar):
            ids = list(itertools.chain.from_iterable([0, *line] for line in encoder(chunk)))
            raw = np.asarray(ids, dtype="<u2").tobytes()
            file.write(raw)
            checksum.update(raw)
            n_tokens += len(ids)
            n_bytes += sum(len(text.encode()) for text in chunk)
            n_documents += len(chunk)
    return {"tokens": n_tokens, "bytes": n_bytes, "documents": n_documents, "sha256": checksum.hexdigest()}


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about CHUNK characters, or of one text that has more."""
    chunk, room = [], CHUNK
    for text in texts:
        chunk.append(text)
        room -= len(text)
        if room <= 0:
            yield chunk
            chunk, room = [], CHUNK
    if chunk:
        yield chunk


class Heldout(Sequence):
    """Documents of a token file as text, decoded one at a time when they are asked for."""

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer):
        self._tokens, self._tokenizer = tokens, tokenizer
        step = 2**24  # a comparison with the whole file would be held in memory
        parts = [i + np.flatnonzero(tokens[i : i + step] == 0) for i in range(0, len(tokens), step)]
        starts = np.concatenate([*parts, [len(tokens)]])
        self._first, self._end = starts[:-1] + 1, starts[1:]

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, index):
        return self._tokenizer.decode(self._tokens[self._first[index] : self._end[index]].tolist())


@dataclass(frozen=True)
class Corpus:
    """Tokens of one corpus. `train` and `validation` are 1-D uint16 memory maps."""

    folder: Path
    meta: dict

    @cached_property
    def train(self) -> np.ndarray:
        return np.memmap(self.folder / "train.bin", dtype="<u2", mode="r")

    @cached_property
    def validation(self) -> np.ndarray:
        return np.memmap(self.folder / "validation.bin", dtype="<u2", mode="r")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.encode_special_tokens = True  # as in training; the file does not keep it
        return tokenizer

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return bytes_per_token(self.tokenizer)

    @cached_property
    def heldout(self) -> Heldout:
        """The validation documents as a sequence of texts, none of them in memory."""
        return Heldout(self.validation, self.tokenizer)


# ------------------------------------------------------------------------------------------------- opening, building


def _fingerprint(config: CorpusConfig) -> dict:
    """Everything that decides the tokens: the settings and the pins (or contents) of what they point at."""
    if config.source == "embedded":
        contents = {wheel: pinned_sources()[wheel]["sha256"] for wheel in config.wheels if wheel in READERS}
    elif config.source == "climbmix":
        contents = pinned_sources()["climbmix"]
    else:
        files, _ = text_files(Path(config.source))
        contents = {str(f): checksums.sha256(f) for f in files if f.exists()}
    builder = BUILDERS.get(config.source, BUILDERS["other"])
    return {"config": asdict(config), "contents": contents, "builder": builder}


def corpus_folder(config: CorpusConfig) -> Path:
    """Where the tokens of these settings are, or will be: other settings, another folder."""
    key = hashlib.sha256(json.dumps(_fingerprint(config), sort_keys=True).encode()).hexdigest()[:10]
    source = config.source if config.source in ("embedded", "climbmix") else Path(config.source).stem
    return paths.CACHE / "corpus" / f"{source}-{config.vocab_size}-{key}"


FILES = ("meta.json", "tokenizer.json", "train.bin", "validation.bin")


def open_corpus(config: CorpusConfig, context: int | None = None) -> Corpus:
    """The tokens of `config`, built if they are not there; damaged ones are built again.

    Looked at once a process. Of several processes that need a corpus at the same time (the workers of torchrun, for
    instance), one builds it while the others wait for a lock.
    `context`: the tokens of a window that each side is needed for; ValueError if one is too short for it. A corpus
    that is found too short while it is built is not kept.
    """
    return _open(config, context, paths.CACHE)


@cache
def _open(config: CorpusConfig, context: int | None, _: Path) -> Corpus:
    folder = corpus_folder(config)
    corpus = _whole(folder)
    if corpus is None:
        with held(folder.parent / f".{folder.name}.lock"):
            corpus = _whole(folder)  # built meanwhile by the process that held the lock
            if corpus is None:
                if folder.exists():
                    print(f"{folder} is damaged; building it again", file=sys.stderr)
                    shutil.rmtree(folder)
                _build(config, folder, context)
                corpus = _whole(folder)
                assert corpus is not None, "what has just been written is whole"
    _require_windows(corpus.meta, context)
    return corpus


def _whole(folder: Path) -> Corpus | None:
    """The corpus in `folder`, None where it is not there, or not what was written."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, checksums.DamagedFile):
        sizes = {name: (folder / name).stat().st_size for name in FILES}
        checksums.check(folder, *(name for name, size in sizes.items() if size <= CHECKSUM_UP_TO))
        corpus = Corpus(folder, json.loads((folder / "meta.json").read_text()))
        if all(sizes[f"{part}.bin"] == 2 * corpus.meta[part]["tokens"] for part in ("train", "validation")):
            return corpus
    return None


def _require_windows(meta: dict, context: int | None) -> None:
    if meta["validation"]["tokens"] == 0:
        raise ValueError(
            "no text is left for validation: all that its groups hold is also in training, or in no group; "
            "take more text, other groups, or a larger validation_share"
        )
    if context is None:
        return
    for side, least in {"train": 2 * context + 1, "validation": context + 1}.items():
        if meta[side]["tokens"] < least:
            raise ValueError(
                f"the {side} side has {meta[side]['tokens']} tokens, windows of {context} need at least {least}: take "
                "more text, another validation_share, or a shorter context"
            )


def _build(config: CorpusConfig, folder: Path, context: int | None = None) -> None:
    """Builds the corpus in a folder beside `folder` and moves it there when it is whole; the caller holds the lock.

    Memory, whatever the size of the corpus: the index of `split` (32 MB), the tokenizer's training on a sample of
    about SAMPLE bytes, CHUNK characters and their tokens, and a few times the largest document.
    """
    temporary = folder.parent / f".building-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed
    (temporary / "store").mkdir(parents=True)
    try:
        skipped: Counter[str] = Counter()
        pairs = tqdm(documents(config, skipped), desc="documents", unit=" texts", leave=False, disable=None)
        with split(pairs, config.validation_share, temporary / "store") as (train, validation):
            tokenizer = train_tokenizer(sample(train), config.vocab_size)
            if tokenizer.get_vocab_size() != config.vocab_size:
                raise ValueError(
                    f"the corpus gives a vocabulary of {tokenizer.get_vocab_size()}, not {config.vocab_size}: "
                    "take more text or a smaller vocab_size"
                )
            tokenizer.save(str(temporary / "tokenizer.json"))
            meta = _fingerprint(config) | {
                "train": write_tokens(temporary / "train.bin", tokenizer, train),
                "validation": write_tokens(temporary / "validation.bin", tokenizer, validation),
            }
        _require_windows(meta, context)
        if skipped:
            meta["skipped"] = dict(skipped)
            warnings.warn(f"{skipped.total()} rows without text were skipped: {dict(skipped)}", stacklevel=3)
        shutil.rmtree(temporary / "store")
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        checksums.seal(temporary)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
