"""Text to tokens to batches."""

from beyond_outliers.corpus.batches import Batches
from beyond_outliers.corpus.bpe import BOUNDARY, bytes_per_token, sample, train_tokenizer
from beyond_outliers.corpus.encoding import TextEncoder
from beyond_outliers.corpus.sources import READERS, SHORTEST, climbmix, documents, local_text, plain, uniform
from beyond_outliers.corpus.store import Store, Texts, split
from beyond_outliers.corpus.tokens import (
    BUILDERS,
    Corpus,
    Heldout,
    corpus_folder,
    heldout_documents,
    open_corpus,
    write_tokens,
)
from beyond_outliers.corpus.wheels import fetch_source, pinned_sources

__all__ = [
    "BOUNDARY",
    "BUILDERS",
    "READERS",
    "SHORTEST",
    "Batches",
    "Corpus",
    "Heldout",
    "Store",
    "TextEncoder",
    "Texts",
    "bytes_per_token",
    "climbmix",
    "corpus_folder",
    "documents",
    "fetch_source",
    "heldout_documents",
    "local_text",
    "open_corpus",
    "pinned_sources",
    "plain",
    "sample",
    "split",
    "train_tokenizer",
    "uniform",
    "write_tokens",
]
