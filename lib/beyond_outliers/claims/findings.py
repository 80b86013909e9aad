"""What each notebook found, in a sentence or two with numbers, uncertainty and n, made from a study's tables.

FINDINGS: name of a notebook -> function of a study that returns Markdown. Each says what the tables cannot say, too.
Which optimizer is named lowest or highest is read off the same runs, and the intervals do not know it.
"""

import re
import textwrap
from collections.abc import Callable

import numpy as np
import pandas as pd

from beyond_outliers.claims import decisions, methods, readings
from beyond_outliers.claims.estimates import (
    PAPER_OPTIMIZERS,
    Comparison,
    Estimate,
    NothingToCompare,
    as_text,
    compare,
    correlations,
    label,
    listed,
    of_the_paper,
    t_interval,
)
from beyond_outliers.claims.readings import QUANTITIES
from beyond_outliers.claims.rules import VERDICTS
from beyond_outliers.claims.verdicts import FROZEN, frozen, judged, read_rules, rule_file

FINDINGS: dict[str, Callable] = {}


def finding(name: str):
    """Enters a function into FINDINGS under the name of its notebook; what cannot be compared yet becomes its text."""

    def enter(sentence: Callable) -> Callable:
        def or_why_not(study) -> str:
            try:
                return sentence(study)
            except NothingToCompare as nothing:
                return f"Nothing can be said yet: {nothing}."

        FINDINGS[name] = or_why_not
        return or_why_not

    return enter


def _above(compared: Comparison, first: str, second: str) -> str:
    """How far `first` lies above `second`, and whether the interval leaves that open."""
    found = compared.difference(first, second)
    open_question = "" if found.excludes_zero or not compared.certain else ", so which of the two is lower stays open"
    return f"{found.text()} above {label(second)}{open_question}"


def _of(compared: Comparison, *names: str) -> str:
    """The sizes and runs behind a finding, and why there is no interval where there is none, as sentences."""
    return f"Means are {compared.over} ({compared.n(*names)}).{compared.caveat}"


@finding("01_full_precision")
def full_precision(study) -> str:
    runs = of_the_paper(readings.full_precision(study))
    finished = runs[runs.status == "finished"]
    compared = compare(study, finished, "val_loss")
    best, second, *_, last = compared.order
    diverged = len(runs) - len(finished)
    left_out = f" Left out: {diverged} diverged run{'s' * (diverged > 1)}." if diverged else ""
    return (
        f"In full precision {label(best)} ends lowest and {label(last)} highest. {label(best)} reaches "
        f"{compared.mean(best).text()} nats per token. {label(second)} ends {_above(compared, second, best)}. "
        f"{label(last)} ends {compared.difference(last, best).text()} above {label(best)}. {_of(compared)}{left_out}"
    )


@finding("02_outlier_metrics")
def outlier_metrics(study) -> str:
    compared = compare(study, readings.mmr(study), "mmr")
    lowest, highest = compared.order[0], compared.order[-1]
    numbers, n = _correlations(study, {"mmr": "MMR at", "kurtosis": "kurtosis at"}, "increase")
    return (
        f"MMR is lowest for {label(lowest)} and highest for {label(highest)}. {label(lowest)} has "
        f"{compared.mean(lowest).text(2)}, {label(highest)} {compared.mean(highest).text(2)}. "
        f"{_of(compared, lowest, highest)} The loss increase correlates with {listed(numbers)}. "
        f"{_correlated(study, n)}"
    )


def judged_checkpoint(study) -> tuple[str, str]:
    """Where the scale's rules read correlations, for tables and for sentences."""
    common = study.scale != "laptop"  # whose rules are older
    return ("common", "at the Common Loss") if common else ("final", "at the end of training")


def _correlated(study, n: int) -> str:
    """What correlations of a finding are of, as a sentence."""
    where = judged_checkpoint(study)[1]
    return f"Correlations are Pearson's within sizes, under {study.protocol.measure.primary} {where} (n {n} runs)."


