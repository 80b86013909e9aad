"""A scale file, data/scales/SCALE.toml, as frozen dataclasses: one class a section, one field a key."""

import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from beyond_outliers import paths
from beyond_outliers.config.loading import is_own
from beyond_outliers.config.optimizers import REGISTRY, ROLE_RATES, ordered
from beyond_outliers.config.outside import beside, optimizer_file
from beyond_outliers.config.parsing import Different, Name, Range, check_keys, check_values, choose, parse
from beyond_outliers.config.run import (
    CorpusConfig,
    ModelConfig,
    Rate,
    RunConfig,
    ScaleName,
    Seed,
    Share,
    Tokens,
    Training,
    model_config,
)

PURPOSES = ("sweep", "full_precision", "branches", "qat", "schemes")

Sizes = Annotated[tuple[Name, ...], Different()]
Seeds = Annotated[tuple[Seed, ...], Different()]
Names = Annotated[tuple[Name, ...], Different()]
Hyperparameter = bool | float | str | tuple[float, ...] | tuple[str, ...]
Number = Annotated[float, Range(0, 1000)]
# a hyperparameter by the annotation that its class gives it; others, which only foreign classes have, as TOML has them
KINDS: dict[str, Any] = {
    "bool": bool,
    "int": Annotated[int, Range(0, 2**20)],
    "float": Number,
    "float | None": Number,
    "str": Name,
    "tuple[float, float]": tuple[Annotated[float, Range(0, 1)], ...],
}
LARGEST_MODEL = 10**12  # parameters
MOST_STEPS = 10**8


@dataclass(frozen=True, kw_only=True)
class Size:
    """A size: its shape, with the defaults of its architecture for what is left out."""

    width: Annotated[int, Range(1, 2**16)]
    depth: Annotated[int, Range(1, 1000)]
    n_heads: Annotated[int, Range(1, 2**12)]
    n_kv_heads: Annotated[int, Range(1, 2**12)] | None = None
    mlp_ratio: Annotated[int, Range(1, 64)] | None = None
    rope_base: Annotated[float, Range(1, 1e8)] | None = None
    norm_eps: Annotated[float, Range(0, 1)] | None = None
    init_std: Annotated[float, Range(0, 100, "(]")] | None = None  # at 0 nothing ever moves
    architecture: str = "olmo2"

    def __post_init__(self) -> None:
        self.model(vocab_size=258)

    def model(self, vocab_size: int) -> ModelConfig:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return model_config(vocab_size=vocab_size, **given)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How the runs of an arm differ from the main runs of its scale: factors of both rates, decay, hyperparameters.

    decay: rate times weight decay times steps, the same for matrices and embeddings; vectors are never decayed.
    """

    label: str = ""
    lr: Annotated[float, Range(1e-3, 1e3)] = 1  # times 1 a rate stays as it is, bit by bit
    auxiliary: Annotated[float, Range(1e-3, 1e3)] = 1
    decay: Annotated[float, Range(0, 100)] = 0.0
    hyper: dict[str, bool] = field(default_factory=dict)

    def of(self, config: RunConfig) -> RunConfig:
        """The run that differs so from `config`, which has its rates already."""
        hyper = {**config.hyper, **self.hyper}
        if not self.decay:
            return config.replace(hyper=hyper)
        each = [float(f"{self.decay / rate / config.steps:.6g}") for rate in (config.lr, hyper["embedding_lr"])]
        return config.replace(weight_decay=each[0], hyper={**hyper, "embedding_decay": each[1]})


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What is run for one purpose: [plan.sweep] and [plan.full_precision]. Seeds: of all sizes, or one list a size."""

    sizes: Sizes
    seeds: Seeds | dict[str, Seeds]
    variants: tuple[Variant, ...] = (Variant(),)

    def seeds_at(self, size: str) -> tuple[int, ...]:
        return self.seeds[size] if isinstance(self.seeds, dict) else self.seeds

    @property
    def subjects(self) -> tuple[str, ...] | None:
        """The optimizers that are run; None: all of the scale."""
        return None

    @property
    def quantizations(self) -> tuple[dict[str, Any] | None, ...]:
        """Of each run, `RunConfig.quantization`; one run for every entry."""
        return (None,)


