"""What each notebook found, in a sentence or two with numbers, uncertainty and n, made from a study's tables.

FINDINGS: name of a notebook -> function of a study that returns Markdown. Each says what the tables cannot say, too.
Which optimizer is named lowest or highest is read off the same runs, and the intervals do not know it.
"""

import textwrap
from collections.abc import Callable

import numpy as np
import pandas as pd

from beyond_outliers.claims import beside, methods, readings
from beyond_outliers.claims.estimates import (
    Comparison,
    Estimate,
    NothingToCompare,
    compare,
    correlations,
    label,
    listed,
    of_the_paper,
    t_interval,
)
from beyond_outliers.claims.rules import VERDICTS
from beyond_outliers.claims.verdicts import FROZEN, frozen, judged, read_rules, rule_file, rule_place

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


def _beside(compared: Comparison, first: str, second: str) -> str:
    """How far `first` lies above `second`, and whether that is more than luck."""
    found = compared.difference(first, second)
    open_question = "" if found.excludes_zero or not compared.certain else ", so which of the two is lower stays open"
    return f"{label(first)} {found.text()} above it{open_question}"


@finding("01_full_precision")
def full_precision(study) -> str:
    runs = of_the_paper(readings.full_precision(study))
    finished = runs[runs.status == "finished"]
    compared = compare(study, finished, "val_loss")
    best, second, *_, last = compared.order
    diverged = len(runs) - len(finished)
    left_out = f" Left out: {diverged} diverged run{'s' * (diverged > 1)}." if diverged else ""
    return (
        f"In full precision {label(best)} ends lowest, at {compared.mean(best).text()} nats per token "
        f"({compared.over}, {compared.n()}); {_beside(compared, second, best)}. {label(last)} ends highest, "
        f"{compared.difference(last, best).text()} above {label(best)}.{compared.caveat}{left_out}"
    )


@finding("02_outlier_metrics")
def outlier_metrics(study) -> str:
    compared = compare(study, readings.mmr(study), "mmr")
    lowest, highest = compared.order[0], compared.order[-1]
    numbers, n = _correlations(study, {"mmr": "MMR at", "kurtosis": "kurtosis at"}, "increase")
    return (
        f"MMR is lowest for {label(lowest)}, {compared.mean(lowest).text(2)}, and highest for {label(highest)}, "
        f"{compared.mean(highest).text(2)} ({compared.over}, {compared.n(lowest, highest)}).{compared.caveat} "
        f"The loss increase under {study.protocol.measure.primary} correlates with {listed(numbers)} (Pearson within "
        f"sizes, {_checkpoint(study)[1]}, n {n} runs)."
    )


def _checkpoint(study) -> tuple[str, str]:
    """Where the scale's rules read correlations, for tables and for sentences."""
    common = study.scale in ("confirm", rule_file()["study"]["judges"])
    return ("common", "at the Common Loss") if common else ("final", "at the end of training")


def _correlations(study, candidates: dict[str, str], target: str) -> tuple[list[str], int]:
    """Pearson correlations with what quantization costs, within sizes: "MMR 0.31 [-0.08, 0.58]" each, and the runs.

    candidates: column of `predictor_table` -> name. Without an interval where an optimizer has few seeds; none at all
    of fewer than three runs.
    """
    table = readings.predictor_table(study, checkpoint=_checkpoint(study)[0], spec=study.protocol.measure.primary)
    table = of_the_paper(table).dropna(subset=target)
    certain = compare(study, table, target).certain
    found = correlations(table, within="size", candidates=tuple(candidates), targets=(target,)).set_index("candidate")
    numbers = []
    for name, row in zip(candidates.values(), found.loc[list(candidates)].itertuples(), strict=True):
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
        f"At equal loss (the Common Loss) {spec} costs Muon {compared.mean('muon').text()} nats per token and Shampoo "
        f"{compared.mean('shampoo').text()} ({compared.over}, {compared.n('muon', 'shampoo')}): a difference of "
        f"{difference.text()}{apart}. Least hurt is {label(least)}, with {_beside(compared, second, least)}; most "
        f"hurt is {label(most)}, {compared.mean(most).text()}.{compared.caveat}"
    )


@finding("04_error_propagation")
def error_propagation(study) -> str:
    modules = of_the_paper(readings.with_input_error(readings.modules(study)))
    if modules.empty:
        raise NothingToCompare("no run's error has been measured")
    shares = readings.accumulated_dominates(modules).groupby(modules.run).mean()
    runs = modules.drop_duplicates("run").assign(share=lambda rows: rows.run.map(shares))
    mean = t_interval(shares) if compare(study, runs, "share").certain else Estimate(float(shares.mean()))
    increase, n = _correlations(study, {"R_L": "the loss increase at"}, "increase")
    accuracy, _ = _correlations(study, {"R_L": "cloze accuracy at"}, "accuracy")
    return (
        f"Under {study.protocol.measure.primary} the error at the network's end, R_L, correlates with "
        f"{listed(increase + accuracy)} (Pearson within sizes, {_checkpoint(study)[1]}, n {n} runs). Inherited error "
        f"(A) exceeds both new error (B) and their interaction (C) in {mean.text(0, 100)} % of the modules (mean "
        f"over {len(shares)} runs, modules that add no error included)."
    )