def _correlations(study, candidates: dict[str, str], target: str) -> tuple[list[str], int]:
    """Pearson correlations with what quantization costs, within sizes: "MMR 0.31 [-0.08, 0.58]" each, and the runs.

    candidates: column of `predictor_table` -> name. Without an interval where an optimizer has few seeds; none at all
    of fewer than three runs.
    """
    table = readings.predictor_table(study, checkpoint=judged_checkpoint(study)[0])
    table = of_the_paper(table).dropna(subset=target)
    certain = compare(study, table, target).certain
    found, numbers = correlations(table, "size", tuple(candidates), (target,)), []
    for name, row in zip(candidates.values(), found.itertuples(), strict=True):
        interval = Estimate(row.pearson, *((row.pearson_low, row.pearson_high) if certain else ()))
        if np.isfinite(row.pearson):
            numbers.append(f"{name} {interval.text(2)}")
    return numbers, int(found.n.max())


@finding("03_ptq")
def ptq(study) -> str:
    spec = study.protocol.measure.primary
    compared = compare(study, readings.damage(study, spec=spec), "increase")
    difference = compared.difference("muon", "shampoo")
    apart = "" if difference.excludes_zero or not compared.certain else ", which can be none"
    least, second, *_, most = compared.order
    return (
        f"At equal loss, {spec} hurts {label(least)} least and {label(most)} most. {label(least)} loses "
        f"{compared.mean(least).text()} nats per token, {label(most)} {compared.mean(most).text()}. "
        f"{label(second)} lies {_above(compared, second, least)}. Muon loses {compared.mean('muon').text()}, which is "
        f"{difference.text()} more than Shampoo{apart}. Equal loss means the Common Loss. {_of(compared)}"
    )


@finding("04_error_propagation")
def error_propagation(study) -> str:
    modules = of_the_paper(readings.with_input_error(readings.modules(study)))
    if modules.empty:
        raise NothingToCompare("no run's error has been measured")
    shares = readings.accumulated_dominates(modules).groupby(modules.run).mean()
    runs = modules.drop_duplicates("run").join(shares.rename("share"), on="run")
    mean = t_interval(shares) if compare(study, runs, "share").certain else Estimate(float(shares.mean()))
    increase, n = _correlations(study, {"R_L": "the loss increase at"}, "increase")
    accuracy, _ = _correlations(study, {"R_L": "cloze accuracy at"}, "accuracy")
    return (
        f"In most modules inherited error is {'' if mean.value > 0.5 else 'not '}the largest part. Inherited error (A) "
        f"exceeds new error and their interaction in {mean.text(0, 100)} % of the modules. This is a mean over "
        f"{len(shares)} runs, modules that add no error included. The error at the network's end, R_L, correlates with "
        f"{listed(increase + accuracy)}. {_correlated(study, n)}"
    )


@finding("05_qat")
def qat(study) -> str:
    losses = of_the_paper(readings.finished_qat(study))
    increase, full, quantized = (compare(study, losses, of) for of in ("increase", "val_loss_fp", "val_loss_qat"))
    least, most = increase.order[0], increase.order[-1]
    best, second = quantized.order[:2]
    same = ", as in full precision" if best == full.order[0] else f". In full precision {label(full.order[0])} does"
    return (
        f"{label(best)} ends lowest after training in 4 bits (QAT){same}. {label(second)} ends "
        f"{_above(quantized, second, best)}. QAT costs {label(least)} least, "
        f"{increase.mean(least).text()} nats per token, and {label(most)} most, {increase.mean(most).text()}. "
        f"{_of(increase)}"
    )