@dataclass(frozen=True, kw_only=True)
class BranchRuns(Runs):
    """[plan.branches]: full-precision runs that leave a main run, their trunk, at shares `at` of its tokens.

    A branch is 5/4 as long as what it has of its trunk: its learning rate falls to 0 over its last fifth. The shares
    lie in the trunk's constant part: 85 % of the tokens would have a quarter of the decay behind them.
    """

    at: Annotated[tuple[Share, ...], Different()]

    def branches(self, trunk: RunConfig) -> list[tuple[RunConfig, int]]:
        """Every branch of a run and the step at which it starts: one run of that length until then, warm-up and all."""
        found = []
        for share in self.at:
            branch = trunk.replace(tokens_per_parameter=round(1.25 * share * trunk.tokens_per_parameter, 9), decay=0.2)
            found.append((branch.replace(warmup=trunk.warmup * trunk.steps / branch.steps), round(share * trunk.steps)))
        return found


@dataclass(frozen=True, kw_only=True)
class QatRuns(Runs):
    """[plan.qat]: `head` says whether the output head is quantized, too."""

    scheme: Name
    head: bool = False

    @property
    def quantizations(self) -> tuple[dict[str, Any] | None, ...]:
        return (qat(self.scheme, self.head),)


@dataclass(frozen=True, kw_only=True)
class SchemeRuns(Runs):
    """[plan.schemes]: QAT schemes compared, for some of the optimizers."""

    optimizers: Names
    schemes: Names

    @property
    def subjects(self) -> tuple[str, ...] | None:
        return self.optimizers

    @property
    def quantizations(self) -> tuple[dict[str, Any] | None, ...]:
        return tuple(qat(scheme) for scheme in self.schemes)


