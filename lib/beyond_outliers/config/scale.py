"""A scale file, data/scales/SCALE.toml, as frozen dataclasses: one class a section, one field a key."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from beyond_outliers import paths
from beyond_outliers.config.loading import is_own
from beyond_outliers.config.outside import arm_file, beside, optimizer_file
from beyond_outliers.config.parsing import Name, between, check_keys, check_values, choose, different, parse
from beyond_outliers.config.rates import Rates, read_rates
from beyond_outliers.config.registry import REGISTRY, ROLE_RATES, ordered
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

# what runs are for, in their order, and what [plan.PURPOSE] has beside sizes and seeds
KEYS: dict[str, tuple[str, ...]] = {
    "sweep": (),
    "full_precision": (),
    "branches": ("at",),
    "qat": ("scheme", "head"),
    "schemes": ("schemes", "optimizers"),
}
PURPOSES = tuple(KEYS)
SHAPE = {"architecture", *(part.name for part in fields(ModelConfig))} - {"vocab_size"}  # keys of a size
MOST_STEPS = 10**8

Names = Annotated[tuple[Name, ...], different()]
Seeds = Annotated[tuple[Seed, ...], different()]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How the runs of an arm differ from the main runs of its scale: factors of both rates, decay, hyperparameters.

    decay: rate times weight decay times steps, the same for matrices and embeddings; vectors are never decayed.
    """

    label: str = ""
    lr: Annotated[float, between(1e-3, 1e3)] = 1  # times 1 a rate stays as it is, bit by bit
    auxiliary: Annotated[float, between(1e-3, 1e3)] = 1
    decay: Annotated[float, between(0, 100)] = 0.0
    hyper: dict[str, bool] = field(default_factory=dict)

    def of(self, config: RunConfig) -> RunConfig:
        """The run that differs so from `config`, which has its rates already."""
        hyper = config.hyper | self.hyper
        if not self.decay:
            return config.replace(hyper=hyper)
        each = [self.decay / rate / config.steps for rate in (config.lr, hyper["embedding_lr"])]
        return config.replace(weight_decay=each[0], hyper={**hyper, "embedding_decay": each[1]})


@dataclass(frozen=True, kw_only=True)
class Runs:
    """[plan.PURPOSE]: what is run for it. Seeds: of all sizes, or one list a size.

    scheme, schemes: of quantization-aware training, one or several to be compared. head: whether the output head is
    quantized, too. optimizers: where it is not all of the scale. variants: of every run, in an arm.

    at: of branches, the shares of its tokens at which they leave a full-precision run, their trunk. A branch is 5/4 as
    long as what it has of its trunk: its learning rate falls to 0 over its last fifth. The shares lie in the trunk's
    constant part: 85 % of the tokens would have a quarter of the decay behind them.
    """

    sizes: Names
    seeds: Seeds | dict[str, Seeds]
    variants: tuple[Variant, ...] = (Variant(),)
    at: Annotated[tuple[Share, ...], different()] | None = None
    scheme: Name | None = None
    head: bool = False
    schemes: Names | None = None
    optimizers: Names | None = None

    def seeds_at(self, size: str) -> tuple[int, ...]:
        return self.seeds[size] if isinstance(self.seeds, dict) else self.seeds

    def branches(self, trunk: RunConfig) -> Iterator[tuple[RunConfig, int]]:
        """Every branch of a run and the step at which it starts: one run of that length until then, warm-up and all."""
        for share in self.at or ():
            branch = trunk.replace(tokens_per_parameter=round(1.25 * share * trunk.tokens_per_parameter, 9), decay=0.2)
            yield branch.replace(warmup=trunk.warmup * trunk.steps / branch.steps), round(share * trunk.steps)

    @property
    def quantizations(self) -> list[dict[str, Any] | None]:
        """Of each run, `RunConfig.quantization`; one run for every entry."""
        return [qat(scheme, self.head) if scheme else None for scheme in self.schemes or (self.scheme,)]


def qat(scheme: str, head: bool = False) -> dict[str, Any]:
    """`RunConfig.quantization` of quantization-aware training in W4A4; run ids are hashed from it."""
    return {"scheme": scheme, "weights": "int4", "activations": "int4"} | ({"head": True} if head else {})


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """[tuning]: every size is tuned, by the rule of the module `rates`: along lines, or with `shape` over pairs."""

    seeds: Seeds  # a search along lines has one
    factor: Annotated[float, between(1.1, 10)]  # between neighbouring rates
    tolerance: Annotated[float, between(0, 1)]  # nats
    start: dict[str, Rates]
    shape: tuple[Annotated[int, between(3, 12)], ...] = ()  # of the grid: matrix rates, auxiliary rates
    finalists: Annotated[int, between(1, 100)] = 4
    cross_seeds: dict[str, Annotated[int, between(1, 100)]] = field(default_factory=dict)  # by size but the smallest


