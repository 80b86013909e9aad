"""Every kind of tokenizer as a plain function of text, whatever is stored in it; the caller's stays as it is."""

import copy
import warnings
from functools import cache

import pytest
from tokenizers import (
    ByteLevelBPETokenizer,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from beyond_outliers.corpus import TextEncoder

tf = pytest.importorskip("transformers")

PROSE = "the quick brown fox jumps over the lazy dog and runs away from it all day long " * 20
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
TEXTS = ["the quick", "the quick brown fox jumps over the lazy dog and runs away", "dog " * 300, ""]


def once(make):
    """A new tokenizer a call, trained once: these trainers break ties at random."""
    trained = cache(lambda: make().to_str())
    return lambda: Tokenizer.from_str(trained())


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    return tokenizer


@once
def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=100, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([PROSE], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


@once
def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def fast(tokenizer, **options):
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", **options)


def ready_made():
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([PROSE], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    return tokenizer


MAKERS = {
    "byte-level BPE": byte_level,
    "WordPiece": word_pieces,
    "Unigram": unigram,
    "ready-made": ready_made,
    "fast": lambda: fast(word_pieces()),
    "slow bytes": tf.ByT5Tokenizer,
}


def backend(tokenizer):
    found = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "_tokenizer", None)
    return found if isinstance(found, Tokenizer) else None


def state(tokenizer):
    return copy.deepcopy({key: value for key, value in tokenizer.__dict__.items() if key != "tokens_trie"})


@pytest.mark.parametrize("name", MAKERS)
def test_padding_and_truncation_do_not_count_and_the_callers_tokenizer_stays(name):
    expected = TextEncoder(MAKERS[name]())(TEXTS)
    assert expected[3] == [] and len(expected[2]) >= 300 and len({len(ids) for ids in expected}) == 4
    tokenizer = MAKERS[name]()
    inner = backend(tokenizer)
    if inner is not None:
        inner.enable_padding(length=64, pad_id=3, pad_token="[PAD]", direction="left")
        inner.enable_truncation(8, stride=1, direction="left")
    tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side = 4, "left", "left"
    before = inner.to_str() if inner is not None else state(tokenizer)
    assert TextEncoder(tokenizer)(TEXTS) == expected
    TextEncoder(tokenizer).frame(PROSE)
    assert before == (inner.to_str() if inner is not None else state(tokenizer))
    assert inner is None or not inner.encode_special_tokens


def test_ids_are_those_of_the_library_where_nothing_is_stored():
    for make in (byte_level, word_pieces, unigram):
        tokenizer = make()
        expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
        assert TextEncoder(tokenizer)(TEXTS) == expected
        assert TextEncoder(tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer))(TEXTS) == expected
    assert TextEncoder(tf.ByT5Tokenizer())(["aé"]) == [[byte + 3 for byte in "aé".encode()]]


LETTERS = {"byte-level BPE": "<|endoftext|>", "ready-made": "<|endoftext|>", "WordPiece": "[SEP]", "fast": "[SEP]"}


@pytest.mark.parametrize(("name", "token"), [*LETTERS.items(), ("slow bytes", "</s>")])
def test_a_special_token_inside_a_text_is_letters(name, token):
    tokenizer = MAKERS[name]()
    encoder = TextEncoder(tokenizer)
    special = encoder.token_to_id(token)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (ids,) = encoder([f"the fox {token} the dog"])
    assert special is not None and special not in ids
    if name == "byte-level BPE":
        assert tokenizer.decode(ids) == f"the fox {token} the dog"
    if name == "slow bytes":
        assert bytes(i - 3 for i in ids).decode() == f"the fox {token} the dog"


def test_a_special_token_that_is_a_word_of_the_vocabulary_is_named():
    with pytest.warns(UserWarning, match="a text holds the name of the special token 1"):
        (ids,) = TextEncoder(unigram())(["the fox </s> the dog"])
    assert ids.count(1) == 1


def test_special_tokens_around_a_text_are_found():
    frames = {"WordPiece": ([1], [2]), "fast": ([1], [2]), "slow bytes": ([], [1])}
    frames |= {"Unigram": ([], [1]), "byte-level BPE": ([], []), "ready-made": ([], [])}
    for name, make in MAKERS.items():
        assert TextEncoder(make()).frame(PROSE) == frames[name], name


@pytest.mark.parametrize("name", ["WordPiece", "fast"])
def test_special_tokens_are_found_behind_what_the_normaliser_removes(name):
    tokenizer = MAKERS[name]()
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer._tokenizer
    kept = [backend.normalizer] if backend.normalizer else []
    backend.normalizer = normalizers.Sequence([normalizers.Replace("\u200b", ""), *kept])
    encoder = TextEncoder(tokenizer)
    for removed in (1, 99, 100, 250):
        assert encoder.frame("\u200b" * removed + PROSE) == ([1], [2]), removed
    with pytest.raises(ValueError, match="reads nothing in the text"):
        encoder.frame("\u200b" * 300)


def test_unknown_tokens_above_five_percent_are_named_with_their_share():
    words = PROSE.split()[:19]
    for name in ("WordPiece", "fast", "Unigram"):
        encoder = TextEncoder(MAKERS[name]())
        assert encoder.unknown == 0, name
        ids = encoder([" ".join(words)])[0]
        assert 0 not in ids
        with pytest.warns(UserWarning, match=r"50% of the tokens of this text are the unknown token \(id 0\)"):
            encoder.warn_of_unknown([ids, [0] * len(ids)], "this text")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encoder.warn_of_unknown([[1] * 95 + [0] * 5], "this text")
            encoder.warn_of_unknown([], "nothing")
        with pytest.warns(UserWarning, match="6%"):
            encoder.warn_of_unknown([[1] * 94 + [0] * 6], "this text")
    assert TextEncoder(byte_level()).unknown is None  # bytes are never unknown


def test_what_is_no_tokenizer_is_refused():
    for thing in (None, str.split, object(), "bert-base-uncased"):
        with pytest.raises(ValueError, match=f"a {type(thing).__name__} is no tokenizer"):
            TextEncoder(thing)


def test_a_tokenizer_that_cannot_be_copied_is_used_or_refused():
    class Halves:
        def pre_tokenize(self, text):
            text.split(lambda _, part: [part])

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Halves())
    assert TextEncoder(tokenizer)(["b"]) == [[1]]
    tokenizer.enable_padding(length=5)
    with pytest.raises(ValueError, match=r"no_padding\(\), no_truncation\(\), encode_special_tokens = True"):
        TextEncoder(tokenizer)
    tokenizer.no_padding()
    tokenizer.add_special_tokens(["<s>"])
    with pytest.raises(ValueError, match="cannot be copied"):
        TextEncoder(tokenizer)
    tokenizer.encode_special_tokens = True
    assert TextEncoder(tokenizer)(["b"]) == [[1]]
