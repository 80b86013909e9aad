"""From the folders of runs to the tidy tables of a study, and from another machine's tables into them."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from beyond_outliers import checksums
from beyond_outliers.config.scale import PURPOSES
from beyond_outliers.study.common_loss import common_loss, given_beside
from beyond_outliers.study.measure import measure_folder
from beyond_outliers.study.own import take_up
from beyond_outliers.study.tables import MEASURED, TABLES, MissingResults, check_table, read_table
from beyond_outliers.study.trajectory import trajectory_file
from beyond_outliers.train.folder import RunResult, check

if TYPE_CHECKING:
    from beyond_outliers.study.study import Study


def collect(study: "Study") -> None:
    """Writes a study's own tables, of the runs that have ended; rows of planned runs that ended elsewhere stay.

    MissingResults when there is nothing to write.
    """
    purposes: dict[str, list[str]] = {}
    for planned in study.planned():
        purposes.setdefault(planned.config.name, []).append(planned.purpose)
    results = {p.config.name: r for p in study.planned() if (r := study.result(p)) is not None and is_whole(r)}
    if not results and not (study.results / "runs.csv").exists():
        raise MissingResults(f"no run of {study.scale} has ended: run `make reproduce SCALE={study.scale}` first")
    by_seed = study.protocol.measure.trajectory
    take_up(study)
    kept = set(purposes)
    _write(
        study, "runs", [pd.DataFrame([{"purpose": "+".join(purposes[n]), **r.row} for n, r in results.items()])], kept
    )
    curves = [r.metrics.assign(run=name) for name, r in results.items()]
    if by_seed:  # hundreds of runs: the evaluations alone, or this table would be larger than all others
        curves = [curve.dropna(subset="val_loss") for curve in curves]
    _write(study, "curves", curves, kept)
    common = _common_by_seed(study) if by_seed else study.common_losses(set(results))
    checkpoints = [(name, "final", r.row["steps"]) for name, r in results.items()]
    checkpoints += [
        (row.run, "common", row.step) for table in common for row in table.itertuples() if row.run in results
    ]
    parts: dict[str, list[pd.DataFrame]] = {}
    for name in MEASURED:
        files = [(c, measure_folder(results[run].folder, step) / f"{name}.csv") for run, c, step in checkpoints]
        parts[name] = [read_table(f).assign(checkpoint=checkpoint) for checkpoint, f in files if f.exists()]
    if by_seed:
        along = [trajectory_file(result) for result in results.values()]
        parts["trajectory"] = [read_table(file) for file in along if file.exists()]
    for name, tables in parts.items():
        _write(study, name, tables, kept)
    if by_seed and common:  # of all rows, wherever they were made
        checksums.write_text(study.results / "common_loss.csv", pd.concat(common).to_csv(index=False))
    elif common:
        _write(study, "common_loss", common, {run for run, of in purposes.items() if "full_precision" in of})


def _common_by_seed(study: "Study") -> list[pd.DataFrame]:
    """The Common Loss of every size and seed whose runs are all in the tables."""
    runs = study.runs("full_precision")
    if runs.empty:
        return []
    complete = runs.groupby(["size", "seed"]).optimizer.transform("nunique") == len(study.protocol.optimizers)
    return [common_loss(runs[complete], study.table("curves"), ("size", "seed"), given_beside(study))]


def _write(study: "Study", name: str, tables: list[pd.DataFrame], kept: set[str]) -> None:
    """The table of these rows plus the committed ones of runs in `kept` that have no folder here."""
    tables = [table for table in tables if len(table)]
    if not tables:
        return
    table = pd.concat(tables, ignore_index=True)
    table = table[["run", *[column for column in table.columns if column != "run"]]]
    file = study.results / f"{name}.csv"
    if file.exists():
        check_table(study.results, name)
        old = read_table(file)
        old = old[old.run.isin(kept) & ~old.run.isin(set(table.run))]
        table = pd.concat([table, old], ignore_index=True) if len(old) else table
    checksums.write_text(file, table.to_csv(index=False))


def adopted(study: "Study", wanted: Iterable[str], at_common_loss: bool = False) -> set[str]:
    """Runs of the tables that are complete there: diverged, or with rows in every table of `wanted`.

    at_common_loss: also rows measured at the Common Loss, which its whole size and seed must have reached.
    """
    if not (study.results / "runs.csv").exists():
        return set()
    runs = study.table("runs")
    names = set(runs.run)
    for name in wanted:
        file = study.results / f"{name}.csv"
        check_table(study.results, name)
        rows = (
            read_table(file, usecols=lambda c: c in ("run", "checkpoint"))
            if file.exists()
            else pd.DataFrame(columns=["run", "checkpoint"])
        )
        if at_common_loss and "checkpoint" in rows:
            rows = rows[rows.checkpoint == "common"]
        names &= set(rows.run)
    return names | set(runs.run[runs.status == "diverged"])


def done(study: "Study") -> set[str]:
    """Names of the planned runs that are trained and measured: here, or complete in the tables."""
    along = ("trajectory",) if study.protocol.measure.trajectory else ()
    wanted = {"sweep": MEASURED, "full_precision": MEASURED + along}  # of QAT there is accuracy alone
    complete = {
        purpose: adopted(study, wanted.get(purpose, ("zero_shot",)), bool(along) and purpose == "full_precision")
        for purpose in PURPOSES
    }
    found = set()
    for planned in study.planned():
        result = study.result(planned)
        here = result is not None and is_measured(study, result, planned.purpose)
        if here or planned.config.name in complete[planned.purpose]:
            found.add(planned.config.name)
    return found


def is_whole(result: RunResult) -> bool:
    """Whether all that the tables take from a run is what was written; a warning says what is not."""
    along = trajectory_file(result)
    try:
        check(result.folder, "metrics.csv", *([along.name] if along.exists() else []))
        for folder in result.folder.glob("measure-*"):
            check(folder)
    except checksums.DamagedFile as damage:
        warnings.warn(f"left out of the tables: {damage}", stacklevel=2)
        return False
    return True


def is_measured(study: "Study", result: RunResult, purpose: str) -> bool:
    """Whether everything that a purpose asks for has been measured on a run that ended here."""
    if result.row["status"] != "finished":
        return True
    folder = measure_folder(result.folder, result.row["steps"])
    full = (folder / "full.done").exists()
    if purpose == "sweep":
        return full or (folder / "light.done").exists()
    along = purpose == "full_precision" and study.protocol.measure.trajectory
    return full and (not along or trajectory_file(result).exists())


def merge(study: "Study", folder: Path) -> pd.DataFrame:
    """Pools the tables in `folder` (another machine's data/results/SCALE) with this scale's, run by run.

    A run in both is kept as it is here; what it gave on either machine is written to the table `machines`. Returns
    those runs with both losses and their difference, one row each.
    ValueError for a folder without the table `runs`, or with runs that this scale does not plan.
    """
    if not (folder / "runs.csv").exists():
        raise ValueError(f"{folder} has no runs.csv; valid: a folder like {study.results}")
    theirs = read_table(folder / "runs.csv")
    here = study.results / "runs.csv"
    ours = read_table(here) if here.exists() else theirs.iloc[:0]
    if (strangers := set(theirs.scale) - {study.scale}) and len(theirs):
        raise ValueError(f"{folder} holds runs of scale {', '.join(sorted(strangers))}, not of {study.scale}")
    new = set(theirs.run) - set(ours.run)
    study.results.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        source, target = folder / f"{name}.csv", study.results / f"{name}.csv"
        if name in ("common_loss", "machines") or not source.exists():
            continue
        check_table(folder, name)
        check_table(study.results, name)
        table = read_table(source)
        if name == "learning_rates":
            keys = ["size", "optimizer"]
            old = read_table(target) if target.exists() else table[:0]
            known = set(map(tuple, old[keys].values))
            table = table[[tuple(key) not in known for key in table[keys].values]]
        else:
            table = table[table.run.isin(new)]
            old = read_table(target) if target.exists() else table[:0]
        if table.empty and target.exists():
            continue  # as it is, byte by byte
        checksums.write_text(target, pd.concat([old, table], ignore_index=True).to_csv(index=False))
    both = ours.merge(theirs, on="run", suffixes=("_here", "_there"))
    columns = ["run", "val_loss_here", "val_loss_there", "device_name_here", "device_name_there"]
    both = both[columns].assign(difference=(both.val_loss_here - both.val_loss_there).abs())
    file = study.results / "machines.csv"
    old = [read_table(file)] if file.exists() else []
    elsewhere = both[both.device_name_here != both.device_name_there]
    known = pd.concat([*old, elsewhere], ignore_index=True).drop_duplicates(["run", "device_name_there"], keep="last")
    if len(known):
        checksums.write_text(file, known.to_csv(index=False))
    return both