@finding("06_scaling_laws")
def scaling_laws(study) -> str:
    runs = of_the_paper(readings.scaling_runs(study))
    sizes = runs["size"].nunique()
    if set(runs.bits) < {4, 16}:
        raise NothingToCompare("a law needs runs in full precision and under QAT")
    rho = readings.efficiencies(readings.scaling_laws(runs)).set_index("optimizer")
    known = rho.query("identified").sort_values("rho", ascending=False)
    measured = f"{len(runs)} runs of {sizes} size{'s' * (sizes != 1)}"
    if known.empty:
        return (
            f"What a 4-bit parameter is worth (rho) cannot be told for any optimizer. {measured} do not identify it: "
            "nobody can tell who gets most out of one."
        )
    less = "less than a full-precision one" if (known.high < 1).all() else "rho full-precision ones"
    numbers = [f"- {label(of)}: {text}" for of, text in zip(known.index, as_text(known, "rho", 2), strict=True)]
    others = [label(name) for name in runs.optimizer.unique() if name not in known.index]
    unknown = f" Not identified: {listed(others)}." if others else ""
    head = f"A 4-bit parameter is worth {less}. {measured} give these values of rho.{unknown}"
    return "\n".join([head, "", *numbers])


@finding("07_claims")
def claims(study) -> str:
    table = judged(study)
    by_verdict = [
        f"{len(rows)} {'claim is' if len(rows) == 1 else 'claims are'} {verdict}"
        f"{f': {listed(list(rows.id))}' if verdict != VERDICTS[-1] else ''}."
        for verdict in VERDICTS
        if len(rows := table[table.verdict == verdict])
    ]
    beforehand = study.scale in ("laptop", rule_file()["study"]["judges"])
    rules = "rules written down beforehand" if beforehand else "the rules of data/claims.toml, as an exploration"
    rules = "the rules of the confirmatory study" if study.scale == "confirm" else rules
    some = (
        "Some of the paper's claims hold" if VERDICTS[0] in set(table.verdict) else "No claim of the paper is confirmed"
    )
    return f"{some} here. {' '.join(by_verdict)} The paper's {len(table)} claims are judged by {rules}."


@finding("08_probe_your_model")
def probed(found) -> str:
    """Of what `probe` found; the one finding that is not of a study."""
    from beyond_outliers.anymodel.advice import advice, finding

    lines = [f"{finding(one)}\n" for one in found.found]
    return "\n".join([*lines, *(f"- {line}" for line in advice(found.found[0]))])


HOW_JUDGED = """## The verdicts

Every claim has one rule, the same at every scale: `data/claims.toml`. Sizes are strata, seeds replicates. An estimate
is a difference, slope, share or correlation, with a 95 % interval that knows seeds and tuning.

- *Reproduced*: the interval lies on the claimed side of the threshold, for every rival where there are several.
- *Not reproduced*: an interval lies on the other side (for differences at 99 %).
- *Tie*: the nearest rival lies within a margin stated beforehand.
- *Undecided*: the rest, where there are data.
- *Not measured*: a number that the rule reads is not there.

Where sizes differ, no mean stands for them: each size speaks for itself. `trend` is the slope per doubling of the size.
Damage is the loss increase under W4A4 at the Common Loss, with the output head quantized and without it."""
THEN = """

**The verdicts of this scale are frozen**, by the rules of their time ([{rules}](../data/{rules})). They are the table
{table}.csv of commit {commit}, {day}, which is never made again. The table below has verdicts by the rules of today.
They are exploratory here, for these data were seen before."""


def how_judged(study) -> str:
    """How claims are judged, and, where verdicts are frozen, that the figure shows those; in Markdown."""
    if frozen(study) is None:
        return HOW_JUDGED
    table, rules, commit, day = FROZEN[study.scale]
    return HOW_JUDGED + THEN.format(table=table, rules=rules, commit=commit, day=day)


LONGEST = 160  # characters of a comment in a list of verdicts; the table of verdicts has it in full


