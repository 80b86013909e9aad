"""What a run is: frozen settings, JSON in and out, and a run id that is the hash of every setting that matters.

Nothing here imports torch, so that the workflow engine can expand a study in milliseconds.
"""

import dataclasses
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar

from beyond_outliers.config.parsing import Different, Matches, Name, Range, check_fields, check_values, choose, parse

SCHEMES = ("quest", "ste", "lsq")  # of quantization-aware training

Count = Annotated[int, Range(1, 2**20)]
Tokens = Annotated[int, Range(1, 2**29)]
Rate = Annotated[float, Range(1e-12, 1000)]
Share = Annotated[float, Range(0, 1)]
Seed = Annotated[int, Range(0, 10**6)]
# of the registry, or the module:Class of one from outside
OptimizerName = Annotated[
    str, Matches(r"[A-Za-z0-9_][\w.-]*(:[\w.]+)?", "of letters, digits, '.', '_' and '-', or module:Class")
]


@dataclass(frozen=True)
class ModelConfig(ABC):
    """Shape of a decoder. Made as one of the architectures below.

    `width` divides into `n_heads` heads of even size, `n_heads` into `n_kv_heads` groups.

    `mlp_ratio` is the hidden size of the MLP over the width, a whole number: number formats whose blocks divide the
    width divide every linear layer's input.
    """

    architecture: ClassVar[str]

    vocab_size: Tokens = 32_000
    width: Annotated[int, Range(1, 2**16)] = 768
    depth: Annotated[int, Range(1, 1000)] = 4
    n_heads: Annotated[int, Range(1, 2**12)] = 6
    n_kv_heads: Annotated[int, Range(1, 2**12)] | None = None  # None: as many as n_heads (no grouping)
    mlp_ratio: Annotated[int, Range(1, 64)] = 4
    rope_base: Annotated[float, Range(1, 1e8)] = 1024.0
    norm_eps: Annotated[float, Range(0, 1)] = 1e-6
    init_std: Annotated[float, Range(0, 100)] = 0.02

    def __post_init__(self) -> None:
        check_fields(self)
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.width % (2 * self.n_heads):
            raise ValueError(
                f"width {self.width} does not divide into {self.n_heads} heads of even size (rotary pairs)"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        return self.width // self.n_heads

    @property
    def n_parameters(self) -> int:
        """Trainable parameters, the tied embedding counted once: what 20 tokens per parameter refers to."""
        kv_width = self.kv_heads * self.head_size
        projections = 2 * self.width**2 + 2 * self.width * kv_width
        block = projections + self._further_block_parameters() + 2 * self.width
        return self.vocab_size * self.width + self.depth * block + self.width

    @abstractmethod
    def _further_block_parameters(self) -> int:
        """Parameters of a block beside the attention's projections and two gains."""


@dataclass(frozen=True)
class Olmo2Config(ModelConfig):
    """Shape of an `Olmo2`: an MLP of two matrices, one query-key scale a head."""

    architecture: ClassVar[str] = "olmo2"

    def _further_block_parameters(self) -> int:
        return self.n_heads + 2 * self.mlp_ratio * self.width**2


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Shape of a `Llama`: a gated MLP of three matrices, 9 width^2 parameters for the OLMo2 variant's 8 width^2."""

    architecture: ClassVar[str] = "llama"

    mlp_ratio: Annotated[int, Range(1, 64)] = 3
    rope_base: Annotated[float, Range(1, 1e8)] = 10_000.0

    def _further_block_parameters(self) -> int:
        return 3 * self.mlp_ratio * self.width**2


ARCHITECTURES: dict[str, type[ModelConfig]] = {config.architecture: config for config in (Olmo2Config, LlamaConfig)}


def model_config(architecture: str = "olmo2", **shape: Any) -> ModelConfig:
    """The shape of a model. ValueError for an unknown architecture, or a part that its shape does not have."""
    choose("architecture", architecture, ARCHITECTURES)
    valid = [part.name for part in dataclasses.fields(ARCHITECTURES[architecture])]
    if unknown := sorted(set(shape) - set(valid)):
        raise ValueError(f"a model of architecture {architecture!r} has no {unknown}; valid: {', '.join(valid)}")
    return ARCHITECTURES[architecture](**shape)


@dataclass(frozen=True)
class CorpusConfig:
    """Which text, cut how. `source`: "embedded", "climbmix", or a path to .txt, .jsonl or .parquet files (or a folder).

    `wheels` applies to the embedded corpus; `limit_mb` keeps that many megabytes of text, counted before duplicates
    go; `validation_share` is the share of the groups (services, or documents where there are none) that is held out.
    """

    source: Annotated[str, Matches(r"[^\0\n]*[^\0\s.][^\0\n]*", "that names a corpus, a file or a folder")] = "embedded"
    wheels: Annotated[tuple[str, ...], Different()] = ("botocore", "google-api-python-client")
    # 258: bytes and the boundary; 65535: token files hold uint16
    vocab_size: Annotated[int, Range(258, 65_535)] = 2048
    limit_mb: Annotated[float, Range(1e-3, 1e8)] | None = None
    validation_share: Annotated[float, Range(0, 0.5, "(]")] = 0.04

    def __post_init__(self) -> None:
        check_fields(self)


# a scale, or an optimizer from outside beside it: "pocket", "pocket+lion"
ScaleName = Annotated[
    str,
    Matches(
        r"[A-Za-z0-9][A-Za-z0-9._-]*(\+[A-Za-z0-9][A-Za-z0-9._-]*)?", "of letters, digits, '.', '_', '-', and one '+'"
    ),
]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all runs of a scale share: batch, length, schedule, evaluations."""

    weight_decay: Annotated[float, Range(0, 100)] = 0.0
    context: Count = 128  # tokens per sequence
    batch_size: Count = 32  # sequences an optimizer step, over all workers
    micro_batch: Count = 32  # sequences a forward pass and worker; more are accumulated
    tokens_per_parameter: Annotated[float, Range(0, 1e6, "(]")] = 20.0
    warmup: Share = 0.05  # share of the steps, linear from 0
    decay: Share = 0.20  # share of the steps, linear to 0
    clip: Annotated[float, Range(0, 1e6, "(]")] | None = None  # largest gradient norm; None: no clipping
    evaluations: Annotated[int, Range(1, 40)] = 20  # fixed points along the run; the weights of each are kept
    validation_tokens: Tokens = 65_536

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}")
        if self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup {self.warmup} and decay {self.decay} must be shares that leave room for each other"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    def steps_of(self, n_parameters: int) -> int:
        """Optimizer steps that come nearest to `tokens_per_parameter`: 0 where one step is far more than that."""
        return round(self.tokens_per_parameter * n_parameters / self.tokens_per_step)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Training):
    """One training run, resolved: everything that decides its result, nothing about the machine that runs it.

    Device, threads and compilation are arguments of `train`, and are recorded in its result.
    """

    scale: ScaleName
    size: Name
    optimizer: OptimizerName
    lr: Annotated[float, Range(0, 1e9, "(]")]  # scale files ask for less; a run may be meant to diverge
    model: ModelConfig
    corpus: CorpusConfig
    seed: Seed = 0
    hyper: dict[str, Any] = field(default_factory=dict)  # further hyperparameters of the optimizer
    quantization: dict[str, Any] | None = None  # QAT: {"scheme": "quest", "weights": "int4", ...}; None: full precision

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self.hyper, "hyper")
        if self.model.vocab_size != self.corpus.vocab_size:
            raise ValueError(
                f"model.vocab_size {self.model.vocab_size} differs from corpus.vocab_size {self.corpus.vocab_size}"
            )
        if self.quantization:
            parse(self.quantization.get("scheme"), Name, "quantization.scheme")  # part of the folder's name
            choose("scheme", self.quantization["scheme"], SCHEMES)

    @property
    def steps(self) -> int:
        """Optimizer steps that come nearest to `tokens_per_parameter`, one at least."""
        return max(1, self.steps_of(self.model.n_parameters))

    @functools.cached_property
    def run_id(self) -> str:
        """First 10 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """Folder name of the run: readable first, unique last."""
        precision = f"-{self.quantization['scheme']}" if self.quantization else ""
        optimizer = self.optimizer.replace(":", ".")  # of one from outside; not every file system takes a colon
        return f"{self.size}-{optimizer}-lr{self.lr:g}-s{self.seed}{precision}-{self.run_id}"

    def to_json(self) -> str:
        """Canonical: keys sorted. The model says its architecture where that is not the paper's."""
        raw = asdict(self)
        if self.model.architecture != "olmo2":  # ids of runs from before there was a second one must not change
            raw["model"]["architecture"] = self.model.architecture
        return json.dumps(raw, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """The run of `to_json`; ValueError for unknown or missing keys and for values that do not fit."""
        raw = json.loads(text)
        if "model" in raw:
            raw["model"] = model_config(**raw["model"])
        config: RunConfig = parse(raw, cls, "")
        return config

    def replace(self, **changes: Any) -> "RunConfig":
        return dataclasses.replace(self, **changes)
