"""Which optimizer to train with, by what becomes of the model: the table that the README begins with.

An optimizer is never named without its quantizer. What counts is the loss after quantization, not the damage.
"""

import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims import readings
from beyond_outliers.claims.estimates import Comparison, NothingToCompare, label, listed, of_the_paper
from beyond_outliers.study.study import Study
from beyond_outliers.study.tables import MissingResults

QAT = "train in 4 bits, W4A4 with head (QuEST)"
RTN_HEAD = "round to nearest, W4A4 with head"
NOT_MEASURED = "not measured"
COLUMNS = [
    "if you will",
    "train with",
    "runner-up, its loss above (nats)",
    "runs each",
    "Llama, of three",
    "found rates",
]
VERDICTS = ("reproduced", "not reproduced", "tie", "undecided")
# intention -> spec at the end of training; None: the model as it is
INTENTIONS: dict[str, str | None] = {
    "leave the model in full precision": None,
    "round to nearest, W4A4 without head": "W4A4",
    RTN_HEAD: "W4A4+head",
    "GPTQ, W4A4 with head": "W4A4+gptq+head",
    "rotation and GPTQ, W4A4 with head": "W4A4+rot+gptq+head",
    "round to nearest, mxfp4 with head": "mxfp4+head",
    "round to nearest, nvfp4 with head": "nvfp4+head",
    "round weights alone, W4 with head": "W4+head",
    QAT: "QAT",
}
FOUND = {None: "val_loss", "W4A4+head": "increase_end", "QAT": "val_loss_qat"}  # columns at the found rates


def losses(study, spec: str | None) -> pd.DataFrame:
    """The loss that a reader ends with, a row a main run: size, optimizer, seed, loss (nats per token)."""
    if spec == "QAT":
        rows, value = readings.finished_qat(study), "val_loss_qat"
    elif spec is None:
        rows, value = readings.finished(study), "val_loss"
    else:
        rows, value = readings.damage(study, checkpoint="final", spec=spec), "val_loss"
    return of_the_paper(rows).rename(columns={value: "loss"})[["size", "optimizer", "seed", "loss"]]


def ranked(rows: pd.DataFrame, optimizers: list[str]) -> Comparison | None:
    """The optimizers by the loss they end with; None where one has no run."""
    try:
        return Comparison(rows, "loss", optimizers)
    except NothingToCompare:
        return None


def winner(compared: Comparison) -> str:
    """Whose loss is lowest, and in brackets whose is not told apart from it at 95 %."""
    best, *rivals = compared.order
    near = [label(rival) for rival in rivals if not compared.difference(rival, best).excludes_zero]
    return f"{label(best)} (or {listed(near)})" if near else label(best)


def decisions(study: Study, other: Study | None = None, found: pd.DataFrame | None = None) -> pd.DataFrame:
    """A row an intention: train with, runner-up, its distance, n, and whether two further sets of runs agree.

    other: a study of another architecture, whose optimizers are compared with the same ones here. found: the rows of
    `readings.found_rates`, which take the place of the study's at that size.
    """
    rows, names = [], list(study.protocol.optimizers)
    for intention, spec in INTENTIONS.items():
        here = losses(study, spec)
        compared = ranked(here, names)
        if compared is None:
            rows.append((intention, NOT_MEASURED, "", "", "", ""))
            continue
        best, second, *_ = compared.order
        gap = compared.difference(second, best).text()
        n = f"{int(compared.cells.n[0].sum())} in {len(compared.sizes)} sizes"
        further = _there(here, other, spec), _found(here, found, spec)
        rows.append((intention, f"**{winner(compared)}**", f"{label(second)} +{gap}", n, *further))
    return pd.DataFrame(rows, columns=COLUMNS)


def _there(here: pd.DataFrame, other: Study | None, spec: str | None) -> str:
    """The winner among the optimizers of another study, there and here."""
    if other is None:
        return ""
    names = list(other.protocol.optimizers)
    try:
        there = ranked(losses(other, spec), names)
    except MissingResults:
        there = None
    ours = ranked(here, names)
    if there is None or ours is None:
        return NOT_MEASURED
    same = there.order[0] == ours.order[0]
    return f"{winner(there)}{', as here' if same else f'; here {winner(ours)}'}"


def _found(here: pd.DataFrame, found: pd.DataFrame | None, spec: str | None) -> str:
    """The winner where AdamW and PSGD have the rates that a wider search found."""
    if found is None:
        return ""
    if spec not in FOUND:
        return NOT_MEASURED
    loss = found[FOUND[spec]] + (found.val_loss if spec == "W4A4+head" else 0)
    at = here[(here["size"] == "0.08M") & ~here.optimizer.isin(found.optimizer)]
    rows = pd.concat([at, found.assign(loss=loss)[["size", "optimizer", "seed", "loss"]]])
    compared = ranked(rows, sorted(set(rows.optimizer)))
    return winner(compared) if compared else NOT_MEASURED


def of_confirm() -> pd.DataFrame:
    """`decisions` of the confirmatory study, with scale `llama` and the found rates."""
    return decisions(Study("confirm"), Study("llama"), readings.found_rates())


def verdicts_in_words(scale: str) -> str:
    """How many of the paper's claims hold by the rules of the confirmatory study, a sentence per verdict."""
    table = pd.read_csv(paths.RESULTS / scale / "verdicts.csv")
    judged = table[(table.spec == "W4A4+head") & (table.optimizers == "six") & (table.part == "whole")]
    found = {verdict: list(rows.id) for verdict, rows in judged.groupby("verdict")}
    parts = [f"{len(ids)} {verdict} ({listed(ids)})" for verdict in VERDICTS if (ids := found.get(verdict))]
    return f"**Claims of the paper** by rules fixed beforehand: {'. '.join(parts)}."


def before_and_after(study, specs: dict[str, str]) -> pd.DataFrame:
    """Loss before and after quantization, a row per quantizer and optimizer: means over seeds, then over sizes.

    specs: quantizer -> spec. Columns: quantizer, optimizer, before, after (nats per token).
    """
    rows = []
    for quantizer, spec in specs.items():
        runs = of_the_paper(readings.damage(study, checkpoint="final", spec=spec))
        runs = runs.assign(quantizer=quantizer, after=runs.val_loss, before=runs.val_loss - runs.increase)
        means = runs.groupby(["quantizer", "optimizer", "size"], sort=False)[["before", "after"]].mean()
        rows.append(means.groupby(["quantizer", "optimizer"], sort=False).mean().reset_index())
    return pd.concat(rows, ignore_index=True)
