"""The damage along training: when does it come, does the decay of the learning rate make it, does averaging undo it?

Readings of the table `trajectory`, of scales that measure their runs along the way (`trajectory` in `[measure]`). Two
accounts are tested: the decay makes the damage and averaging repairs it (arXiv 2510.06213), or it comes with
convergence (arXiv 2604.15167).
"""

from dataclasses import replace

import pandas as pd

from beyond_outliers.claims import estimates, readings
from beyond_outliers.claims.estimates import LEAST_SEEDS, as_table, as_text, cells, t_interval
from beyond_outliers.claims.readings import CELL
from beyond_outliers.config.run import RunConfig

DECAY_FROM = 1 - RunConfig.decay  # share of the run at which the learning rate begins to fall
EVERY = "mean of optimizers"
QUANTITIES = {  # differences in nats, of the damage where nothing else is said
    "decay": "the end less the last checkpoint of the constant rate",
    "before": "that checkpoint less one as long before it",
    "averaging, constant": "averaged weights less the last checkpoint, at the constant rate",
    "averaging, end": "averaged weights less the last checkpoint, at the end",
    "averaging, constant: loss after": "loss after quantization, averaged less last, at the constant rate",
    "averaging, end: loss after": "loss after quantization, averaged less last, at the end",
}


def trajectory(study) -> pd.DataFrame:
    """Rows of the table in the primary spec with CELL columns of their run and `share` of its steps; empty without one.

    The last checkpoints' averaged weights are rows with averaged > 1.
    """
    if not study.has("trajectory"):
        return pd.DataFrame(columns=["run", *CELL, "step", "averaged", "share", "val_loss", "increase"])
    rows = study.runs("full_precision")[["run", *CELL, "steps"]].merge(study.table("trajectory"), on="run")
    rows = rows[rows.spec == readings.primary(study)].reset_index(drop=True)
    return rows.assign(share=rows.step / rows.steps)


def at_common_loss(study) -> pd.DataFrame:
    """Damage at exactly the Common Loss, by interpolation, beside that of the first checkpoint that reaches it.

    One row a run that is followed and has a Common Loss: CELL, damage `at_checkpoint` and `interpolated` (nats, both
    on the trajectory's tokens), and the `share` of the run. Empty without a trajectory.
    """
    rows, found = trajectory(study), []
    if len(rows) and study.has("common_loss"):
        base = study.table("curves")[["run", "step", "val_loss"]].rename(columns={"val_loss": "base_loss"})
        common = study.table("common_loss")[["run", "common_loss", "step"]].rename(columns={"step": "reached"})
        rows = rows[rows.averaged == 1].merge(base, on=["run", "step"]).merge(common, on="run")
        for (*cell, threshold, reached), own in rows.groupby([*CELL, "common_loss", "reached"], sort=False):
            own = own.sort_values("step")
            exact = readings.at_loss(own[["base_loss", "increase", "share"]], threshold)
            found.append((*cell, own.set_index("step").increase[reached], exact["increase"], exact["share"]))
    return pd.DataFrame(found, columns=[*CELL, "at_checkpoint", "interpolated", "share"])


def beside_checkpoint(exact: pd.DataFrame) -> pd.DataFrame:
    """`at_common_loss` as means over seeds, and as ratios to AdamW's: a row a size and optimizer."""
    keys, parts = ["size", "optimizer"], []
    for column in ("at_checkpoint", "interpolated"):
        mean = estimates.means(exact, column).set_index(keys)["mean"].rename(column)
        ratio = estimates.ratios(exact, column).set_index(keys).reindex(mean.index)
        parts += [mean, pd.Series(as_text(ratio, "ratio", 2), mean.index, name=f"{column}, ratio")]
    return pd.concat(parts, axis=1).reset_index()


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean damage of the checkpoints themselves, with interval: size, optimizer, share, mean, low, high, n."""
    return estimates.means(rows[rows.averaged == 1], "increase", ("share",)).sort_values("share", kind="stable")


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """QUANTITIES of every run, a row each: CELL, quantity, value (nats); without their checkpoints none."""
    found = []
    for cell, own in rows.groupby(CELL, sort=False):
        own = own.sort_values("share").set_index("step")[["share", "averaged", "increase", "val_loss"]]
        plain, averaged = own[own.averaged == 1], own[own.averaged > 1]
        constant = plain[plain.share <= DECAY_FROM]
        if constant.empty or len(constant) == len(plain):
            continue
        last, end = constant.index[-1], plain.index[-1]
        earlier = (plain.index.to_series() - (2 * last - end)).abs().idxmin()
        values = {"decay": plain.increase[end] - plain.increase[last]}
        if earlier < last:
            values["before"] = plain.increase[last] - plain.increase[earlier]
        for place, step in (("constant", last), ("end", end)):
            if step in averaged.index:
                less = (averaged - plain).loc[step]
                values |= {f"averaging, {place}": less.increase, f"averaging, {place}: loss after": less.val_loss}
        found += [(*cell, quantity, value) for quantity, value in values.items()]
    return pd.DataFrame(found, columns=[*CELL, "quantity", "value"])


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Means of `changes` over runs with 95 % intervals: quantity, size, optimizer, mean, low, high, n.

    Behind the optimizers of a size stands EVERY: their unweighted mean, with Welch's interval from the spread over runs
    within optimizers (an estimate alone where one of them has fewer than three runs), n the fewest runs of one.
    """
    keys, found = ["quantity", "size", "optimizer"], {}
    table = table.sort_values("quantity", key=lambda names: names.map([*QUANTITIES].index), kind="stable")
    for (quantity, size), own in table.groupby(keys[:2], sort=False):
        for name, values in own.groupby("optimizer", sort=False).value:
            found[quantity, size, name] = t_interval(values, least=LEAST_SEEDS)
        strata = own.assign(size=own.optimizer, optimizer=EVERY)  # the optimizers
        every = cells(strata, "value", (EVERY,), list(dict.fromkeys(own.optimizer)))
        found[quantity, size, EVERY] = replace(estimates.difference(every, EVERY), n=int(every.n.min()))
    return as_table(found, keys)


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """`differences`, a row a size and optimizer, a column a quantity in words, cells like "0.123 [0.110, 0.136]"."""
    table, keys = table.assign(text=as_text(table)), ["size", "optimizer"]
    return table.pivot_table("text", keys, "quantity", "first", sort=False).rename(columns=QUANTITIES).fillna("")


def in_words(study) -> str:
    """What the tables say, in Markdown, one sentence a size; which scale to ask where they have nothing."""
    table = differences(changes(trajectory(study)))
    lines = []
    for size, own in table[table.optimizer == EVERY].groupby("size", sort=False):
        told = dict(zip(own.quantity, as_text(own), strict=True))
        text = f"- {size}, n {own.n.min()}: the mean damage changes by {told['decay']} nats in the decay."
        if "before" in told:
            text += f" Over as long a stretch before, it changes by {told['before']}."
        if {"averaging, end", "averaging, constant"} <= set(told):
            text += f" Averaging the last checkpoints changes it by {told['averaging, constant']} at the constant rate"
            text += f" and by {told['averaging, end']} at the end."
        lines.append(text)
    return "\n".join(lines) or f"No run of scale {study.scale} has been followed along its training."