@finding("05_qat")
def qat(study) -> str:
    losses = of_the_paper(readings.qat_losses(study))
    losses = losses[losses.status_qat == "finished"] if len(losses) else losses
    increase, full, quantized = (compare(study, losses, of) for of in ("increase", "val_loss_fp", "val_loss_qat"))
    least, most = increase.order[0], increase.order[-1]
    best, second = quantized.order[:2]
    same = f"{label(best)}, best in full precision, is" if best == full.order[0] else f"{label(best)} is"
    before = "" if best == full.order[0] else f" ({label(full.order[0])} in full precision)"
    return (
        f"Training in 4 bits (QAT) costs {label(least)} least, {increase.mean(least).text()} nats per token, and "
        f"{label(most)} most, {increase.mean(most).text()} ({increase.over}, {increase.n(least, most)}). {same} best "
        f"under QAT{before}, with {_beside(quantized, second, best)}.{increase.caveat}"
    )


@finding("06_scaling_laws")
def scaling_laws(study) -> str:
    runs = of_the_paper(readings.scaling_runs(study))
    sizes = runs["size"].nunique()
    if set(runs.bits) < {4, 16}:
        raise NothingToCompare("a law needs runs in full precision and under QAT")
    rho = readings.efficiencies(readings.scaling_laws(runs)).set_index("optimizer")
    known = rho[rho.identified.astype(bool)].sort_values("rho", ascending=False)
    if known.empty:
        return (
            f"{len(runs)} runs of {sizes} size{'s' * (sizes != 1)} identify rho, what a 4-bit parameter is worth, for "
            "none of the optimizers: nothing can be said about who gets most out of one."
        )
    numbers = [f"{label(name)} {Estimate(row.rho, row.low, row.high).text(2)}" for name, row in known.iterrows()]
    others = [label(name) for name in runs.optimizer.unique() if name not in known.index]
    unknown = f" Not identified: {listed(others)}." if others else ""
    return (
        f"A 4-bit parameter is worth rho full-precision ones: {listed(numbers)} ({sizes} "
        f"size{'s' * (sizes != 1)}, {len(runs)} runs).{unknown}"
    )


@finding("07_claims")
def claims(study) -> str:
    table = judged(study)
    by_verdict = [
        f"{len(rows)} {verdict}{f' ({listed(list(rows.id))})' if verdict in VERDICTS[:3] else ''}"
        for verdict in VERDICTS
        if len(rows := table[table.verdict == verdict])
    ]
    beforehand = study.scale in ("laptop", rule_file()["study"]["judges"])
    rules = "rules written down beforehand" if beforehand else "the rules of data/claims.toml, whatever was seen before"
    rules = "the rules of the confirmatory study" if study.scale == "confirm" else rules
    return f"Of the paper's {len(table)} claims, by {rules}: {', '.join(by_verdict)}."


@finding("08_probe_your_model")
def probed(found) -> str:
    """Of what `probe` found; the one finding that is not of a study."""
    worst = found.worst(1).iloc[0]
    interval = Estimate(found.error.value, found.error.low, found.error.high)
    return (
        f"{found.name} in {found.spec.name}: the relative squared error at its end, R_L, is {interval.text()} "
        f"(n {found.error.n_sequences} sequences). Of its linear layers, {worst['name']} adds most new error "
        f"(B = {worst['B']:.3f})."
    )


HOW_JUDGED = """## The verdicts

Every claim has one rule, the same at every scale: `data/claims.toml`. Sizes are strata, seeds replicates. An estimate
is a difference, slope, share or correlation, with a 95 % interval that knows seeds and tuning.

- *Reproduced*: the interval lies on the claimed side of the threshold, for every rival where there are several.
- *Not reproduced*: one lies on the other side (of differences at 99 %).
- *Tie*: the nearest rival lies within a margin stated beforehand.
- *Undecided*: the rest, where there are data.
- *Not measured*: a number that the rule reads is not there.

Where sizes differ, no mean stands for them: each size speaks for itself. `trend` is the slope per doubling of the size.
Damage is the loss increase under W4A4 at the Common Loss, with the output head quantized and without it."""
THEN = """

**The figure shows what was said at the time**, by rules of that time ([{rules}](../data/{rules})): the table
{table}.csv of commit {commit}, {day}, which is never made again. The table has the verdicts by the rules of today.
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
        changes = f" *Would change it:* {textwrap.shorten(row.changes, LONGEST, placeholder=' ...')}" * bool(
            row.changes
        )
        lines.append(
            f"- {row.id}, **{row.verdict}**. [{_sentence(row.statistic)}](../{rule_place(study.scale, row.id)})"
            f"{_estimate(row, ': ')} (n {row.n}, {row.unit}). "
            f"{textwrap.shorten(_ended(row.comment), LONGEST, placeholder=' ...')}{changes}"
        )
    return "\n".join(["**Verdict here.**", "", *lines]) if lines else ""


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
            f"[{_sentence(row.statistic)}](../{rule_place(study.scale, row.id)})",
            f"[{figure}](../figures/{study.scale}/{figure}.png)",
            f"[{row.notebook}]({row.notebook}.ipynb)",
        ]
        rows.append(
            {
                "claim (what the paper has)": f"{row.id} {row.claim} ({row.paper})",
                "verdict": row.verdict,
                "estimate": f"{_estimate(row, behind=', ')}n {row.n} ({row.unit})",
                "why; what would change it": f"{_ended(row.comment)} {row.changes}".strip(),
                "evidence": "; ".join(links),
                "its rows": f"`beyond-outliers claims {row.id} --scale {study.scale}`",
            }
        )
    return pd.DataFrame(rows)


finding("09_real_quantizers")(methods.finding)
finding("10_your_optimizer")(beside.finding)
