"""Any tokenizer as a plain function from text to ids: nothing padded, cut, added, or read as a special token.

tokenizer.json stores padding and truncation, and most tokenizers turn the letters "<|endoftext|>" inside a text into
the special token. Neither may enter a token file, a score, or a window of `probe`.
"""

import copy
import json
import warnings
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

UNKNOWN_SHARE = 0.05  # above this share of unknown tokens, a text is not one for this tokenizer


class TextEncoder:
    """`encoder(texts)` -> their ids, each text whole and by itself, a special token's name in it read as letters.

    tokenizer: of `tokenizers` (`Tokenizer`, or a ready-made one such as `ByteLevelBPETokenizer`), or of `transformers`,
    fast or slow. It stays as it is: settings are changed on a copy. Where a special token is a word of the model's own
    vocabulary (Unigram, whole words), its name in a text becomes that token all the same: a warning says so.
    Raises ValueError for anything else, and for a tokenizer with parts in Python (which cannot be copied) that has
    padding, truncation or special tokens to be switched off.
    """

    def __init__(self, tokenizer):
        self._slow = None
        backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "_tokenizer", None)
        if isinstance(backend, Tokenizer):
            self._fast = _plain_copy(backend)
            self.unknown = _unknown_id(backend)
            special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        elif hasattr(tokenizer, "encode") and hasattr(tokenizer, "all_special_tokens"):
            self._slow = tokenizer  # all settings are arguments of its calls
            self.unknown = tokenizer.unk_token_id
            special = set(tokenizer.all_special_ids)
        else:
            raise ValueError(
                f"a {type(tokenizer).__name__} is no tokenizer that can be used here; valid: those of the libraries "
                "tokenizers and transformers"
            )
        self._special = special - {self.unknown}

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if self._slow is None:
            encoded = [line.ids for line in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]
        else:
            encoded = [self._encode_slowly(text) for text in texts]
        if not all(map(self._special.isdisjoint, encoded)):
            found = next(i for ids in encoded for i in ids if i in self._special)
            warnings.warn(
                f"a text holds the name of the special token {found}, and the tokenizer's own vocabulary reads it as "
                "that token",
                stacklevel=3,
            )
        return encoded

    def _encode_slowly(self, text: str, add_special_tokens: bool = False) -> list[int]:
        assert self._slow is not None  # its callers have one
        # a slow tokenizer that is told to split special tokens also splits added words: only where there is one
        split = {"split_special_tokens": True} if any(t in text for t in self._slow.all_special_tokens) else {}
        return self._slow.encode(
            text, add_special_tokens=add_special_tokens, padding=False, truncation=False, verbose=False, **split
        )

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None where the vocabulary does not have it."""
        if self._slow is None:
            return self._fast.token_to_id(token)
        return self._slow.get_vocab().get(token)

    def frame(self, text: str) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text ([CLS], <s>, ...).

        Seen on the first 100 characters that are not nothing to the tokenizer (whose normaliser may remove some).
        ValueError where all of the text is.
        """
        text = text.strip()
        parts = (text[start : start + 100] for start in range(0, len(text), 100))
        text = next((part for part in parts if any(self([part]))), "")
        if not text:
            raise ValueError("the tokenizer reads nothing in the text: its special tokens cannot be told from text")
        if self._slow is None:
            framed = self._fast.encode(text, add_special_tokens=True).ids
        else:
            framed = self._encode_slowly(text, add_special_tokens=True)
        (bare,) = self([text])
        for first in range(len(framed) - len(bare) + 1):
            if framed[first : first + len(bare)] == bare:
                return framed[:first], framed[first + len(bare) :]
        raise ValueError(f"the tokenizer encodes {text!r} to other ids when it adds its special tokens")

    def warn_of_unknown(self, encoded: Iterable[Sequence[int]], what: str) -> None:
        """Warns with the share, when more than 5 % of the ids are the unknown token."""
        if self.unknown is None:
            return
        counts = [(sum(i == self.unknown for i in ids), len(ids)) for ids in encoded]
        unknown, total = sum(n for n, _ in counts), sum(n for _, n in counts)
        if unknown > UNKNOWN_SHARE * total:
            warnings.warn(
                f"{unknown / total:.0%} of the tokens of {what} are the unknown token (id {self.unknown}): the "
                "tokenizer was made for other text",
                stacklevel=3,
            )


def _plain_copy(tokenizer: Tokenizer) -> Tokenizer:
    """A copy without padding and truncation that reads special tokens in a text as letters."""
    try:
        plain = copy.deepcopy(tokenizer)
    except Exception as error:  # the library raises no narrower type
        stored = tokenizer.padding or tokenizer.truncation
        if stored or (tokenizer.get_added_tokens_decoder() and not tokenizer.encode_special_tokens):
            raise ValueError(
                f"a tokenizer that cannot be copied ({error}) needs its settings switched off by hand: "
                "no_padding(), no_truncation(), encode_special_tokens = True"
            ) from error
        return tokenizer
    plain.no_padding()
    plain.no_truncation()
    plain.encode_special_tokens = True
    return plain


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    if hasattr(tokenizer.model, "unk_token"):  # BPE, WordPiece, WordLevel
        token = tokenizer.model.unk_token
        return None if token is None else tokenizer.token_to_id(token)
    return json.loads(tokenizer.to_str())["model"].get("unk_id")  # Unigram
