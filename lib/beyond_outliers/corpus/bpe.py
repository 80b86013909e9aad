"""The corpus's own tokenizer: byte-level BPE, trained on the training texts."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from beyond_outliers.corpus.store import Texts

BOUNDARY = "<|endoftext|>"  # token 0; stands before every document
SAMPLE = 2**26  # bytes; a tokenizer is trained on so much of a larger corpus. The embedded corpus is smaller
LONGEST_IN_SAMPLE = 2**18  # characters of one document in such a sample


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
    tokenizer.encode_special_tokens = True  # the boundary's name inside a text is text
    return tokenizer


def sample(texts: Texts, size: int = SAMPLE) -> Iterator[str]:
    """All texts, or of a corpus of more than `size` bytes the beginning of every k-th one, about so many bytes."""
    every = max(1, -(-texts.bytes // size))
    return (text if every == 1 else text[:LONGEST_IN_SAMPLE] for text in itertools.islice(texts, 0, None, every))


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) int64: the UTF-8 bytes that each token stands for; 0 for the boundary."""
    # the byte-level alphabet writes every byte as one printable character, so characters count bytes
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in vocabulary.items():
        lengths[index] = 0 if token == BOUNDARY else len(token)
    return lengths
