"""A study's own tables beside the committed ones: begun from them, kept apart from them, and moved over them.

Own tables lie in data/runs/SCALE/results, which git ignores. They begin as a copy of what is committed, so that a run
which another machine committed need not be made again; `collect` then replaces rows run by run. `publish` is the only
thing that changes a committed table of runs.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from beyond_outliers import checksums, paths
from beyond_outliers.study.tables import TABLES, MissingResults, read_table

if TYPE_CHECKING:
    from beyond_outliers.study.study import Study


def take_up(study: "Study") -> Path:
    """The folder of the study's own tables, which it reads and writes from now on; begun from the committed ones."""
    committed = paths.RESULTS / study.scale
    if study.results != committed:
        return study.results
    target = paths.own_results(study.scale)
    if not target.is_dir():
        whole = target.with_name(f"results-{os.getpid()}.tmp")  # once `target` is there, it is read
        whole.mkdir(parents=True)
        for file in committed.glob("*.csv"):
            if file.stem in TABLES:
                shutil.copyfile(file, whole / file.name)
        whole.rename(target)
    return target


def publish(study: "Study", partial: bool = False) -> str:
    """Moves a study's own tables over the committed ones, and says what that replaced.

    MissingResults where there are none; ValueError where planned runs or verdicts are missing, unless `partial` says
    that they may.
    """
    own, committed = paths.own_results(study.scale), paths.RESULTS / study.scale
    if study.results != own or not study.has("runs"):
        raise MissingResults(
            f"scale {study.scale} has no tables of your own in {own}: run `make reproduce SCALE={study.scale}` first"
        )
    planned, have = {p.config.name for p in study.planned()}, set(study.table("runs").run)
    if not partial and not study.complete():
        missing = sorted(planned - have)
        raise ValueError(
            f"{own} has {len(planned & have)} of the {len(planned)} runs that are planned"
            f"{f', but not {missing[0]}' if missing else ', but not all tables or learning rates'}: run "
            f"`make reproduce SCALE={study.scale}`, or say `make publish SCALE={study.scale} PARTIAL=1`"
        )
    if "+" not in study.scale and not (own / "judged.csv").exists():
        raise ValueError(f"{own} lacks judged.csv: run `beyond-outliers claims --scale {study.scale}`")
    checksums.check(own, remedy="collect it again: `beyond-outliers collect`, then the claims")
    there = committed / "runs.csv"
    new = read_table(own / "runs.csv").set_index("run").val_loss
    old = read_table(there).set_index("run").val_loss if there.exists() else new[:0]
    both = new.index.intersection(old.index)
    committed.mkdir(parents=True, exist_ok=True)
    for file in sorted(own.glob("*.csv"), key=lambda file: file.stem == "runs"):  # `runs` last
        os.replace(file, committed / file.name)
    definition = paths.RUNS / study.scale / "optimizer.toml"  # of an optimizer from outside
    if definition.exists():
        os.replace(definition, committed / definition.name)
    checksums.seal(committed)
    shutil.rmtree(own)
    same = int((new[both].fillna(0) == old[both].fillna(0)).sum())  # diverged in both: alike
    return (
        f"{committed}: {len(new)} runs, {same} of them with the loss that was there, {len(new) - len(both)} new; "
        f"{len(old) - len(both)} that were there are gone. `make figures SCALE={study.scale}` draws their pages"
    )
