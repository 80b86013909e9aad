"""The Common Loss: the lowest validation loss that all of a group of runs reach, and where each of them reaches it.

Paper: arXiv 2509.23500, section 4: for PTQ every optimizer's model is the checkpoint that first reaches it. The group
is a size; in a scale whose trajectories are measured, a size and a seed, so that every seed is a replicate.
"""

from typing import TYPE_CHECKING

import pandas as pd

from beyond_outliers.config.outside import parted

if TYPE_CHECKING:
    from beyond_outliers.study.study import Study

COLUMNS = ["size", "common_loss", "run", "optimizer", "seed", "step", "val_loss", "final_step"]


def common_loss(
    runs: pd.DataFrame, evaluations: pd.DataFrame, by: tuple[str, ...] = ("size",), given: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row a run: size, common_loss, run, optimizer, seed, step (of its first checkpoint at or below the Common
    Loss), val_loss (there), final_step.

    runs: run, size, optimizer, seed, status, steps; runs that diverged are left out. evaluations: run, step and
    val_loss of the checkpoints. by: the columns that make a group. No run, no row. given: a table like the one
    returned, whose Common Losses hold; a run that does not reach it, and a group that it does not have, give no row.
    """
    finished = runs[runs.status == "finished"]
    reached = evaluations[(evaluations.step > 0) & evaluations.val_loss.notna()].sort_values("step")
    lowest = reached.groupby("run").val_loss.min()
    parts = []
    for _, group in finished.groupby(list(by), sort=False):
        own = group.run.map(lowest).max()
        threshold = own if given is None else group.merge(given, on=list(by), suffixes=("", "_given")).common_loss.min()
        first = reached[reached.run.isin(group.run) & (reached.val_loss <= threshold)].groupby("run").first()
        place = group.set_index("run").join(first[["step", "val_loss"]], rsuffix="_there").reset_index()
        found = place[["size", "run", "optimizer", "seed", "step"]].assign(
            common_loss=threshold, val_loss=place.val_loss_there if "val_loss_there" in place else place.val_loss
        )
        parts.append(found.assign(final_step=place.steps).dropna(subset="step").astype({"step": int}))
    return pd.concat(parts, ignore_index=True)[COLUMNS] if parts else pd.DataFrame(columns=COLUMNS)


def given_beside(study: "Study") -> pd.DataFrame | None:
    """The table of the scale that an optimizer from outside stands beside: its losses hold for it. None for a scale."""
    base, beside = parted(study.scale)
    return type(study)(base).table("common_loss") if beside else None
