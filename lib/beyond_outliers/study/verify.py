"""`make verify`: whether what lies on disk is what was written, and whether runs come out as their table says."""

import random
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from beyond_outliers import checksums, paths
from beyond_outliers.study.study import Study
from beyond_outliers.train.machine import MACHINE_EFFECT, processor


def damages(folder: Path) -> list[str]:
    """What is wrong with the files of a folder and of those below it that have sums, one line a folder."""
    found = []
    for sums in sorted(folder.rglob(checksums.SUMS)):
        if "/." in f"/{sums.relative_to(folder)}":
            continue  # what a process that died had begun, and nobody reads
        try:
            checksums.check(sums.parent)
        except checksums.DamagedFile as damage:
            found.append(str(damage))
    return found


def unlisted(folder: Path, pattern: str) -> list[str]:
    """Files of a folder that no sum protects."""
    listed = checksums.read_sums(folder) or {}
    return [f"{file} is in no {checksums.SUMS}" for file in sorted(folder.glob(pattern)) if file.name not in listed]


def committed(scale: str) -> list[str]:
    """What is wrong with a scale's tables, pages and figures that are committed."""
    tables, figures = paths.RESULTS / scale, paths.FIGURES / scale
    pages = [
        f"{line} (again: `make figures SCALE={scale}`)"
        for line in damages(figures) + unlisted(figures, checksums.PAGES)
    ]
    return damages(tables) + unlisted(tables, "*.csv") + pages


def trained_again(study: Study, count: int) -> pd.DataFrame:
    """Up to `count` runs of the smallest size, drawn at random, trained from nothing: losses there and here, in nats.

    Columns: run, there, here, difference, same_processor, verdict ("same", "machine effect", "differs").
    """
    table = study.table("runs")
    table = table[(table["size"] == study.protocol.sizes[0]) & (table.status == "finished")].set_index("run")
    known = [planned for planned in study.planned() if planned.config.name in table.index]
    chosen = random.sample(known, min(count, len(known)))
    losses = []
    for planned in chosen:
        with tempfile.TemporaryDirectory() as root:
            losses.append(study.train(planned, root=Path(root), progress=False).row["val_loss"])
    rows = table.loc[[planned.config.name for planned in chosen]].reset_index()
    found = rows[["run"]].assign(there=rows.val_loss, here=losses, difference=(rows.val_loss - losses).abs())
    verdict = np.select(
        [found.difference == 0, found.difference <= MACHINE_EFFECT[1]], ["same", "machine effect"], "differs"
    )
    return found.assign(same_processor=rows.device_name == processor(), verdict=verdict)


def verify(study: Study | None, count: int) -> int:
    """Prints what is damaged: of all studies' tables and pages, or of all that one has; trains runs of that one again.

    Returns 1 where something is not as it was, else 0.
    """
    chosen = [study.scale] if study else sorted(folder.name for folder in paths.RESULTS.glob("[!.]*/"))
    wrong = [line for name in chosen for line in committed(name)]
    if study:
        folders = study.runs_folder, paths.CHECKPOINTS / study.scale, paths.CACHE / "corpus"
        wrong += [line for folder in folders for line in damages(folder)]
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    outcome = f"{len(wrong)} damages" if wrong else "every byte is what was written"
    print(f"tables and pages of {', '.join(chosen)}: {outcome}")
    if not study or not count:
        return int(bool(wrong))
    again = trained_again(study, count)
    print(again.to_string(index=False))
    median, most = MACHINE_EFFECT
    print(
        f"{len(again)} runs trained again. On another processor a loss differs by {median} nats in the median where "
        f"that was measured, and {most} at most passes for it; on the same one, with the same versions and threads, "
        "by nothing."
    )
    return int(bool(wrong) or "differs" in set(again.verdict))
