"""Learning rates by what they leave: the loss in full precision, and the loss after quantization, over tuning runs.

Rates are chosen by the first; who will quantize needs the second.
"""

import json

import pandas as pd

from beyond_outliers.claims import readings
from beyond_outliers.claims.compare import label


def how_chosen(study) -> str:
    """How the learning rates of a scale were chosen, in Markdown."""
    protocol = study.protocol
    if protocol.tuned:
        rule = protocol.tuning
        return (
            f"Every optimizer was tuned at every size, on seed {rule.seeds[0]}, over rates a factor {rule.factor:g} "
            "apart: "
            "first the auxiliary rate (embedding and vectors), then the rate of the hidden matrices at the chosen "
            f"auxiliary one, which the figure shows. The choice is the smallest rate within {rule.tolerance:g} nats of "
            "the best, never one beside a diverged rate; the line is extended until the choice lies inside it. `grid` "
            "and `auxiliary_grid` list the rates tried. A diverged run has no point."
        )
    swept = protocol.settings.runs("sweep")
    text = (
        f"Every optimizer was swept over its own grid, with the same number of tries, at {', '.join(swept.sizes)}. The "
        "best rate is the vertex of the parabola through the best point and its neighbours in log(learning rate); "
        "`edge` warns that the optimum may lie outside the grid. A diverged run has no point."
    )
    if lender := protocol.settings.rates_from:
        lent = ", ".join(size for size in protocol.sizes if size not in swept.sizes)
        return f"{text} At {lent} the rates are those that scale `{lender}` chose there (`chosen_by`)."
    return f"{text} Sizes between take the rate of the next smaller one."


def tuned_and_main(study) -> pd.DataFrame:
    """The best rates of the tuning (`best_tuned`, the lowest mean over seeds) beside the mean of the main runs.

    One row a size and optimizer.

    main: over the seeds that were tuned on (`seeds` "the same"), else over all ("others").
    """
    keys = ["size", "optimizer"]
    swept, main = study.runs("sweep"), readings.full_precision(study)
    best = swept.groupby([*keys, "lr", "hyper"], sort=False).val_loss.mean().groupby(keys, sort=False).min()
    same = main.merge(swept[[*keys, "seed"]].drop_duplicates())
    own, every = (runs.groupby(keys, sort=False).val_loss.mean() for runs in (same, main))
    table = best.to_frame("best_tuned").join(own.combine_first(every).rename("main"), how="inner")
    table["seeds"] = ["the same" if of in own.index else "others" for of in table.index]
    return table.assign(difference=table.main - table.best_tuned).reset_index()


def line(study) -> pd.DataFrame:
    """Finished tuning runs on one line of learning rates an optimizer and size, as in the table `runs`.

    Of a scale that is tuned by a search: those at the chosen auxiliary rate, and none before it is chosen. Of a scale
    with grids: every one of the sweep.
    """
    swept = study.runs("sweep")
    swept = swept[swept.status == "finished"]
    if not study.protocol.tuned:
        return swept.reset_index(drop=True)
    chosen = study.table("learning_rates").set_index(["size", "optimizer"]).auxiliary
    auxiliary = swept.hyper.map(lambda text: json.loads(text).get("embedding_lr"))
    wanted = [chosen.get(cell) for cell in zip(swept["size"], swept.optimizer, strict=True)]
    return swept[auxiliary == pd.Series(wanted, index=swept.index, dtype=float)].reset_index(drop=True)


def before_and_after(study) -> pd.DataFrame:
    """Loss `before` and `after` quantization in the primary spec at every rate of `line`: size, optimizer, lr, seeds.

    Means over seeds, both on the text that quantized models are measured on; `damage` is their difference.
    """
    rows = readings.damage(study, "sweep", checkpoint="final")
    rows = rows[rows.run.isin(line(study).run)]
    rows = rows.assign(before=rows.val_loss - rows.increase, after=rows.val_loss)
    found = rows.groupby(["size", "optimizer", "lr"], sort=False).agg(
        before=("before", "mean"), after=("after", "mean"), damage=("increase", "mean"), seeds=("run", "size")
    )
    return found.reset_index()


def best(table: pd.DataFrame) -> pd.DataFrame:
    """The rate that is best before and the one that is best after quantization, a row a size and optimizer.

    lr_before, lr_after; after_by_before: the loss after quantization at the rate that is best before; after_by_after:
    the lowest there is; gain: what choosing by the loss after quantization would have saved (nats, never negative; of
    runs of one seed a selection, so that part of it is luck).
    """
    found = []
    for (size, optimizer), own in table.groupby(["size", "optimizer"], sort=False):
        full, quantized = own.loc[own.before.idxmin()], own.loc[own.after.idxmin()]
        found.append(
            (size, optimizer, full.lr, quantized.lr, full.after, quantized.after, full.after - quantized.after)
        )
    columns = ["size", "optimizer", "lr_before", "lr_after", "after_by_before", "after_by_after", "gain"]
    return pd.DataFrame(found, columns=columns)


def finding(study) -> str:
    """One sentence a size in Markdown: whose loss is lowest after quantization, and whether another rate is best."""
    table = before_and_after(study)
    lines = []
    for size, own in best(table).groupby("size", sort=False):
        moved = own[own.lr_after != own.lr_before]
        smaller = int((moved.lr_after < moved.lr_before).sum())
        at = table[table["size"] == size].groupby("optimizer")
        full, quantized = (label(at[column].min().idxmin()) for column in ("before", "after"))
        lines.append(
            f"- {size}: lowest loss in full precision {full}, after quantization {quantized}; for {len(moved)} of "
            f"{len(own)} optimizers another learning rate is best after quantization ({smaller} smaller), by at most "
            f"{own.gain.max():.3f} nats."
        )
    return "\n".join(lines) or f"No tuning run of scale {study.scale} has been measured yet."
