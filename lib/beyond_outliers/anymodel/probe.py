"""One call for a checkpoint of your own: what quantization after training costs, which layers cost it, what to do.

`probe(model)` takes a causal LM or an encoder of the `transformers` library, as a folder, a hub name or a GGUF file, or
any module that maps token ids (B, T) to logits or hidden states, such as this project's `Olmo2`.
"""

import copy
import inspect
import json
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from beyond_outliers import paths
from beyond_outliers.anymodel.loading import EXAMPLES, PAIR, bundled, load, load_tokenizer, longest, windows
from beyond_outliers.anymodel.open import open_layers
from beyond_outliers.anymodel.sensitivity import bits_of, carried, linear_layers, mixed
from beyond_outliers.corpus.encoding import TextEncoder
from beyond_outliers.metrics import activation_metrics, average
from beyond_outliers.modules import declared, evaluating, forward, hooked, linear_weight
from beyond_outliers.passes import tensors
from beyond_outliers.propagation import decompose, output_readings, rounding_floor, summarise
from beyond_outliers.quantizers.convert import quantize_model
from beyond_outliers.quantizers.record import CoverageWarning, Quantization, Weight, record_of
from beyond_outliers.quantizers.spec import QuantSpec

HELD_OUT = paths.ROOT / "data" / "held_out.txt"  # validation text of the embedded corpus: API documentation, English
LAYERWISE = 8  # windows at most that tables of layers are over: each costs them some 20 passes
TABLES = ("readings", "held_out", "kept", "metrics", "modules", "layers")
KEPT = 3  # costliest layers that are tried in 8 bits


@dataclass(frozen=True)
class Probe:
    """What `probe` found. `print(found)` answers three questions: what is lost, where, what to do.

    readings, held_out: `output_readings` on the text and on HELD_OUT (None: the same, or no logits). kept: the readings
    once the layers of `worst(KEPT, by="carried")` have 8 bits (None where all have). metrics, modules: tables of
    `activation_metrics` and `decompose`. layers: the linear layers with `carried` and their metrics (see `recommend`).
    floor: how far R_L moves under weight changes of 1e-6 (`rounding_floor`; of a batch). grids: matrices whose weights
    lie on at most 16 levels in each block of 32 already. quantization: what was rounded and what was not.
    """

    name: str
    spec: QuantSpec
    readings: pd.DataFrame
    held_out: pd.DataFrame | None
    kept: pd.DataFrame | None
    metrics: pd.DataFrame
    modules: pd.DataFrame
    layers: pd.DataFrame
    quantization: Quantization
    grids: int = 0
    floor: float = float("nan")

    def save(self, folder: Path):
        """Tables and record as files of `folder`, which `Probe.read` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            if (table := getattr(self, name)) is not None:
                table.reset_index().to_csv(folder / f"{name}.csv", index=False, float_format="%.8g")
        told = {name: getattr(self, name) for name in ("name", "grids", "floor")}
        told |= {"spec": asdict(self.spec), "weights": [asdict(weight) for weight in self.quantization.weights]}
        paths.write_whole(folder / "probe.json", json.dumps(told, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Probe":
        """What `save` wrote."""
        told = json.loads((folder / "probe.json").read_text())
        files = {name: folder / f"{name}.csv" for name in TABLES}
        tables: dict[str, Any] = {
            name: pd.read_csv(file, index_col=0) if file.exists() else None for name, file in files.items()
        }
        spec, weights = QuantSpec(**told.pop("spec")), [Weight(**weight) for weight in told.pop("weights")]
        return cls(spec=spec, quantization=Quantization(spec, weights=weights), **told, **tables)

    @property
    def R_L(self) -> float:
        return float(self.readings.value["R_L"])

    @property
    def unit(self) -> str:
        """What damage is told in: the reading "kl", or "R_L" of a model without logits."""
        return "R_L" if np.isnan(self.readings.value["kl"]) else "kl"

    def worst(self, n: int = 10, by: str = "carried") -> pd.DataFrame:
        """The `n` linear layers with the most of `by`. ValueError for a column that `layers` does not have."""
        if by not in self.layers.columns[1:]:
            raise ValueError(f"unknown column {by!r}; valid: {list(self.layers.columns[1:])}")
        return self.layers.sort_values(by, ascending=False, ignore_index=True).head(n)

    def summary(self) -> pd.Series:
        """Readings with their intervals, R_L's floor, averages over the linear layers, means of the decomposition."""
        ends = {"": "value", "_low": "low", "_high": "high"}
        told = self.readings[self.readings.value.notna()]
        error = {f"{name}{end}": row[column] for name, row in told.iterrows() for end, column in ends.items()}
        means = summarise(self.modules).drop("R_L")
        parts = [pd.Series(error | {"R_L_floor": self.floor}), average(self.metrics), means]
        return pd.concat(parts).rename(f"{self.name} {self.spec.name}")

    def __str__(self) -> str:
        from beyond_outliers.anymodel.advice import advice, finding

        columns = ["name", "carried", "share", "B", "R", "mmr", "kurtosis"]
        table = self.worst(2 * KEPT)[columns].to_string(index=False, float_format="{:.3g}".format)
        return "\n".join([finding(self), *(f"- {line}" for line in advice(self)), "", table])


