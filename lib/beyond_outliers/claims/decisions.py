"""Optimizers side by side: how large the differences are, which to train with, and one from outside next to the six.

An optimizer is never named best without its quantizer; what counts is the loss after quantization, not the damage. No
rule of the claims reads this, so a seventh optimizer changes no verdict.
"""

from collections.abc import Sequence

import pandas as pd

from beyond_outliers.claims import readings
from beyond_outliers.claims.estimates import (
    PAPER_OPTIMIZERS,
    REFERENCE,
    Comparison,
    NothingToCompare,
    as_table,
    as_text,
    compare,
    label,
    listed,
    of_the_paper,
)
from beyond_outliers.claims.readings import CELL, QUANTITIES
from beyond_outliers.claims.rules import VERDICTS
from beyond_outliers.claims.verdicts import judged
from beyond_outliers.study.study import Study
from beyond_outliers.study.tables import MissingResults

# ---------------------------------------------------------------------------------------------- differences from AdamW

EFFECTS = ("loss", "common", "final", "qat", "R_L", "mmr")  # of QUANTITIES


def against(rows: pd.DataFrame, value: str = "compared") -> pd.DataFrame:
    """Differences within pairs, one row a run of another optimizer than AdamW: size, optimizer, seed, effect.

    A pair is a run and AdamW's of the same size and seed, which saw the same batches. Runs without a partner or a value
    are left out.
    """
    own = rows[rows.optimizer == REFERENCE].set_index(["size", "seed"])[value].rename("partner")
    pairs = rows[rows.optimizer != REFERENCE].join(own, on=["size", "seed"])
    return pairs.assign(effect=pairs[value] - pairs.partner)[[*CELL, "effect"]].dropna(subset="effect")


def effects(study) -> pd.DataFrame:
    """One row a quantity and optimizer that has pairs: quantity, optimizer, effect, low, high, n (pairs), over (sizes).

    Means over seeds, then over sizes: sizes are strata, pairs replicates. No interval where an optimizer has fewer than
    three pairs at a size. A quantity that has not been measured of any optimizer has no row.
    """
    found, over = {}, []
    for name in EFFECTS:
        quantity = QUANTITIES[name]
        try:
            pairs = against(quantity.read(study))
            compared = Comparison(pairs, "effect", [one for one in PAPER_OPTIMIZERS if one in set(pairs.optimizer)])
        except (MissingResults, NothingToCompare):
            continue
        for one in compared.cells.optimizers:
            found[name, one] = quantity.told(compared.mean(one))
            over.append(listed(compared.sizes))
    return as_table(found, ["quantity", "optimizer"], "effect").assign(over=over)


def effect_table(study) -> pd.DataFrame:
    """`effects` as a reader takes them in: a row an optimizer of its scale, a column a quantity."""
    table = effects(study)
    others = [one for one in PAPER_OPTIMIZERS if one != REFERENCE and one in study.protocol.optimizers]
    columns = {"optimizer": [label(one) for one in others]}
    for name, (title, unit) in readings.titles(study, EFFECTS).items():
        rows = table[table.quantity == name].set_index("optimizer")
        texts = pd.Series(as_text(rows, "effect", QUANTITIES[name].digits), rows.index, dtype=str)
        cells = (texts + ", n " + rows.n.astype(str)).reindex(others).fillna("not measured yet").tolist()
        columns[f"{title} ({unit if unit == readings.NATS else 'times AdamW'})"] = cells
    return pd.DataFrame(columns)


# -------------------------------------------------------------------------------------------------- one from outside


def place(study, found: Comparison) -> str:
    """ "2 of 7": how many optimizers have a mean that is not higher."""
    return f"{found.order.index(study.yours) + 1} of {len(found.order)}"


def standing(study, parts: dict[str, tuple[pd.DataFrame, str]] | None = None) -> pd.DataFrame:
    """Yours, its place from the lowest, the lowest and the highest of the six, with intervals (95 %).

    One row a quantity, or one of `parts`: what it is called -> (rows, column).
    """
    if parts is None:
        named = zip(readings.titles(study).values(), QUANTITIES.values(), strict=True)
        parts = {title: (of.rows(study), of.value) for (title, _), of in named}
    rows = {}
    for name, part in parts.items():
        try:
            found = compare(study, *part)
        except NothingToCompare:
            rows[name] = {"yours": "no size at which all of them have one"}
            continue
        lowest, *_, highest = [one for one in found.order if one != study.yours]
        rows[name] = {
            "yours": found.mean(study.yours).text(),
            "place": place(study, found),
            "lowest of the six": f"{label(lowest)} {found.mean(lowest).text()}",
            "yours minus lowest": found.difference(study.yours, lowest).text(),
            "highest of the six": f"{label(highest)} {found.mean(highest).text()}",
            "runs": f"{found.over}, {found.n(study.yours)}",
        }
    return pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis("quantity").reset_index()


