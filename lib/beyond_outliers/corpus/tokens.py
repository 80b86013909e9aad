"""Documents -> split -> BPE tokenizer -> memory-mapped uint16 tokens.

`open_corpus(config)` returns the tokens of a `CorpusConfig`, building them first if they are not in data/cache. A build
goes to a temporary folder and is renamed into place when complete, so that an interrupted one leaves nothing behind.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm

from beyond_outliers import paths
from beyond_outliers.config.run import CorpusConfig
from beyond_outliers.corpus.sources import READERS, documents, uniform
from beyond_outliers.corpus.wheels import sources

BOUNDARY = "<|endoftext|>"  # token 0; stands before every document
BUILDER = 1  # raise when the same settings would give other tokens
CHECKSUM_UP_TO = 2**28  # bytes; larger token files are checked by size only when opened


def split(pairs: Iterable[tuple[str, str]], validation_share: float) -> tuple[list[str], list[str]]:
    """(training, validation) texts, split by group; exact duplicates are dropped, also across the split.

    Groups are picked by a hash of their name until they hold `validation_share` of the characters, at least one.
    """
    groups: dict[str, dict[str, None]] = {}
    for group, text in pairs:
        groups.setdefault(group, {})[text] = None
    if len(groups) < 2:
        raise ValueError(f"a split by group needs at least two groups, this corpus has {len(groups)}")
    size = {group: sum(map(len, texts)) for group, texts in groups.items()}
    held, room = set(), validation_share * sum(size.values())
    for group in sorted(groups, key=uniform):
        if not held or size[group] <= room:
            held.add(group)
            room -= size[group]
        if room <= 0 or len(held) == len(groups) - 1:
            break
    train = dict.fromkeys(itertools.chain.from_iterable(texts for g, texts in groups.items() if g not in held))
    validation = dict.fromkeys(itertools.chain.from_iterable(texts for g, texts in groups.items() if g in held))
    return list(train), [text for text in validation if text not in train]


# ------------------------------------------------------------------------------------------------------------ tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with `vocab_size` entries: the boundary (id 0), the 256 bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOUNDARY], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) int64: the UTF-8 bytes that each token stands for; 0 for the boundary."""
    # the byte-level alphabet writes every byte as one printable character, so characters count bytes
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in vocabulary.items():
        lengths[index] = 0 if token == BOUNDARY else len(token)
    return lengths


def write_tokens(path: Path, tokenizer: Tokenizer, texts: list[str], chunk: int = 4096) -> dict:
    """Writes boundary + tokens of every text as uint16; returns counts and the checksum."""
    checksum, n_tokens = hashlib.sha256(), 0
    with path.open("wb") as file:
        for start in tqdm(range(0, len(texts), chunk), desc=f"tokens {path.stem}", leave=False, disable=None):
            encoded = tokenizer.encode_batch_fast(texts[start : start + chunk])
            ids = list(itertools.chain.from_iterable([0, *line.ids] for line in encoded))
            raw = np.asarray(ids, dtype="<u2").tobytes()
            file.write(raw)
            checksum.update(raw)
            n_tokens += len(ids)
    return {
        "tokens": n_tokens,
        "bytes": sum(len(text.encode()) for text in texts),
        "documents": len(texts),
        "sha256": checksum.hexdigest(),
    }


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
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return bytes_per_token(self.tokenizer)

    @cached_property
    def _heldout_documents(self) -> tuple[str, ...]:
        tokens = np.asarray(self.validation)
        pieces = np.split(tokens, np.flatnonzero(tokens == 0))
        return tuple(self.tokenizer.decode_batch([piece[1:].tolist() for piece in pieces if len(piece) > 1]))

    def heldout_documents(self) -> list[str]:
        """The validation documents as text, decoded once."""
        return list(self._heldout_documents)


def _fingerprint(config: CorpusConfig) -> dict:
    """Everything that decides the tokens: the settings and the pins (or contents) of what they point at."""
    if config.source == "embedded":
        contents = {wheel: sources()[wheel]["sha256"] for wheel in config.wheels if wheel in READERS}
    elif config.source == "climbmix":
        contents = sources()["climbmix"]
    else:
        path = Path(config.source)
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        contents = {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.exists()}
    return {"config": asdict(config), "contents": contents, "builder": BUILDER}


def corpus_folder(config: CorpusConfig) -> Path:
    """Where the tokens of these settings are, or will be: other settings, another folder."""
    key = hashlib.sha256(json.dumps(_fingerprint(config), sort_keys=True).encode()).hexdigest()[:10]
    source = config.source if config.source in ("embedded", "climbmix") else Path(config.source).stem
    return paths.CACHE / "corpus" / f"{source}-{config.vocab_size}-{key}"


def open_corpus(config: CorpusConfig) -> Corpus:
    """The tokens of `config`, built if they are not there; a damaged token file is built again."""
    folder = corpus_folder(config)
    if (folder / "meta.json").exists():
        corpus = Corpus(folder, json.loads((folder / "meta.json").read_text()))
        if _intact(corpus):
            return corpus
        print(f"{folder} is damaged; building it again", file=sys.stderr)
        shutil.rmtree(folder)
    return _build(config, folder)


def _intact(corpus: Corpus) -> bool:
    for part in ("train", "validation"):
        path, expected = corpus.folder / f"{part}.bin", corpus.meta[part]
        if not path.exists() or path.stat().st_size != 2 * expected["tokens"]:
            return False
        if path.stat().st_size <= CHECKSUM_UP_TO:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return False
    return (corpus.folder / "tokenizer.json").exists()


def _build(config: CorpusConfig, folder: Path) -> Corpus:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        pairs = tqdm(documents(config), desc="documents", unit=" texts", leave=False, disable=None)
        train, validation = split(pairs, config.validation_share)
        tokenizer = train_tokenizer(train, config.vocab_size)
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
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            os.replace(temporary, folder)
        except OSError:  # another process was faster; its folder is as good as this one
            if not (folder / "meta.json").exists():
                raise
        return Corpus(folder, json.loads((folder / "meta.json").read_text()))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def heldout_documents(config: CorpusConfig | None = None) -> list[str]:
    """Validation documents of a corpus, by default of the embedded one with its default settings."""
    return open_corpus(config or CorpusConfig()).heldout_documents()
