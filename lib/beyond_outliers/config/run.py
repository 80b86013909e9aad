"""What a run is: frozen settings, JSON in and out, and a run id that is the hash of every setting that matters.

Nothing here imports torch, so that the workflow engine can expand a study in milliseconds.
"""

import dataclasses
import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar

from beyond_outliers.config.parsing import (
    Name,
    between,
    check_fields,
    check_keys,
    check_values,
    choose,
    different,
    matching,
    parse,
)

SCHEMES = ("quest", "ste", "lsq")  # of quantization-aware training

Count = Annotated[int, between(1, 2**20)]
Tokens = Annotated[int, between(1, 2**29)]
Rate = Annotated[float, between(1e-12, 1000)]
Share = Annotated[float, between(0, 1)]
Seed = Annotated[int, between(0, 10**6)]
# of the registry, or the module:Class of one from outside
OptimizerName = Annotated[
    str, matching(r"[A-Za-z0-9_][\w.-]*(:[\w.]+)?", "of letters, digits, '.', '_' and '-', or module:Class")
]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. Made as one of the architectures below.

    `width` divides into `n_heads` heads of even size, `n_heads` into `n_kv_heads` groups.

    `mlp_ratio` is the hidden size of the MLP over the width, a whole number: number formats whose blocks divide the
    width divide every linear layer's input.
    """

    architecture: ClassVar[str]
    mlp_matrices: ClassVar[int]
    qk_scales: ClassVar[bool]  # whether each head has a learned one

    vocab_size: Tokens = 32_000
    width: Annotated[int, between(1, 2**16)] = 768
    depth: Annotated[int, between(1, 1000)] = 4
    n_heads: Annotated[int, between(1, 2**12)] = 6
    n_kv_heads: Annotated[int, between(1, 2**12)] | None = None  # None: as many as n_heads (no grouping)
    mlp_ratio: Annotated[int, between(1, 64)] = 4
    rope_base: Annotated[float, between(1, 1e8)] = 1024.0
    norm_eps: Annotated[float, between(0, 1)] = 1e-6
    init_std: Annotated[float, between(1e-6, 100)] = 0.02  # at 0 nothing ever moves

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
        attention = 2 * self.width**2 + 2 * self.width * kv_width + self.qk_scales * self.n_heads
        mlp = self.mlp_matrices * self.mlp_ratio * self.width**2
        return self.vocab_size * self.width + self.depth * (attention + mlp + 2 * self.width) + self.width


@dataclass(frozen=True)
class Olmo2Config(ModelConfig):
    """Shape of an `Olmo2`: an MLP of two matrices, one query-key scale a head."""

    architecture, mlp_matrices, qk_scales = "olmo2", 2, True


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Shape of a `Llama`: a gated MLP of three matrices, 9 width^2 parameters for the OLMo2 variant's 8 width^2."""

    architecture, mlp_matrices, qk_scales = "llama", 3, False

    mlp_ratio: Annotated[int, between(1, 64)] = 3
    rope_base: Annotated[float, between(1, 1e8)] = 10_000.0


ARCHITECTURES: dict[str, type[ModelConfig]] = {config.architecture: config for config in (Olmo2Config, LlamaConfig)}


def model_config(architecture: str = "olmo2", **shape: Any) -> ModelConfig:
    """The shape of a model. ValueError for an unknown architecture, or a part that its shape does not have."""
    choose("architecture", architecture, ARCHITECTURES)
    valid = [part.name for part in dataclasses.fields(ARCHITECTURES[architecture])]
    check_keys(f"a model of architecture {architecture!r}", shape, valid)
    return ARCHITECTURES[architecture](**shape)


@dataclass(frozen=True)
class CorpusConfig:
    """Which text, cut how. `source`: "embedded", "climbmix", or a path to .txt, .jsonl or .parquet files (or a folder).

    `wheels` applies to the embedded corpus; `limit_mb` keeps that many megabytes of text, counted before duplicates
    go; `validation_share` is the share of the groups (services, or documents where there are none) that is held out.
    """

    source: Annotated[str, matching(r"[^\0\n]*[^\0\s.][^\0\n]*", "that names a corpus, a file or a folder")] = (
        "embedded"
    )
    wheels: Annotated[tuple[str, ...], different()] = ("botocore", "google-api-python-client")
    # 258: bytes and the boundary; 65535: token files hold uint16
    vocab_size: Annotated[int, between(258, 65_535)] = 2048
    limit_mb: Annotated[float, between(1e-3, 1e8)] | None = None
    validation_share: Annotated[float, between(1e-6, 0.5)] = 0.04

    def __post_init__(self) -> None:
        check_fields(self)


# a scale, or an optimizer from outside beside it: "pocket", "pocket+lion"
ScaleName = Annotated[
    str,
    matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]*(\+[A-Za-z0-9][A-Za-z0-9._-]*)?", "of letters, digits, '.', '_', '-', and one '+'"
    ),
]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all runs of a scale share: batch, length, schedule, evaluations."""

    weight_decay: Annotated[float, between(0, 100)] = 0.0
    context: Count = 128  # tokens per sequence
    batch_size: Count = 32  # sequences an optimizer step, over all workers
    micro_batch: Count = 32  # sequences a forward pass and worker; more are accumulated
    tokens_per_parameter: Annotated[float, between(1e-6, 1e6)] = 20.0
    warmup: Share = 0.05  # share of the steps, linear from 0
    decay: Share = 0.20  # share of the steps, linear to 0
    clip: Annotated[float, between(1e-6, 1e6)] | None = None  # largest gradient norm; None: no clipping
    evaluations: Annotated[int, between(1, 40)] = 20  # fixed points along the run; the weights of each are kept
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
    lr: Annotated[float, between(1e-12, 1e9)]  # scale files ask for less; a run may be meant to diverge
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
