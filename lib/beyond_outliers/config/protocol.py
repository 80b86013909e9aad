"""A scale of the study, described by data/scales/SCALE.toml: which runs, in which order, with which settings.

The learning rates of the main runs come from the sweep's results, so a protocol expands in two steps: `sweep_runs()`
needs nothing; `runs(learning_rates)` needs what `choose_learning_rate` made of the finished sweep. No torch here.
"""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

from beyond_outliers import paths
from beyond_outliers.config.learning_rates import read_learning_rates
from beyond_outliers.config.run import CorpusConfig, Olmo2Config, RunConfig

OPTIMIZER_NAMES = ("adamw", "muon", "psgd", "scion", "shampoo", "soap")  # in the paper's order
SECTIONS = {"threads", "corpus", "training", "sizes", "learning_rates", "hyper", "plan", "measure", "tuning"}
PURPOSES = ("sweep", "full_precision", "qat", "schemes")
PLAN = {
    "sweep": {"sizes", "seeds"},
    "full_precision": {"sizes", "seeds"},
    "qat": {"sizes", "seeds", "scheme"},
    "schemes": {"sizes", "seeds", "optimizers", "schemes"},
}
MEASURE = {"questions", "validation_tokens", "propagation_tokens", "formats"}
RESOLVED = {"scale", "size", "optimizer", "lr", "model", "corpus", "seed", "hyper", "quantization"}  # not in [training]


@dataclass(frozen=True)
class Planned:
    """A run of the study and why it is there."""

    purpose: str  # one of PURPOSES
    config: RunConfig


def _fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def _keys(path: Path, where: str, given: dict, valid: set[str], optional: set[str] = frozenset()) -> None:
    """ValueError unless `given` has the `valid` keys and no others; only the `optional` ones may be missing."""
    if unknown := set(given) - valid:
        raise ValueError(f"{path}: {where} has unknown keys {sorted(unknown)}; valid: {', '.join(sorted(valid))}")
    if missing := valid - optional - set(given):
        raise ValueError(f"{path}: {where} lacks {sorted(missing)}")


def scales() -> list[str]:
    """Names of the scales that data/scales describes."""
    return sorted(file.stem for file in paths.SCALES.glob("*.toml"))