@dataclass(frozen=True, kw_only=True)
class Measure:
    """[measure]: on how much, and in which formats, every trained model is measured."""

    questions: Annotated[int, between(1, 2**24)]  # at most, of every zero-shot task
    validation_tokens: Tokens  # for losses after quantization
    propagation_tokens: Tokens  # for the error decomposition and the outlier metrics
    formats: Annotated[tuple[str, ...], different(least=0)] = ()  # each for weights alone, and for both
    specs: Annotated[tuple[str, ...], different(least=0)] = ()  # in place of formats: by name, as in table ptq
    primary: str = "W4A4"  # the spec by which claims judge
    calibration_tokens: Tokens = 16_384  # of training text, for specs with +gptq
    trajectory: bool = False  # whether the checkpoints along a run are measured, too
    common_by_seed: bool = False  # whether every seed has a Common Loss of its own
    readings: Annotated[tuple[str, ...], different()] | None = None  # specs in which all that an end tells is read

    def __post_init__(self) -> None:
        if bool(self.formats) == bool(self.specs):
            raise ValueError("either formats or specs must say in which formats models are measured")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A whole scale file. Learning rates: from a sweep over grids ([learning_rates]), or from a search ([tuning]).

    A size that is not swept takes the rates of the next smaller one that is, or has its own in `rates`, one pair for
    each optimizer; `rates_from` names the tuned scale that chose those.
    """

    threads: Annotated[int, between(1, 1024)]  # CPU threads a run
    corpus: CorpusConfig
    training: Training
    sizes: dict[Name, dict[str, Any]]  # smallest first; shapes, see `model`
    plan: dict[str, Runs]  # by purpose
    measure: Measure
    learning_rates: dict[str, Annotated[tuple[Rate, ...], different()]] = field(default_factory=dict)
    hyper: dict[str, dict[str, Any]] = field(default_factory=dict)  # what an optimizer takes, `study.check` asks it
    tuning: Tuning | None = None
    rates: dict[Name, dict[str, Rates]] = field(default_factory=dict)
    rates_from: Name | None = None
    labels: dict[str, str] = field(default_factory=dict)  # of optimizers from outside, in figures and sentences

    def __post_init__(self) -> None:
        for complaint in self._complaints():
            raise ValueError(complaint)

    def _complaints(self) -> Iterator[str]:
        """Where sections do not fit each other."""
        sizes, tuning, training = list(self.sizes), self.tuning, self.training
        start, subjects = tuning.start if tuning else {}, [name for name, entry in REGISTRY.items() if entry.subject]
        for where, given in (("hyper", self.hyper), ("learning_rates", self.learning_rates), ("tuning.start", start)):
            check_keys(where, [name for name in given if not is_own(name)], [*subjects, "module:Class of your own"])
        check_keys("labels", self.labels, [name for name in self.optimizers if is_own(name)])
        check_values(self.hyper, "hyper")
        check_keys("plan", self.plan, PURPOSES, [] if self.rates_from else ["full_precision"])
        for name, given in self.hyper.items():
            if tuning and (twice := sorted(ROLE_RATES.keys() & given)):
                yield f"hyper.{name} has {twice}, which [tuning] chooses"
        if bool(self.learning_rates) == bool(start):
            yield "the file must have learning rates in either [learning_rates] or [tuning.start]"
        if ("sweep" in self.plan) == bool(tuning) and not self.rates_from:
            yield "[learning_rates] asks for [plan.sweep]; [tuning], which tunes every size, for none"
        if tuning:
            most, crossed = len(tuning.seeds), tuning.cross_seeds
            if len(tuning.shape) not in (0, 2) or (not tuning.shape and most > 1):
                yield f"tuning.shape must be two numbers, or none with one seed, not {list(tuning.shape)} with {most}"
            if list(crossed) != sizes[1:] * bool(tuning.shape) or max(crossed.values(), default=1) > most:
                yield (
                    f"tuning.cross_seeds must be of every size but the smallest, {sizes[1:]}, where there is a shape, "
                    f"and at most the {most} seeds, not {crossed}"
                )
            for name, rates in start.items():
                if rates.auxiliary is None:
                    yield f"tuning.start.{name} lacks ['auxiliary']"
        if (bool(self.rates_from) != bool(self.rates) and ("sweep" in self.plan or tuning)) or (tuning and self.rates):
            yield f"rates_from = {self.rates_from!r} and [rates] ask for each other, and for no [tuning]"
        for size, row in self.rates.items():
            swept = self.plan["sweep"].sizes if "sweep" in self.plan else ()
            if size not in sizes or size in swept or {*row} != {*self.optimizers}:
                yield f"rates.{size} must be of a size that is not swept, and of {', '.join(self.optimizers)}"
        if len(lengths := {len(grid) for grid in self.learning_rates.values()}) > 1:
            yield f"[learning_rates] has grids of different lengths {sorted(lengths)}: tune all optimizers alike"

        if len({size.lower() for size in sizes}) < len(sizes) or not sizes:
            yield f"[sizes] has no size, or names that differ in case alone: {', '.join(sizes)}"
        counts = [self.model(size).n_parameters for size in sizes]
        if counts != sorted(counts):
            yield f"[sizes] must have the smallest size first, not {', '.join(sizes)} ({counts})"
        for size, count in zip(sizes, counts, strict=True):
            if not training.evaluations <= (steps := training.steps_of(count)) <= MOST_STEPS:
                yield (
                    f"sizes.{size} is trained for {steps:,} steps of {training.tokens_per_step:,} tokens; valid: from "
                    f"{training.evaluations} (training.evaluations) to {MOST_STEPS:,}"
                )
        for purpose, runs in self.plan.items():
            told = [key for key in set().union(*KEYS.values()) if getattr(runs, key)]
            check_keys(f"plan.{purpose}", told, KEYS[purpose], set(KEYS[purpose]) - {"head"})
            seeds = runs.seeds if isinstance(runs.seeds, dict) else dict.fromkeys(runs.sizes)
            for size in (*runs.sizes, *seeds):
                if size not in sizes:
                    yield f"plan.{purpose} names size {size!r}; valid: {', '.join(sizes)}"
                if size not in seeds:
                    yield f"plan.{purpose}.seeds has no seeds for size {size!r}"
            last = 1 - training.decay
            if not 0 < min(shares := runs.at or (last,)) <= max(shares) <= last:
                yield f"plan.{purpose}.at must be above 0 and at most {last:g} (1 - training.decay), not {shares}"
            for name in runs.optimizers or ():
                if name not in self.optimizers:
                    yield f"plan.{purpose} names optimizer {name!r}; valid: {', '.join(self.optimizers)}"
        for section, part in (("training", training), ("measure", self.measure)):
            for key, tokens in vars(part).items():
                if key.endswith("_tokens") and tokens < training.context:
                    yield f"{section}.{key} must be {training.context} (training.context) or more, not {tokens}"

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers that the file gives learning rates, in the order of the registry, those from outside last."""
        return tuple(ordered(self.tuning.start if self.tuning else self.learning_rates))

    def model(self, size: str) -> ModelConfig:
        """The shape of a size, with the defaults of its architecture for what the file leaves out."""
        choose("size", size, self.sizes)
        check_keys(f"sizes.{size}", self.sizes[size], SHAPE, ("width", "depth", "n_heads"))
        try:
            return model_config(vocab_size=self.corpus.vocab_size, **self.sizes[size])
        except ValueError as error:
            raise ValueError(f"sizes.{size}: {error}") from None

    def runs(self, purpose: str) -> Runs | None:
        """What is run for a purpose, None for nothing; the sweep of a tuned scale is of all its sizes."""
        choose("purpose", purpose, PURPOSES)
        if purpose == "sweep" and self.tuning:
            return Runs(sizes=tuple(self.sizes), seeds=self.tuning.seeds[:1])
        return self.plan.get(purpose)


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
        rates = dict[str, dict]()
        for (size, name), chosen in read_rates(base).items():
            if name in names:
                rates.setdefault(size, {})[name] = vars(chosen)
        table |= {"rates_from": base, "rates": rates, "learning_rates": {name: [start[name]["lr"]] for name in names}}
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
        if own and (arm := arm_file(name)).exists():
            file = arm
            table = of_arm(table, tomllib.loads(arm.read_text(encoding="utf-8")), base)
        elif own:
            file = optimizer_file(name)
            table = beside(table, name)
        scale: Scale = parse(table, Scale, "")
    except (RecursionError, ValueError) as error:  # nested too deeply; TOML that cannot be read
        raise ValueError(f"{file}: {error}") from None
    return scale
