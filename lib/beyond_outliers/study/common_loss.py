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
    if finished.empty:
        return pd.DataFrame(columns=COLUMNS)
    group, steps = list(by), evaluations[(evaluations.step > 0) & evaluations.val_loss.notna()].sort_values("step")
    ended = pd.concat([rows for _, rows in finished.groupby(group, sort=False)]).rename(columns={"steps": "final_step"})
    ended = ended[["run", "size", "optimizer", "seed", "final_step"]]
    if given is None:
        lowest = ended.assign(common_loss=ended.run.map(steps.groupby("run").val_loss.min()))
        ended["common_loss"] = lowest.groupby(group).common_loss.transform("max")
    else:
        ended = ended.merge(given.drop_duplicates(group)[[*group, "common_loss"]], on=group)
    rows = ended.merge(steps[["run", "step", "val_loss"]], on="run")
    return rows[rows.val_loss <= rows.common_loss].drop_duplicates("run")[COLUMNS].reset_index(drop=True)


def given_beside(study: "Study") -> pd.DataFrame | None:
    """The table of the scale that an optimizer from outside stands beside: its losses hold for it. None for a scale."""
    base, beside = parted(study.scale)
    return type(study)(base).table("common_loss") if beside else None