def verdict_lines(study, notebook: str) -> str:
    """Markdown: a line a claim of this notebook with verdict, estimate, n and reason; links are those of a notebook."""
    lines = []
    for row in judged(study).query("notebook == @notebook").itertuples():
        changes = f" *Would change it:* {_shortened(row.changes)}" * bool(row.changes)
        lines.append(
            f"- {row.id}, **{row.verdict}**. [{_sentence(row.statistic)}](../docs/rules.md#{row.id.lower()})"
            f"{_estimate(row, ': ')} ({f'n {row.n}, ' * bool(row.n)}{row.unit}). "
            f"{_shortened(_ended(row.comment))}{changes}"
        )
    return "\n".join(["**Verdict here.**", "", *lines]) if lines else ""


def _shortened(comment: str) -> str:
    """Without what a rule says in parentheses, optimizers as they are written in text, at most LONGEST characters."""
    comment = re.sub(r" \([^)]*\)", "", comment)
    named = re.sub(rf"\b({'|'.join(PAPER_OPTIMIZERS)})\b", lambda found: label(found[1]), comment)
    return textwrap.shorten(named, LONGEST, placeholder=" ...")


def _sentence(statistic: str) -> str:
    return statistic.partition(". ")[0].rstrip(".")


def _ended(comment: str) -> str:
    """A comment that ends like a sentence, since another one follows."""
    return f"{comment.rstrip('.')}." if comment else ""


def _estimate(row, before: str = "", behind: str = "") -> str:
    return f"{before}{Estimate(row.value, row.low, row.high).text(2)}{behind}" if pd.notna(row.value) else ""


def evidence(study) -> pd.DataFrame:
    """Claim by claim, cells in Markdown: verdict and estimate, why, what would change it; evidence: links to rule,
    figure and notebook; and the command that prints the rows behind it."""
    rows = []
    for row in judged(study).itertuples():
        figure = read_rules()[row.id]["figure"]
        links = [
            f"[{_sentence(row.statistic)}](../docs/rules.md#{row.id.lower()})",
            f"[{figure}](../figures/{study.scale}/{figure}.png)",
            f"[{row.notebook}]({row.notebook}.ipynb)",
        ]
        why, command = f"{_ended(row.comment)} {row.changes}".strip(), f"claims {row.id} --scale {study.scale}"
        estimate = f"{_estimate(row, behind=', ')}n {row.n} ({row.unit})"
        claim = f"{row.id} {row.claim} ({row.paper})"
        rows.append((claim, row.verdict, estimate, why, "; ".join(links), f"`beyond-outliers {command}`"))
    columns = ["claim (what the paper has)", "verdict", "estimate", "why; what would change it", "evidence", "its rows"]
    return pd.DataFrame(rows, columns=columns)


finding("09_real_quantizers")(methods.order_in_words)


@finding("10_your_optimizer")
def yours(study) -> str:
    """Where an optimizer from outside stands in loss, in damage and after QAT, in a sentence each."""
    name, lines, caveat = label(study.yours), [], ""
    damage = f"loses {{}} nats under {study.protocol.measure.primary} at the Common Loss"
    sayings = {"loss": "ends at {} nats per token", "common": damage, "loss_qat": "ends at {} nats after QAT"}
    for quantity, saying in sayings.items():
        of = QUANTITIES[quantity]
        try:
            found = compare(study, of.rows(study), of.value)
        except NothingToCompare:
            lines.append(
                f"- {name} has no {readings.titles(study)[quantity][0]} at a size where all the others have one."
            )
            continue
        best = next(other for other in found.order if other != study.yours)
        against = found.difference(study.yours, best)
        lines.append(
            f"- {name} {saying.format(found.mean(study.yours).text())}: place {decisions.place(study, found)}, from "
            f"the lowest. Minus {label(best)} that is {against.text()} ({found.over}, {found.n(study.yours)})."
        )
        caveat = caveat or found.caveat
    return "\n".join([f"{name} next to the six.{caveat}", "", *lines])