def probe(
    model: nn.Module | str | Path,
    text: str | Path | None = None,
    spec: QuantSpec | None = None,
    *,
    tokenizer=None,
    context: int = 128,
    sequences: int = 16,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    strict: bool = True,
    calibration: int = 32,
    memory: float = 5e8,
    trust_remote_code: bool = False,
) -> Probe:
    """Quantizes a model after training as `spec` says (default W4A4) and measures what that does, on a text of yours.

    Says first how long it will take, at the end what it found.

    model: a local folder in the `transformers` format, a GGUF file, a name on the hub, "SmolLM2" or "MiniLM" (see
        `bundled`), or a loaded module (deep-copied, never changed), which needs its `tokenizer`. Weights are loaded in
        float32. Layers that hide linear layers (GPT-2's Conv1D, torch's attention) are put in terms of nn.Linear first,
        so that they are measured like the others. An encoder's pooler is left out: R_L is that of its hidden states.
    tokenizer: of `transformers` or `tokenizers`, or the folder or name of one; by default the model's.
    text: path of a UTF-8 text file, by default HELD_OUT; its first `sequences` windows of `context` tokens are used
        (`context` is cut to what the model can read), no padding, a shorter rest dropped. Tables of layers are over the
        first `LAYERWISE` of them.
    memory: bytes that the activations of a batch may take; `batch_size` is cut to what fits, and said, where it must
        be. Beside them stand three copies of the weights. A single window that takes more is an error up front.
    calibration: windows of the text behind the measured ones that a spec of method "gptq" calibrates on.
    trust_remote_code: runs code that comes with a checkpoint. Otherwise none is, nobody is asked, and a checkpoint that
        needs it is an error. This project's exports need none.
    strict: a matrix-multiply weight that cannot be rounded, other than the head, is an error; False goes on with a
        warning. What was rounded is printed either way.

    Raises ValueError naming what is missing: no such model or text file, a module without tokenizer, too little text,
    ids beyond the vocabulary, no linear layer, a checkpoint whose weights do not fit (see `load`).
    """
    spec, path = spec or QuantSpec(), Path(text or HELD_OUT)
    if not path.is_file():
        raise ValueError(f"no text file at {str(path)!r}")
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    if tokenizer is not None:
        TextEncoder(tokenizer)  # a ValueError for what is none, before anything that takes time
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ValueError(f"a loaded {type(model).__name__} needs its tokenizer: pass tokenizer=...")
        name, model = type(model).__name__, copy.deepcopy(model)
    else:
        model = bundled(str(model)) if str(model) in EXAMPLES else model
        name = Path(model).name.removesuffix(".gguf")
        print(f"loading {name}", flush=True)
        model, own_tokenizer = load(model, tokenizer is None, trust_remote_code)
        tokenizer = own_tokenizer if tokenizer is None else tokenizer
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} is {PAIR}")
    model = open_layers(model).to(device or "cpu") if device else open_layers(model)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]  # torch lets a module be taken out like this
    more = calibration if spec.method == "gptq" else 0
    ids = read_windows(model, tokenizer, path, context, sequences + more)
    if more and len(ids) <= sequences:
        raise ValueError(f"the text fills {len(ids)} windows, {sequences} to measure: none is left to calibrate on")
    measured = ids[:sequences]
    batch_size = _fitting(model, measured, memory, batch_size)
    batches, inputs = measured.split(batch_size), ids[sequences:].split(batch_size) if more else None
    few = measured[:LAYERWISE].split(batch_size)
    quantize = partial(quantize_model, spec=spec, calibration=inputs, example=batches[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)  # said below
        floor = rounding_floor(model, batches[:1], quantize, reduction="global")
    quantized = quantize(model, strict=strict)
    readings = output_readings(model, quantized, batches)
    held_out = None
    if text is not None and not np.isnan(readings.value["kl"]):
        others = read_windows(model, tokenizer, HELD_OUT, min(context, 1024), sequences)
        held_out = output_readings(model, quantized, others.split(batch_size))
    metrics = activation_metrics(model, few, spec)
    modules = decompose(model, quantized, few, attention="open", reduction="global")
    layers = _layers(modules, metrics, carried(model, quantized, measured[:LAYERWISE]))
    if spec.activations != "none" and not spec.rotate:
        rotated = activation_metrics(model, few, replace(spec, rotate=True)).set_index("name").input_error
        layers["input_error_rotated"] = layers.name.map(rotated)
    kept = None
    if bits_of(spec) < 8:
        costliest = layers.sort_values("carried", ascending=False).name[:KEPT]
        kept = output_readings(model, mixed(model, quantized, dict.fromkeys(costliest, 8)), batches)
    record, names = record_of(quantized), linear_layers(quantized)
    grids = sum(_on_a_grid(linear_weight(model.get_submodule(layer))) for layer in names)
    found = Probe(name, spec, readings, held_out, kept, metrics, modules, layers, record, grids, floor)
    print(f"{record}\n\n{found}")
    return found


def read_windows(model: nn.Module, tokenizer, path: Path, context: int, sequences: int) -> Tensor:
    """`windows` of a file, which is read no further than needed; ValueError for ids beyond the model's vocabulary."""
    context = min(context, longest(model))
    with path.open(encoding="utf-8", errors="replace") as file:  # no text has fewer than one token a 40 characters
        ids = windows(tokenizer, file.read(40 * context * sequences), context, sequences)
    table = declared(model, "get_input_embeddings")
    size = getattr(table, "num_embeddings", None)  # CANINE hashes ids and has no table
    if size is not None and int(ids.max()) >= size:
        raise ValueError(f"the tokenizer gives the id {int(ids.max())}, the model has a vocabulary of {size}")
    return ids


def _layers(modules: pd.DataFrame, metrics: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """The linear layers that were rounded: cost, error where a row of its own has it, metrics of the input."""
    error = modules[modules["kind"] == "linear"][["name", "R", "A", "C", "gain", "alignment_ratio"]]
    return costs.merge(error, on="name", how="left").merge(
        metrics.drop(columns=["index", "kind"]), on="name", how="left"
    )


def _on_a_grid(weight: Tensor) -> bool:
    """Whether nearly every block of 32 entries of a row, of 64 that are looked at, has at most 16 values."""
    rows = weight.detach()[:: max(1, len(weight) // 64), : weight.shape[1] // 32 * 32]
    blocks = rows.reshape(-1, 32)[:64]
    counts = torch.tensor([len(block.unique()) for block in blocks])
    return len(counts) > 0 and bool((counts <= 16).double().mean() > 0.9)


PASSES = {"readings": 2.5, "layers": 30}  # passes of the model that a window takes, and one of the first few


def _fitting(model: nn.Module, windows: Tensor, memory: float, wanted: int) -> int:
    """`wanted` windows, or as many as `memory` bytes hold; ValueError where not even one. Says how long all takes."""
    window = windows[:1]
    each, clock = activation_bytes(model, window), time.perf_counter()
    with evaluating(model):
        forward(model, window)
    passes = PASSES["readings"] * len(windows) + PASSES["layers"] * min(LAYERWISE, len(windows))
    minutes = passes * (time.perf_counter() - clock) / 60
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{size / 1e6:.3g}M parameters, {(12 * size + memory) / 1e9:.2g} GB; about {minutes:.1f} minutes",
        flush=True,
    )
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

    with hooked(model.modules(), after=keep), evaluating(model):
        forward(model, batch)
    return max(1, sum(x.untyped_storage().nbytes() for x in held.values()))
