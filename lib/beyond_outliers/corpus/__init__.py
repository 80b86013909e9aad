"""Text to tokens to batches."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    batches="Batches",
    bpe="BOUNDARY bytes_per_token sample train_tokenizer",
    encoding="TextEncoder",
    sources="READERS SHORTEST climbmix documents local_text plain uniform",
    store="Texts split",
    tokens="BUILDERS Corpus Heldout corpus_folder open_corpus write_tokens",
    wheels="fetch_source pinned_sources",
)