@dataclass(frozen=True)
class Protocol:
    """A parsed scale file. `raw` is its content, checked."""

    scale: str
    raw: dict

    @classmethod
    def load(cls, scale: str) -> "Protocol":
        """ValueError for an unknown scale or a file with unknown or missing parts."""
        path = paths.SCALES / f"{scale}.toml"
        if not path.exists():
            raise ValueError(f"unknown scale {scale!r}; valid: {', '.join(scales())}")
        protocol = cls(scale, tomllib.loads(path.read_text()))
        protocol._check(path)
        return protocol

    def _check(self, path: Path) -> None:
        raw = self.raw
        _keys(path, "the file", raw, SECTIONS, optional={"hyper", "tuning"})
        _keys(path, "[corpus]", raw["corpus"], _fields(CorpusConfig), optional=_fields(CorpusConfig))
        settings = _fields(RunConfig) - RESOLVED
        _keys(path, "[training]", raw["training"], settings, optional=settings)
        for size, shape in raw["sizes"].items():
            shapes = _fields(Olmo2Config) - {"vocab_size"}
            _keys(path, f"size {size}", shape, shapes, optional=shapes)
        _keys(path, "[learning_rates]", raw["learning_rates"], set(OPTIMIZER_NAMES))
        _keys(path, "[hyper]", raw.get("hyper", {}), set(OPTIMIZER_NAMES), optional=set(OPTIMIZER_NAMES))
        _keys(path, "[measure]", raw["measure"], MEASURE)
        _keys(path, "[plan]", raw["plan"], set(PURPOSES), optional=set(PURPOSES[1:]))
        lengths = {len(grid) for grid in raw["learning_rates"].values()}
        if len(lengths) > 1:
            raise ValueError(f"{path} gives grids of different lengths {sorted(lengths)}: tune all optimizers alike")
        for purpose, plan in raw["plan"].items():
            _keys(path, f"plan.{purpose}", plan, PLAN[purpose])
            for size in plan["sizes"]:
                if size not in self.sizes:
                    raise ValueError(f"{path}: plan.{purpose} names size {size!r}; valid: {', '.join(self.sizes)}")
                if isinstance(plan["seeds"], dict) and size not in plan["seeds"]:
                    raise ValueError(f"{path}: plan.{purpose}.seeds has no seeds for size {size!r}")
            for name in plan.get("optimizers", ()):
                if name not in OPTIMIZER_NAMES:
                    raise ValueError(f"{path}: plan.{purpose} names optimizer {name!r}; valid: {OPTIMIZER_NAMES}")

    # ------------------------------------------------------------------------------------------------------- settings

    @property
    def sizes(self) -> list[str]:
        """Size names, smallest first."""
        return list(self.raw["sizes"])

    @property
    def threads(self) -> int:
        return self.raw["threads"]

    @property
    def measure(self) -> dict:
        return self.raw["measure"]

    @property
    def corpus(self) -> CorpusConfig:
        settings = dict(self.raw["corpus"])
        if "wheels" in settings:
            settings["wheels"] = tuple(settings["wheels"])
        return CorpusConfig(**settings)

    def model(self, size: str) -> Olmo2Config:
        if size not in self.sizes:
            raise ValueError(f"unknown size {size!r} of scale {self.scale}; valid: {', '.join(self.sizes)}")
        return Olmo2Config(vocab_size=self.corpus.vocab_size, **self.raw["sizes"][size])

    def grid(self, optimizer: str) -> list[float]:
        if optimizer not in OPTIMIZER_NAMES:
            raise ValueError(f"unknown optimizer {optimizer!r}; valid: {', '.join(OPTIMIZER_NAMES)}")
        return self.raw["learning_rates"][optimizer]

    def config(
        self, size: str, optimizer: str, lr: float | None = None, seed: int = 0, scheme: str | None = None
    ) -> RunConfig:
        """The resolved run. `lr` None: the sweep's choice where there is one, else the middle of the grid."""
        if lr is None:
            grid = self.grid(optimizer)
            chosen = read_learning_rates(self.scale).get((self.tuning_size(size), optimizer))
            lr = chosen or grid[len(grid) // 2]
        return RunConfig(
            scale=self.scale,
            size=size,
            optimizer=optimizer,
            lr=lr,
            seed=seed,
            model=self.model(size),
            corpus=self.corpus,
            hyper=self.raw.get("hyper", {}).get(optimizer, {}),
            quantization={"scheme": scheme, "weights": "int4", "activations": "int4"} if scheme else None,
            **self.raw["training"],
        )

    # ------------------------------------------------------------------------------------------------------- expansion

    def _plan(self, purpose: str):
        """(size, seed, optimizer, plan) in the order that leaves a usable study at every stopping point."""
        plan = self.raw["plan"].get(purpose)
        for size in self.sizes if plan else ():
            if size in plan["sizes"]:
                seeds = plan["seeds"][size] if isinstance(plan["seeds"], dict) else plan["seeds"]
                for seed in seeds:
                    for optimizer in plan.get("optimizers", OPTIMIZER_NAMES):
                        yield size, seed, optimizer, plan

    def sweep_runs(self, size: str | None = None) -> list[Planned]:
        """Every learning rate of every grid, at the sizes and seeds of plan.sweep, or at one size alone."""
        return [
            Planned("sweep", self.config(swept, optimizer, lr=lr, seed=seed))
            for swept, seed, optimizer, _ in self._plan("sweep")
            if size in (None, swept)
            for lr in self.grid(optimizer)
        ]

    def tuning_size(self, size: str) -> str:
        """The swept size whose learning rate `size` takes: the largest one not above it, else the smallest."""
        swept = self.raw["plan"]["sweep"]["sizes"]
        below = [s for s in self.sizes[: self.sizes.index(size) + 1] if s in swept] if size in self.sizes else []
        return below[-1] if below else swept[0]

    def runs(self, learning_rates: dict[tuple[str, str], float], size: str | None = None) -> list[Planned]:
        """The main runs, of all sizes or of one, size by size: full precision, then QAT, then the schemes compared.

        `learning_rates` maps (swept size, optimizer) to the chosen rate. Sizes whose rates are not there, because their
        sweep has not ended, are left out. QAT takes the full-precision rate, as in the paper.
        """
        planned = []
        for purpose in PURPOSES[1:]:
            for at, seed, optimizer, plan in self._plan(purpose):
                lr = learning_rates.get((self.tuning_size(at), optimizer))
                if lr is not None and size in (None, at):
                    schemes = plan.get("schemes") or [plan.get("scheme")]
                    configs = [self.config(at, optimizer, lr=lr, seed=seed, scheme=scheme) for scheme in schemes]
                    planned += [Planned(purpose, config) for config in configs]
        order = {size: number for number, size in enumerate(self.sizes)}
        return sorted(planned, key=lambda p: order[p.config.size])  # stable: the order within a size stays

    def purposes(self, size: str) -> list[str]:
        """What the runs of a size are for, in the order of PURPOSES."""
        plan = self.raw["plan"]
        return [purpose for purpose in PURPOSES if size in plan.get(purpose, {}).get("sizes", ())]

    def find(self, name: str) -> Planned:
        """The planned run of that name; ValueError when the protocol has none."""
        planned = self.sweep_runs() + self.runs(read_learning_rates(self.scale))
        for candidate in planned:
            if candidate.config.name == name:
                return candidate
        raise ValueError(f"scale {self.scale} plans no run {name!r}; valid: {[p.config.name for p in planned]}")