def by_format(study) -> pd.DataFrame:
    """The same of the loss increase at the end of training, one row a format."""
    rows = readings.measured(study, "ptq").query("spec != 'none'").groupby("spec", sort=False)
    parts = {spec: (own, "increase") for spec, own in rows}
    return standing(study, parts).rename(columns={"quantity": "format"})


# ---------------------------------------------------------------------------------------------- which to train with

NONE, QAT, RTN_HEAD, W4 = "no quantization", "QAT to W4A4 (QuEST)", "RTN to W4A4", "RTN to W4, weights alone"
GAP = "-"  # not measured
# intention -> spec at the end of training; None: the model as it is
INTENTIONS: dict[str, str | None] = {
    NONE: None,
    "RTN to W4A4, head kept": "W4A4",
    RTN_HEAD: "W4A4+head",
    "GPTQ to W4A4": "W4A4+gptq+head",
    "rotation + GPTQ to W4A4": "W4A4+rot+gptq+head",
    "RTN to mxfp4": "mxfp4+head",
    "RTN to nvfp4": "nvfp4+head",
    W4: "W4+head",
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


def ranked(rows: pd.DataFrame, optimizers: Sequence[str]) -> Comparison | None:
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


def decisions(study: Study) -> pd.DataFrame:
    """A row an intention: whom to train with, the runner-up, its distance, and n."""
    rows: list[tuple] = []
    for intention, spec in INTENTIONS.items():
        compared = ranked(losses(study, spec), study.protocol.optimizers)
        if compared is None:
            rows.append((intention, GAP, "", ""))
            continue
        best, second, *_ = compared.order
        gap, n = compared.difference(second, best).text(), int(compared.cells.n[0].sum())
        rows.append((intention, f"**{winner(compared)}**", f"{label(second)} +{gap}", n))
    return pd.DataFrame(rows, columns=["you deploy with", "train with", "runner-up, nats above", "runs"])


def of_confirm() -> pd.DataFrame:
    """`decisions` of the confirmatory study, and whether two further sets of runs agree on who is best.

    They are the runs of scale `llama`, whose optimizers are compared with the same ones of `confirm`, and those at the
    rates of `readings.found_rates` in place of the study's at that size.
    """
    study, llama, found = Study("confirm"), Study("llama"), readings.found_rates()
    further = []
    for spec in INTENTIONS.values():
        here, names = losses(study, spec), llama.protocol.optimizers
        row = [agreement(ranked(here, names), ranked(losses(llama, spec), names)), GAP]
        if spec in FOUND:
            loss = found[FOUND[spec]] + found.val_loss * (spec == "W4A4+head")
            kept = here[(here["size"] == "0.08M") & ~here.optimizer.isin(found.optimizer)]
            rows = pd.concat([kept, found.assign(loss=loss)])
            row[1] = agreement(ranked(here, study.protocol.optimizers), ranked(rows, sorted(set(rows.optimizer))))
        further.append(row)
    return decisions(study).join(pd.DataFrame(further, columns=["on Llama, too?", "at better rates, too?"]))


def agreement(here: Comparison | None, there: Comparison | None) -> str:
    """Whether the best is the same, and who is best there."""
    if here is None or there is None:
        return GAP
    return f"{'yes' if there.order[0] == here.order[0] else 'no'}: {winner(there)}"


def verdicts_in_words(scale: str) -> str:
    """How many of the paper's claims hold by the rules of the confirmatory study, a sentence per verdict."""
    table = judged(Study(scale))
    found = {verdict: table.id[table.verdict == verdict].tolist() for verdict in VERDICTS}
    parts = [f"{len(ids)} {verdict} ({listed(ids)})" for verdict, ids in found.items() if ids]
    return f"**Claims of the paper** by rules fixed beforehand: {'. '.join(parts)}."


def losses_by_quantizer(study, specs: dict[str, str]) -> pd.DataFrame:
    """Loss before and after quantization, a row per quantizer and optimizer: means over seeds, then over sizes.

    specs: quantizer -> spec. Columns: quantizer, optimizer, before, after (nats per token).
    """
    parts = [
        of_the_paper(readings.damage(study, checkpoint="final", spec=spec)).assign(quantizer=quantizer)
        for quantizer, spec in specs.items()
    ]
    runs = pd.concat(parts).rename(columns={"val_loss": "after"})
    runs, keys = runs.assign(before=runs.after - runs.increase), ["quantizer", "optimizer"]
    means = runs.groupby([*keys, "size"], sort=False)[["before", "after"]].mean()
    return means.groupby(keys, sort=False).mean().reset_index()
