"""A study of one scale: which runs, what is done, and the tidy tables that notebooks read.

`Study("pocket").table("runs")` reads data/results/pocket/runs.csv; `Study("pocket").ensure()` trains and measures what
is missing first. The workflow (Snakefile) calls the same steps one by one, in parallel:

    python -m beyond_outliers.study {corpus,train,choose,measure,collect,notebook,render,plan,where} --scale pocket ...
"""

import warnings

import pandas as pd
from tqdm.auto import tqdm

from beyond_outliers import paths
from beyond_outliers.config.learning_rates import (
    EdgeWarning,
    choose_learning_rate,
    learning_rates_file,
    read_learning_rates,
)
from beyond_outliers.config.protocol import OPTIMIZER_NAMES, Planned, Protocol
from beyond_outliers.study.tables import MEASURED, TABLES, MissingResults


class Study:
    """The runs and tables of one scale."""

    def __init__(self, scale: str):
        self.protocol = Protocol.load(scale)
        self.scale = scale
        self.results = paths.RESULTS / scale
        self.runs_folder = paths.RUNS / scale

    # --------------------------------------------------------------------------------------------------------- tables

    def table(self, name: str) -> pd.DataFrame:
        """A result table. ValueError for an unknown name, MissingResults (with the remedy) when it is not there yet."""
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}; valid: {', '.join(TABLES)}")
        file = self.results / f"{name}.csv"
        if not file.exists():
            raise MissingResults(f"{file} is not there: run `make reproduce SCALE={self.scale}` first")
        return pd.read_csv(file)

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

    def planned(self, size: str | None = None) -> list[Planned]:
        """Every run that can be named now, of all sizes or of one: sweeps, and main runs whose sweep is done."""
        return self.protocol.sweep_runs(size) + self.protocol.runs(read_learning_rates(self.scale), size)

    def result(self, planned: Planned):
        """The run's result from its folder, None when it has not ended here."""
        from beyond_outliers.train.folder import load_result, run_folder

        return load_result(run_folder(planned.config, paths.RUNS))

    def complete(self) -> bool:
        """Whether the tables hold every planned run."""
        if not all((self.results / f"{name}.csv").exists() for name in TABLES):
            return False
        have, rates = set(self.table("runs").run), read_learning_rates(self.scale)
        swept = {(size, name) for size in self._sizes("sweep") for name in OPTIMIZER_NAMES}
        return swept <= set(rates) and all(planned.config.name in have for planned in self.planned())

    # ----------------------------------------------------------------------------------------------------------- steps

    def check(self) -> None:
        """ValueError now for a format or scheme of the protocol that would stop the study only after its training."""
        from beyond_outliers.quantizers.formats import choose
        from beyond_outliers.quantizers.trainable import SCHEMES
        from beyond_outliers.study.measure import specs

        for size in self.protocol.sizes:
            shape = self.protocol.model(size)
            for spec in specs(self.protocol.measure["formats"]):
                for width in (shape.width, shape.mlp_ratio * shape.width):  # what the linear layers take in
                    spec.check_width(width)
        for plan in self.protocol.raw["plan"].values():
            for scheme in plan.get("schemes", [plan["scheme"]] if "scheme" in plan else []):
                choose("scheme", scheme, SCHEMES)

    def train(self, planned: Planned, **options):
        """Trains (or resumes, or loads) one run with the protocol's number of threads."""
        from beyond_outliers.train.loop import train

        return train(planned.config, threads=self.protocol.threads, **options)

    def choose_learning_rates(self, size: str) -> pd.DataFrame:
        """Best learning rate of every optimizer at a swept size, from the sweep's final losses averaged over seeds.

        Returns the table `learning_rates` with the rows of that size replaced, and writes it.
        """
        rows = []
        found = pd.DataFrame([self._required(planned).row for planned in self.protocol.sweep_runs(size)])
        for optimizer, runs in found.groupby("optimizer", sort=False):
            losses = runs.groupby("lr").val_loss.apply(lambda values: values.mean(skipna=False))
            lr, edge = choose_learning_rate(list(losses.index), list(losses))
            if edge:
                warnings.warn(
                    f"{size}, {optimizer}: the best learning rate {lr:g} is at the edge of {list(losses.index)}",
                    EdgeWarning,
                    stacklevel=2,
                )
            grid = " ".join(f"{lr:g}" for lr in losses.index)
            rows.append(
                {"size": size, "optimizer": optimizer, "lr": lr, "edge": edge, "grid": grid, "n_runs": len(runs)}
            )
        table, file = pd.DataFrame(rows), learning_rates_file(self.scale)
        if file.exists():
            old = pd.read_csv(file)
            table = pd.concat([old[(old["size"] != size) & old["size"].isin(self._sizes("sweep"))], table])
        table = table.sort_values("size", key=lambda sizes: sizes.map(self.protocol.sizes.index), kind="stable")
        file.parent.mkdir(parents=True, exist_ok=True)
        paths.write_whole(file, table.to_csv(index=False))
        return table.reset_index(drop=True)

    def common_loss(self, size: str) -> pd.DataFrame:
        """The paper's Common Loss of a size, and the first checkpoint of every full-precision run that reaches it.

        Common Loss: the lowest validation loss that ALL runs of the size reach, diverged ones left out. Columns: size,
        common_loss, run, optimizer, seed, step (of that checkpoint), val_loss (there), final_step. No run, no row.
        """
        results = [self._required(p) for p in self._at("full_precision", size)]
        results = [r for r in results if r.row["status"] == "finished"]
        evaluations = [result.evaluations for result in results]
        threshold = max((table.val_loss.min() for table in evaluations), default=None)
        rows = []
        for result, table in zip(results, evaluations, strict=True):
            first = table[table.val_loss <= threshold].iloc[0]
            rows.append(
                {
                    "size": size,
                    "common_loss": threshold,
                    "run": result.config.name,
                    "optimizer": result.config.optimizer,
                    "seed": result.config.seed,
                    "step": int(first.step),
                    "val_loss": first.val_loss,
                    "final_step": result.row["steps"],
                }
            )
        columns = ["size", "common_loss", "run", "optimizer", "seed", "step", "val_loss", "final_step"]
        return pd.DataFrame(rows, columns=columns)

    def measure(self, purpose: str, size: str) -> None:
        """Measures the runs of a purpose and size: finals in full, Common Loss and sweep checkpoints lightly."""
        import torch

        from beyond_outliers.study.measure import measure_run

        torch.set_num_threads(self.protocol.threads)
        settings = self.protocol.measure
        common = dict(self.common_loss(size)[["run", "step"]].values) if purpose == "full_precision" else {}
        full = {p.config.name for p in self._at("full_precision", size)}  # a sweep run that is a main run, too
        for planned in tqdm(self._at(purpose, size), desc=f"measure {purpose} {size}", disable=None):
            result = self._required(planned)
            if result.row["status"] != "finished" or (purpose == "sweep" and planned.config.name in full):
                continue
            measure_run(result, result.row["steps"], "light" if purpose == "sweep" else "full", settings)
            if planned.config.name in common:
                measure_run(result, common[planned.config.name], "light", settings)

    def collect(self) -> None:
        """Writes the tables of data/results/SCALE from the folders of the runs that have ended; interrupted studies
        have tables, too. Rows of runs that ended elsewhere stay. MissingResults when there is nothing to write.
        """
        from beyond_outliers.study.measure import measure_folder

        purposes: dict[str, list[str]] = {}
        for planned in self.planned():
            purposes.setdefault(planned.config.name, []).append(planned.purpose)
        results = {p.config.name: r for p in self.planned() if (r := self.result(p)) is not None}
        if not results:
            raise MissingResults(f"no run of {self.scale} has ended: run `make reproduce SCALE={self.scale}` first")
        full = {size: self._at("full_precision", size) for size in self._sizes("full_precision")}
        ended = [size for size, runs in full.items() if runs and all(p.config.name in results for p in runs)]
        common = [self.common_loss(size) for size in ended]
        checkpoints = [(name, "final", r.row["steps"]) for name, r in results.items()]
        checkpoints += [(row.run, "common", row.step) for table in common for row in table.itertuples()]
        parts = {
            "runs": [pd.DataFrame([{"purpose": "+".join(purposes[n]), **r.row} for n, r in results.items()])],
            "curves": [r.metrics.assign(run=name) for name, r in results.items()],
            "common_loss": common,
        }
        for name in MEASURED:
            files = [(c, measure_folder(results[run].folder, step) / f"{name}.csv") for run, c, step in checkpoints]
            parts[name] = [pd.read_csv(f).assign(checkpoint=checkpoint) for checkpoint, f in files if f.exists()]
        self.results.mkdir(parents=True, exist_ok=True)
        for name, tables in parts.items():
            if tables:
                kept = {run for run, of in purposes.items() if name != "common_loss" or "full_precision" in of}
                table = self._merge(name, pd.concat(tables, ignore_index=True), kept)
                paths.write_whole(self.results / f"{name}.csv", table.to_csv(index=False))

    def _merge(self, name: str, table: pd.DataFrame, kept: set[str]) -> pd.DataFrame:
        """`table` plus the committed rows of runs in `kept` that have no folder here (trained on another machine)."""
        file = self.results / f"{name}.csv"
        table = table[["run", *[column for column in table.columns if column != "run"]]]
        if file.exists():
            old = pd.read_csv(file)
            old = old[old.run.isin(kept) & ~old.run.isin(set(table.run))]
            table = pd.concat([table, old], ignore_index=True) if len(old) else table
        return table

    def ensure(self, progress: bool = True) -> "Study":
        """Trains and measures, size by size, what the tables lack; `make reproduce` does it in parallel."""
        if self.complete():
            return self
        self.check()
        for size in self.protocol.sizes:
            tuned_at = self.protocol.tuning_size(size)
            for planned in self.protocol.sweep_runs(tuned_at):
                self.train(planned, progress=progress)
            self.choose_learning_rates(tuned_at)
            for planned in self.protocol.runs(read_learning_rates(self.scale), size):
                self.train(planned, progress=progress)
            for purpose in self.protocol.purposes(size):
                self.measure(purpose, size)
            self.collect()
        return self

    # --------------------------------------------------------------------------------------------------------- helpers

    def _sizes(self, purpose: str) -> list[str]:
        return [size for size in self.protocol.sizes if purpose in self.protocol.purposes(size)]

    def _at(self, purpose: str, size: str) -> list[Planned]:
        return [p for p in self.planned(size) if p.purpose == purpose]

    def _required(self, planned: Planned):
        result = self.result(planned)
        if result is None:
            raise MissingResults(
                f"run {planned.config.name} has not ended: run `make reproduce SCALE={self.scale}`, or "
                f"`python -m beyond_outliers.study train --scale {self.scale} --run {planned.config.name}`"
            )
        return result
