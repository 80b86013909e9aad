"""An optimizer from outside beside the six: where it stands in each quantity of the study, and what can be said of it.

`study` is a `study.compare.Beside`. No rule of the claims reads it: a seventh optimizer changes no verdict.
"""

from collections.abc import Callable

import pandas as pd

from beyond_outliers.claims import readings
from beyond_outliers.claims.estimates import PAPER_OPTIMIZERS, Comparison, NothingToCompare, label

LOSS, DAMAGE, QAT = "loss in full precision", "damage at the Common Loss", "loss after QAT"


def quantities() -> dict[str, tuple[Callable, str]]:
    """What the page compares: name -> (rows of a study, column); in all of them the lowest is the best."""

    return {
        LOSS: (readings.finished, "val_loss"),
        DAMAGE: (readings.damage, "increase"),
        "damage at the end of training": (lambda study: readings.damage(study, checkpoint="final"), "increase"),
        QAT: (readings.finished_qat, "val_loss_qat"),
        "cost of QAT": (readings.finished_qat, "increase"),
        "R_L": (readings.output_error, "R_L"),
        "mean linear gain": (readings.linear_gain, "gain"),
        "MMR": (readings.mmr, "mmr"),
    }


def compared(study, rows: pd.DataFrame, value: str) -> Comparison:
    """Yours and those of the paper's that the scale has. NothingToCompare where no size has a run of each."""
    names = [name for name in PAPER_OPTIMIZERS if name in study.protocol.optimizers]
    return Comparison(rows, value, [*names, study.yours])


def place(study, found: Comparison) -> str:
    """ "2 of 7": how many optimizers have a mean that is not higher."""
    return f"{found.order.index(study.yours) + 1} of {len(found.order)}"


def _row(study, rows: pd.DataFrame, value: str) -> dict[str, str]:
    try:
        found = compared(study, rows, value)
    except NothingToCompare:
        return {"yours": "no size at which all of them have one"}
    others = [name for name in found.order if name != study.yours]
    lowest, highest = others[0], others[-1]
    return {
        "yours": found.mean(study.yours).text(),
        "place": place(study, found),
        "lowest of the six": f"{label(lowest)} {found.mean(lowest).text()}",
        "yours less it": found.difference(study.yours, lowest).text(),
        "highest of the six": f"{label(highest)} {found.mean(highest).text()}",
        "runs": f"{found.over}, {found.n(study.yours)}",
    }


def standing(study) -> pd.DataFrame:
    """One row a quantity: yours, its place from the lowest, the lowest and highest of the six, intervals (95 %)."""
    rows = {name: _row(study, of(study), column) for name, (of, column) in quantities().items()}
    return pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis("quantity").reset_index()


def by_format(study) -> pd.DataFrame:
    """The same of the loss increase at the end of training, one row a format."""
    measured = readings.measured(study, "ptq").query("spec != 'none'")
    found = {spec: _row(study, rows, "increase") for spec, rows in measured.groupby("spec", sort=False)}
    return pd.DataFrame.from_dict(found, orient="index").fillna("").rename_axis("format").reset_index()


def tuning(study) -> pd.DataFrame:
    """How every optimizer was tuned: size, optimizer, chosen rate, rates tried, runs, whether the choice is at an edge.

    Yours was looked for until its best rate lay between two others: it may have had more tries.
    """
    columns = ["size", "optimizer", "lr", "grid", "n_runs", "edge"]
    table = study.table("learning_rates")[columns]
    return table.assign(optimizer=table.optimizer.map(label))


def finding(study) -> str:
    """Where yours stands in loss, in damage and after QAT, in a sentence each."""
    yours, lines, caveat = label(study.yours), [], ""
    sayings = {LOSS: "ends at {} nats per token", QAT: "ends at {} nats after QAT"}
    sayings[DAMAGE] = f"loses {{}} nats under {study.protocol.measure.primary} at the Common Loss"
    for name, (of, column) in quantities().items():
        if name not in sayings:
            continue
        try:
            found = compared(study, of(study), column)
        except NothingToCompare:
            lines.append(f"- {yours} has no {name} at a size where all the others have one.")
            continue
        best = next(other for other in found.order if other != study.yours)
        against = found.difference(study.yours, best)
        lines.append(
            f"- {yours} {sayings[name].format(found.mean(study.yours).text())}: place {place(study, found)}, from the "
            f"lowest. Minus {label(best)} that is {against.text()} ({found.over}, {found.n(study.yours)})."
        )
        caveat = caveat or found.caveat
    return "\n".join([f"{yours} next to the six.{caveat}", "", *lines])
