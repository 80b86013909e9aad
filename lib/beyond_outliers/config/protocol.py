"""A scale of the study, described by data/scales/SCALE.toml: which runs, in which order, with which settings.

The learning rates of the main runs come from the sweep's results, so a protocol expands in two steps: `sweep_runs()`
needs nothing (of a scale that is tuned, the losses so far: its search decides from run to run); `runs(rates)` needs
what was chosen when the sweep was done. No torch here.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from beyond_outliers.config.parsing import choose
from beyond_outliers.config.rates import Rates, auxiliary_rates, read_rates, runs_of_search
from beyond_outliers.config.registry import call, entry
from beyond_outliers.config.run import CorpusConfig, ModelConfig, RunConfig
from beyond_outliers.config.scale import PURPOSES, Measure, Runs, Scale, Tuning, qat, read_scale

Losses = Callable[[str], float | None]  # final validation loss of a run by its name, None while it has not ended


@dataclass(frozen=True)
class Planned:
    """A run of the study and why it is there."""

    level = property(lambda self: {"sweep": "light", "branches": "common"}.get(self.purpose, "full"))  # of measuring

    purpose: str  # one of PURPOSES
    config: RunConfig
    trunk: RunConfig | None = None  # of a branch: the run that it leaves after step `start`
    start: int = 0
    variant: str = ""  # of the runs of an arm: its label


@dataclass(frozen=True)
class Protocol:
    """A scale by name, and its file's settings."""

    scale: str
    settings: Scale

    @classmethod
    def load(cls, scale: str) -> "Protocol":
        """ValueError for an unknown scale, and for a file with unknown, missing or unfit parts."""
        settings = read_scale(scale)
        for name, label in settings.labels.items():
            call(name, label)
        return cls(scale, settings)

    # ------------------------------------------------------------------------------------------------------- settings

    @property
    def sizes(self) -> list[str]:
        """Size names, smallest first."""
        return list(self.settings.sizes)

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers of this scale, in the paper's order."""
        return self.settings.optimizers

    @property
    def threads(self) -> int:
        return self.settings.threads

    @property
    def measure(self) -> Measure:
        return self.settings.measure

    @property
    def corpus(self) -> CorpusConfig:
        return self.settings.corpus

    @property
    def tuned(self) -> bool:
        """Whether the learning rates come from a search at every size, not from a sweep over grids."""
        return self.settings.tuning is not None

    @property
    def tuning(self) -> Tuning:
        """The rule of a tuned scale; ValueError for one that is not."""
        if self.settings.tuning is None:
            raise ValueError(f"scale {self.scale} has no [tuning]; its learning rates come from grids")
        return self.settings.tuning

    def model(self, size: str) -> ModelConfig:
        """The shape of a size; ValueError for an unknown one."""
        return self.settings.model(size)

    @property
    def lent(self) -> dict[tuple[str, str], Rates]:
        """(size, optimizer) -> rates of the sizes for which the file has some, chosen by the scale `rates_from`."""
        return {(size, name): rates for size, row in self.settings.rates.items() for name, rates in row.items()}

    def rates(self, results: Path | None = None) -> dict[tuple[str, str], Rates]:
        """(size, optimizer) -> chosen rates, as far as they are known: the scale's own, and the lent ones.

        results: a folder of tables to read the scale's own from, where not the usual one is meant.
        """
        return read_rates(self.scale, results) | self.lent

    def grid(self, optimizer: str) -> list[float]:
        """The learning rates that are swept. ValueError for a tuned scale, which has none."""
        if self.tuned:
            raise ValueError(f"scale {self.scale} has no grids of learning rates; [tuning] searches for them")
        choose("optimizer", optimizer, self.optimizers)
        return list(self.settings.learning_rates[optimizer])

    def guess(self, optimizer: str) -> Rates:
        """Rates before anything is known: the middle of the grid, or the start of the tuning."""
        choose("optimizer", optimizer, self.optimizers)
        if self.tuned:
            return self.tuning.start[optimizer]
        return Rates((grid := self.grid(optimizer))[len(grid) // 2])

    def config(
        self,
        size: str,
        optimizer: str,
        lr: float | None = None,
        seed: int = 0,
        scheme: str | None = None,
        head: bool = False,
        auxiliary: float | None = None,
    ) -> RunConfig:
        """The resolved run. Rates that are None: the chosen ones where they are known, else `guess`.

        `auxiliary`, the rate of embedding and vectors, is for tuned scales; without one, [hyper] alone says.
        """
        entry(optimizer)  # there is one of that name
        model = self.model(size)
        both = self.tuned or size in self.settings.rates
        if lr is None or (auxiliary is None and both and optimizer in self.optimizers):
            known = self.rates().get((self.tuning_size(size), optimizer)) or self.guess(optimizer)
            lr = known.lr if lr is None else lr
            auxiliary = known.auxiliary if auxiliary is None else auxiliary
        hyper = dict(self.settings.hyper.get(optimizer, {}))
        if auxiliary is not None:
            hyper |= auxiliary_rates(optimizer, auxiliary, model.width)
        return RunConfig(
            scale=self.scale,
            size=size,
            optimizer=optimizer,
            lr=lr,
            seed=seed,
            model=model,
            corpus=self.corpus,
            hyper=hyper,
            quantization=qat(scheme, head) if scheme else None,
            **vars(self.settings.training),
        )

    # ------------------------------------------------------------------------------------------------------- expansion

    def _plan(self, purpose: str, size: str | None) -> Iterator[tuple[str, int, str, Runs]]:
        """(size, seed, optimizer, plan) of a size or of all, so that a study is usable at every stopping point."""
        if plan := self.settings.runs(purpose):
            for at in self.sizes:
                if at in plan.sizes and size in (None, at):
                    for seed, optimizer in itertools.product(plan.seeds_at(at), plan.optimizers or self.optimizers):
                        yield at, seed, optimizer, plan

    def sweep_runs(self, size: str | None = None, losses: Losses | None = None) -> list[Planned]:
        """The runs that the learning rates are chosen from, of all swept sizes or of one.

        Of grids: every rate at every seed. Of a tuned scale: what the search of each size and optimizer has asked for
        so far, and its next run; `losses` tells how the runs ended, by name (None: nothing has been run yet).
        """
        configs: list[RunConfig] = []
        for at, seed, optimizer, _ in self._plan("sweep", size):
            if self.tuned:
                configs += runs_of_search(self, at, optimizer, losses or (lambda name: None))
            else:
                configs += [self.config(at, optimizer, lr=lr, seed=seed) for lr in self.grid(optimizer)]
        return [Planned("sweep", config) for config in configs]

    def tuning_size(self, size: str) -> str:
        """The swept size whose learning rate `size` takes: the largest one not above it, else the smallest.

        Of a size with [rates] it is `size` itself.
        """
        swept = [at for at in self.sizes if at in self.settings.rates or "sweep" in self.purposes(at)]
        below = [at for at in self.sizes[: self.sizes.index(size) + 1] if at in swept] if size in self.sizes else []
        return [*swept[:1], *below][-1]

    def runs(self, rates: Mapping[tuple[str, str], Rates], size: str | None = None) -> list[Planned]:
        """The main runs, of all sizes or of one, size by size: full precision, its branches, QAT, the schemes compared.

        `rates` maps (swept size, optimizer) to the chosen rates. Sizes whose rates are not there, because their sweep
        has not ended, are left out. QAT takes the full-precision rates, as in the paper. ValueError for a tuned scale
        without an auxiliary rate.
        """
        planned = []
        for purpose in PURPOSES[1:]:
            for at, seed, optimizer, plan in self._plan(purpose, size):
                if (chosen := rates.get((self.tuning_size(at), optimizer))) is not None:
                    if self.tuned and chosen.auxiliary is None:
                        raise ValueError(f"{at}, {optimizer}: {chosen} lacks the auxiliary rate of scale {self.scale}")
                    for of in plan.variants:
                        lr, auxiliary = chosen.lr * of.lr, chosen.auxiliary and chosen.auxiliary * of.auxiliary
                        full = of.of(self.config(at, optimizer, lr=lr, seed=seed, auxiliary=auxiliary))
                        if purpose == "branches":
                            planned += [Planned(purpose, run, full, start) for run, start in plan.branches(full)]
                        else:
                            made = [full.replace(quantization=q) for q in plan.quantizations]
                            planned += [Planned(purpose, run, variant=of.label) for run in made]
        return sorted(planned, key=lambda p: self.sizes.index(p.config.size))  # stable: the order within a size stays

    def purposes(self, size: str | None = None) -> list[str]:
        """What the runs of a size, or of any size, are for, in the order of PURPOSES."""
        plans = ((purpose, self.settings.runs(purpose)) for purpose in PURPOSES)
        return [purpose for purpose, plan in plans if plan and (size is None or size in plan.sizes)]