def qat(scheme: str, head: bool = False) -> dict[str, Any]:
    """`RunConfig.quantization` of quantization-aware training in W4A4; run ids are hashed from it."""
    return {"scheme": scheme, "weights": "int4", "activations": "int4"} | ({"head": True} if head else {})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """[plan]: a purpose that is left out is not run."""

    full_precision: Runs | None = None
    sweep: Runs | None = None
    branches: BranchRuns | None = None
    qat: QatRuns | None = None
    schemes: SchemeRuns | None = None

    def __iter__(self) -> Iterator[tuple[str, Runs]]:
        """(purpose, its runs) of what is planned, in the order of PURPOSES."""
        every: tuple[Runs | None, ...] = (self.sweep, self.full_precision, self.branches, self.qat, self.schemes)
        return ((purpose, runs) for purpose, runs in zip(PURPOSES, every, strict=True) if runs is not None)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the tuning of an optimizer begins: rates of the hidden matrices, and of embedding and vectors."""

    lr: Rate
    auxiliary: Rate


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """[tuning]: every size is tuned, by the rule of the module `rates`: along lines, or with `shape` over pairs."""

    seeds: Seeds  # a search along lines has one
    factor: Annotated[float, Range(1.1, 10)]  # between neighbouring rates
    tolerance: Annotated[float, Range(0, 1)]  # nats
    start: dict[str, Start]
    shape: tuple[Annotated[int, Range(3, 12)], ...] = ()  # of the grid: matrix rates, auxiliary rates
    finalists: Annotated[int, Range(1, 100)] = 4
    cross_seeds: dict[str, Annotated[int, Range(1, 100)]] = field(default_factory=dict)  # by size: all but the smallest

    def __post_init__(self) -> None:
        if self.shape and (len(self.shape) != 2 or max(self.cross_seeds.values(), default=1) > len(self.seeds)):
            raise ValueError(
                f"tuning.shape must be two numbers and tuning.cross_seeds at most the {len(self.seeds)} seeds, "
                f"not {list(self.shape)} and {self.cross_seeds}"
            )
        if not self.shape and len(self.seeds) > 1:
            raise ValueError(f"a search along lines has one seed, not {list(self.seeds)}; valid: one, or a shape")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """[measure]: on how much, and in which formats, every trained model is measured."""

    questions: Annotated[int, Range(1, 2**24)]  # at most, of every zero-shot task
    validation_tokens: Tokens  # for losses after quantization
    propagation_tokens: Tokens  # for the error decomposition and the outlier metrics
    formats: Annotated[tuple[str, ...], Different(least=0)] = ()  # each for weights alone, and for both
    specs: Annotated[tuple[str, ...], Different(least=0)] = ()  # in place of formats: by name, as in table ptq
    primary: str = "W4A4"  # the spec by which claims judge
    calibration_tokens: Tokens = 16_384  # of training text, for specs with +gptq
    trajectory: bool = False  # whether the checkpoints along a run are measured, too
    common_by_seed: bool = False  # whether every seed has a Common Loss of its own
    readings: Annotated[tuple[str, ...], Different()] = ()  # specs in which all that an end tells is read

    def __post_init__(self) -> None:
        if bool(self.formats) == bool(self.specs):
            raise ValueError("either formats or specs must say in which formats models are measured")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A whole scale file. Learning rates: from a sweep over grids ([learning_rates]), or from a search ([tuning]).

    rates_from: the tuned scale whose committed choice the sizes take that are not swept, instead of the next smaller
    one's; they must be sizes of that scale, too, alike in everything that a learning rate depends on.
    """

    threads: Annotated[int, Range(1, 1024)]  # CPU threads a run
    corpus: CorpusConfig
    training: Training
    sizes: dict[Name, Size]  # smallest first
    plan: Plan
    measure: Measure
    learning_rates: dict[str, Annotated[tuple[Rate, ...], Different()]] = field(default_factory=dict)
    hyper: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuning: Tuning | None = None
    rates_from: Name | None = None
    labels: dict[str, str] = field(default_factory=dict)  # of optimizers from outside, in figures and sentences

    def __post_init__(self) -> None:
        """ValueError where sections do not fit each other."""
        self._check_learning_rates()
        for name, given in self.hyper.items():
            check_values(given, f"hyper.{name}")
            if not is_own(name):  # of one from outside only importing it would tell: `study.check` does
                self._check_hyper(name, given)
        self._check_models()
        for purpose, runs in self.plan:
            self._check_plan(purpose, runs)
        for key in ("validation_tokens", "propagation_tokens", "calibration_tokens"):
            tokens, least = getattr(self.measure, key), self.training.context
            if tokens < least:
                raise ValueError(f"measure.{key} must be {least} (training.context) or more, not {tokens}")

    def _check_hyper(self, name: str, given: dict[str, Any]) -> None:
        tuned = ROLE_RATES if self.tuning else ()
        kinds = REGISTRY[name].annotations
        check_keys(f"hyper.{name}", given, [k for k, kind in kinds.items() if k not in tuned and "dtype" not in kind])
        for key, value in given.items():
            parse(value, KINDS.get(kinds[key], Hyperparameter), f"hyper.{name}.{key}")

    def _check_models(self) -> None:
        """ValueError for sizes out of order or unlike any model, and for trainings of no step or without end."""
        if not self.sizes:
            raise ValueError("[sizes] names no size; valid: one or more")
        if len({size.lower() for size in self.sizes}) < len(self.sizes):
            raise ValueError(f"[sizes] has names that differ in case alone: {', '.join(self.sizes)}")
        training, counts = self.training, []
        for name, size in self.sizes.items():
            counts.append(size.model(self.corpus.vocab_size).n_parameters)
            if counts[-1] > LARGEST_MODEL:
                raise ValueError(f"sizes.{name} has {counts[-1]:,} parameters; valid: {LARGEST_MODEL:,} at most")
            if not training.evaluations <= (steps := training.steps_of(counts[-1])) <= MOST_STEPS:
                raise ValueError(
                    f"sizes.{name} is trained for {steps:,} steps of {training.tokens_per_step:,} tokens; valid: from "
                    f"{training.evaluations} (training.evaluations) to {MOST_STEPS:,}"
                )
        if counts != sorted(counts):
            raise ValueError(f"[sizes] must have the smallest size first, not {', '.join(self.sizes)} ({counts})")
        if training.validation_tokens < training.context:
            raise ValueError(
                f"training.validation_tokens must be {training.context} (training.context) or more, "
                f"not {training.validation_tokens}"
            )

    def _check_learning_rates(self) -> None:
        subjects = [name for name, entry in REGISTRY.items() if entry.subject]
        start = self.tuning.start if self.tuning else ()
        for where, given in (("hyper", self.hyper), ("learning_rates", self.learning_rates), ("tuning.start", start)):
            check_keys(where, [name for name in given if not is_own(name)], [*subjects, "module:Class of your own"])
        check_keys("labels", self.labels, [name for name in self.optimizers if is_own(name)])
        if bool(self.learning_rates) == bool(self.tuning and self.tuning.start):
            raise ValueError("the file must have learning rates in either [learning_rates] or [tuning.start]")
        if (self.plan.sweep is None) != (self.tuning is not None) and not self.rates_from:
            raise ValueError("[learning_rates] asks for [plan.sweep]; [tuning], which tunes every size, for none")
        if self.tuning and self.tuning.shape and list(self.tuning.cross_seeds) != list(self.sizes)[1:]:
            raise ValueError(
                f"tuning.cross_seeds must be of every size but the smallest, {list(self.sizes)[1:]}, "
                f"not of {list(self.tuning.cross_seeds)}"
            )
        if self.rates_from and self.tuning:
            raise ValueError(
                f"rates_from = {self.rates_from!r} in a scale that tunes every size itself; valid: no rates_from"
            )
        lengths = {len(grid) for grid in self.learning_rates.values()}
        if len(lengths) > 1:
            raise ValueError(
                f"[learning_rates] has grids of different lengths {sorted(lengths)}: tune all optimizers alike"
            )

    def _check_plan(self, purpose: str, runs: Runs) -> None:
        self._check_sizes(f"plan.{purpose} names", runs.sizes)
        if isinstance(runs.seeds, dict):
            self._check_sizes(f"plan.{purpose}.seeds names", runs.seeds)
            for size in runs.sizes:
                if size not in runs.seeds:
                    raise ValueError(f"plan.{purpose}.seeds has no seeds for size {size!r}")
        if isinstance(runs, BranchRuns):
            most, trunks = 1 - self.training.decay, self.plan.full_precision or runs
            if not 0 < min(runs.at) <= max(runs.at) <= most:
                raise ValueError(
                    f"plan.branches.at must lie above 0 and at most at {most:g} (1 - training.decay), not {runs.at}"
                )
            for size in runs.sizes:
                if size not in trunks.sizes or not set(runs.seeds_at(size)) <= set(trunks.seeds_at(size)):
                    raise ValueError(f"plan.branches names runs of {size} that plan.full_precision has not")
        for name in runs.subjects or ():
            if name not in self.optimizers:
                raise ValueError(f"plan.{purpose} names optimizer {name!r}; valid: {', '.join(self.optimizers)}")

    def _check_sizes(self, who: str, sizes: Collection[str]) -> None:
        for size in sizes:
            if size not in self.sizes:
                raise ValueError(f"{who} size {size!r}; valid: {', '.join(self.sizes)}")

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers that the file gives learning rates, in the order of the registry, those from outside last."""
        return tuple(ordered(self.tuning.start if self.tuning else self.learning_rates))

    def runs(self, purpose: str) -> Runs | None:
        """What is run for a purpose, None for nothing; the sweep of a tuned scale is of all its sizes."""
        choose("purpose", purpose, PURPOSES)
        if purpose == "sweep" and self.tuning:
            return Runs(sizes=tuple(self.sizes), seeds=self.tuning.seeds[:1])
        return dict(self.plan).get(purpose)


def scales() -> list[str]:
    """Names of the scales that data/scales describes."""
    return sorted(file.stem for file in paths.SCALES.glob("[!.]*.toml"))


def of_arm(table: dict[str, Any], arm: dict[str, Any], base: str) -> dict[str, Any]:
    """The scale file `table` with what an arm of it says: its plan and sizes in place of all, the rest key by key.

    An arm that does not tune takes the rates that `base` has chosen, for the `optimizers` that it names or all.
    """
    start = table["tuning"]["start"]
    names = arm.pop("optimizers", list(start))
    for key, value in arm.items():
        table[key] = table[key] | value if isinstance(value, dict) and key not in ("plan", "sizes") else value
    if "tuning" not in arm:
        del table["tuning"]
        table |= {"rates_from": base, "learning_rates": {name: [start[name]["lr"]] for name in names}}
    return table


def read_scale(name: str) -> Scale:
    """The scale file of that name; of "pocket+lion" that of pocket, with one optimizer from outside in place of all.

    An arm of a scale, "confirm2+decay", has a file of its own, which says how it differs (see `of_arm`).

    ValueError for an unknown scale, and, naming file and key, for what does not fit.
    """
    parse(name, ScaleName, "the name of a scale")
    base, _, own = name.partition("+")
    file = paths.SCALES / f"{base}.toml"
    if not file.exists():
        choose("scale", base, scales())
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
        arm = paths.SCALES / f"{name}.toml"
        if own and arm.exists():
            file = arm
            table = of_arm(table, tomllib.loads(arm.read_text(encoding="utf-8")), base)
        elif own:  # an optimizer from outside
            file = optimizer_file(name)
            table = beside(table, name)
        scale: Scale = parse(table, Scale, "")
    except RecursionError:
        raise ValueError(f"{file}: nested too deeply") from None
    except ValueError as error:  # TOML that cannot be read is one, too
        raise ValueError(f"{file}: {error}") from None
    return scale
