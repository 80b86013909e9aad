"""From the folders of runs to the tidy tables of a study, and from another machine's tables into them."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from beyond_outliers import checksums
from beyond_outliers.config.scale import PURPOSES
from beyond_outliers.study.common_loss import common_loss, given_beside
from beyond_outliers.study.publish import take_up
from beyond_outliers.study.tables import MEASURED, TABLES, MissingResults, check_table, read_table

if TYPE_CHECKING:
    from beyond_outliers.study.study import Study
    from beyond_outliers.train.folder import RunResult


def collect(study: "Study") -> None:
    """Writes a study's own tables, of the runs that have ended; rows of planned runs that ended elsewhere stay.

    MissingResults when there is nothing to write. Runs that are damaged are left out, and named by a DamagedFile after
    all others are written.
    """
    purposes, variants, results, damages = dict[str, str](), {}, {}, []
    for planned in study.planned():
        name = planned.config.name
        if planned.variant:
            variants[name] = planned.variant
        if name in purposes:
            purposes[name] += f"+{planned.purpose}"
            continue
        purposes[name] = planned.purpose
        try:
            if (result := study.result(planned)) is not None:
                check_whole(result)
                results[name] = result
        except checksums.DamagedFile as damage:
            damages.append(str(damage))
    if not results and not damages and not study.has("runs"):
        raise MissingResults(f"no run of {study.scale} has ended: run `make reproduce SCALE={study.scale}` first")
    by_seed = study.protocol.measure.common_by_seed
    take_up(study)
    kept = set(purposes)
    runs = pd.DataFrame([{"purpose": purposes[n], **r.row} for n, r in results.items()])
    _write(study, "runs", [runs.assign(variant=runs.run.map(variants)) if variants else runs], kept)
    curves = [r.metrics.assign(run=name) for name, r in results.items()]
    if by_seed:  # hundreds of runs: the evaluations alone, or this table would be larger than all others
        curves = [curve.dropna(subset="val_loss") for curve in curves]
    _write(study, "curves", curves, kept)
    common = _common(study)
    checkpoints = [(name, "final", r.row["steps"]) for name, r in results.items()]
    checkpoints += [(row.run, "common", row.step) for row in common.itertuples() if row.run in results]
    parts: dict[str, list[pd.DataFrame]] = {}
    for name in (*MEASURED, "readings"):
        files = [(c, results[run].folder / f"measure-{step:06d}" / f"{name}.csv") for run, c, step in checkpoints]
        parts[name] = [read_table(f).assign(checkpoint=checkpoint) for checkpoint, f in files if f.exists()]
    along = [result.folder / "trajectory.csv" for result in results.values()]
    parts["trajectory"] = [read_table(file) for file in along if file.exists()]
    for name, tables in parts.items():
        _write(study, name, tables, kept)
    if len(common):
        checksums.write_text(study.results / "common_loss.csv", common.to_csv(index=False))
    if "branches" in study.protocol.purposes() and study.has("readings"):
        checksums.write_text(study.results / "branches.csv", decayed(study).to_csv(index=False))
    if damages:
        raise checksums.DamagedFile("left out of the tables:\n" + "\n".join(damages))


def check_whole(result: "RunResult") -> None:
    """DamagedFile, with the remedy, unless all that the tables take from a run is what was written."""
    from beyond_outliers.train.folder import check

    check(result.folder, "metrics.csv")
    again = f"delete it and {result.folder}/*.done, and run the same command again, which measures it again"
    for folder in result.folder.glob("measure-*"):
        checksums.check(folder, remedy=again)
    checksums.check(result.folder, *(file.name for file in result.folder.glob("[mt]*.csv")), remedy=again)


def decayed(study: "Study") -> pd.DataFrame:
    """One row a fully decayed model of every run that has branches: the branches, and the run itself.

    Columns: run, size, optimizer, seed, tokens, val_loss; increase (nats, primary format) and increase_without_head;
    gain (mean over linear layers, the head among them where the primary format has it), R_L_token, R_L_centred_token.
    """
    cell, primary = ["size", "optimizer", "seed"], study.protocol.measure.primary
    branches = study.runs("branches")
    runs = pd.concat([branches, study.runs("full_precision").merge(branches[cell].drop_duplicates())]).set_index("run")
    measured = (study.table(name) for name in ("ptq", "propagation", "readings"))
    ptq, modules, ends = (table[table.checkpoint == "final"] for table in measured)
    increase = ptq.pivot(index="run", columns="spec", values="increase")
    linear = modules.query("attention == 'open' and kind == 'linear'").dropna(subset="gain")
    ends = ends[ends.spec == primary].pivot(index="run", columns="reading", values="value")
    table = runs.loc[runs.status == "finished", [*cell, "tokens", "val_loss"]].assign(
        increase=increase[primary],
        increase_without_head=increase[primary.replace("+head", "")],
        gain=linear[(linear.name != "head") | ("+head" in primary)].groupby("run").gain.mean(),
    )
    return table.join(ends[["R_L_token", "R_L_centred_token"]]).reset_index()


def _common(study: "Study") -> pd.DataFrame:
    """The Common Loss of every group whose runs are all in the tables, wherever they were made."""
    runs = study.runs("full_precision")
    groups = [{planned.config.name for planned in study.group(*group)} for group in study.groups()]
    complete = set().union(*(names for names in groups if names <= set(runs.run)))
    by = ("size", "seed") if study.protocol.measure.common_by_seed else ("size",)
    return common_loss(runs[runs.run.isin(complete)], study.table("curves"), by, given_beside(study))


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


def adopted(study: "Study") -> dict[str, set[str]]:
    """Purpose -> runs that the tables have all rows of, so that they need not be run for it; a diverged run has none.

    Of runs in full precision these are rows at the Common Loss, too, which their whole group must have reached.
    """
    if not study.has("runs"):
        return {purpose: set() for purpose in PURPOSES}
    runs = study.table("runs")
    asked = tuple(name for name in ("trajectory", "readings") if getattr(study.protocol.measure, name))
    tables = {name: study.table(name) for name in (*MEASURED, *asked) if study.has(name)}
    wanted = {"sweep": MEASURED, "full_precision": MEASURED + asked}  # of QAT there is accuracy alone
    wanted["branches"] = tuple(name for name in wanted["full_precision"] if name != "trajectory")
    found = {purpose: set(runs.run) for purpose in PURPOSES}
    for purpose, names in found.items():
        for name in wanted.get(purpose, ("zero_shot",)):
            rows = tables.get(name, runs[:0])
            common = purpose == "full_precision" and "checkpoint" in rows
            names &= set(rows[rows.checkpoint == "common"].run if common else rows.run)
        names |= set(runs.run[runs.status == "diverged"])
    return found


def merge(study: "Study", folder: Path) -> pd.DataFrame:
    """Pools the tables in `folder` (another machine's data/results/SCALE) with this scale's, run by run.

    A run in both is kept as it is here; what it gave on either machine is written to the table `machines`. Returns
    those runs with both losses and their difference, one row each.
    ValueError for a folder without the table `runs`, or with runs that this scale does not plan.
    """
    if not (folder / "runs.csv").exists():
        raise ValueError(f"{folder} has no runs.csv; valid: a folder like {study.results}")
    theirs = read_table(folder / "runs.csv")
    ours = study.table("runs") if study.has("runs") else theirs.iloc[:0]
    if strangers := set(theirs.scale) - {study.scale}:
        raise ValueError(f"{folder} holds runs of scale {', '.join(sorted(strangers))}, not of {study.scale}")
    study.results.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        source, target = folder / f"{name}.csv", study.results / f"{name}.csv"
        if name in ("common_loss", "machines") or not source.exists():
            continue
        check_table(folder, name)
        table = read_table(source)
        old = study.table(name) if target.exists() else table[:0]
        keys, known = (["size", "optimizer"], old) if name == "learning_rates" else (["run"], ours)
        table = table[~pd.MultiIndex.from_frame(table[keys]).isin(pd.MultiIndex.from_frame(known[keys]))]
        if len(table) or not target.exists():  # else it stays as it is, byte by byte
            checksums.write_text(target, pd.concat([old, table], ignore_index=True).to_csv(index=False))
    both = ours.merge(theirs, on="run", suffixes=("_here", "_there"))
    columns = ["run", "val_loss_here", "val_loss_there", "device_name_here", "device_name_there"]
    both = both[columns].assign(difference=(both.val_loss_here - both.val_loss_there).abs())
    old = [study.table("machines")] if study.has("machines") else []
    elsewhere = both[both.device_name_here != both.device_name_there]
    known = pd.concat([*old, elsewhere], ignore_index=True).drop_duplicates(["run", "device_name_there"], keep="last")
    if len(known):
        checksums.write_text(study.results / "machines.csv", known.to_csv(index=False))
    return both
