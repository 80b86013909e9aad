"""Text to tokens to batches."""

from beyond_outliers.corpus.batches import Batches
from beyond_outliers.corpus.sources import READERS, SHORTEST, climbmix, documents, local_text, plain, uniform
from beyond_outliers.corpus.tokens import (
    BOUNDARY,
    BUILDER,
    Corpus,
    bytes_per_token,
    corpus_folder,
    heldout_documents,
    open_corpus,
    split,
    train_tokenizer,
    write_tokens,
)
from beyond_outliers.corpus.wheels import fetch_source, sources

__all__ = [
    "BOUNDARY",
    "BUILDER",
    "READERS",
    "SHORTEST",
    "Batches",
    "Corpus",
    "bytes_per_token",
    "climbmix",
    "corpus_folder",
    "documents",
    "fetch_source",
    "heldout_documents",
    "local_text",
    "open_corpus",
    "plain",
    "sources",
    "split",
    "train_tokenizer",
    "uniform",
    "write_tokens",
]
