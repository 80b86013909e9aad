"""What each notebook found, in a sentence or two with numbers, uncertainty and n, made from a study's tables.

FINDINGS: name of a notebook -> function of a study that returns Markdown. Each says what the tables cannot say, too.
Which optimizer is named lowest or highest is read off the same runs, and the intervals do not know it.
"""

from collections.abc import Callable

import numpy as np

from beyond_outliers.claims import beside, methods, readings
from beyond_outliers.claims.comparison import (
    Comparison,
    NothingToCompare,
    excludes_zero,
    label,
    listed,
    without,
    written,
)
from beyond_outliers.claims.confirm_rules import SCALE
from beyond_outliers.claims.contrasts import t_interval
from beyond_outliers.claims.eligibility import compare, eligible
from beyond_outliers.claims.evidence import judged
from beyond_outliers.claims.predictors import predictor_table
from beyond_outliers.claims.statistics import correlations

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
    open_question = "" if excludes_zero(found) or not compared.certain else ", so which of the two is lower stays open"
    return f"{label(first)} {written(found)} above it{open_question}"


@finding("01_full_precision")
def full_precision(study) -> str:
    runs = eligible(study, readings.full_precision(study))
    finished = runs[runs.status == "finished"]
    compared = compare(study, finished, "val_loss")
    best, second, *_, last = compared.order
    diverged = len(runs) - len(finished)
    left_out = f" Left out: {diverged} diverged run{'s' * (diverged > 1)}." if diverged else ""
    return (
        f"In full precision {label(best)} ends lowest, at {written(compared.mean(best))} nats a token "
        f"({compared.over}, {compared.n()}); {_beside(compared, second, best)}. {label(last)} ends highest, "
        f"{written(compared.difference(last, best))} above {label(best)}.{compared.caveat}{left_out}"
    )


@finding("02_outlier_metrics")
def outlier_metrics(study) -> str:
    compared = compare(study, readings.mmr(study), "mmr")
    lowest, highest = compared.order[0], compared.order[-1]
    numbers, n = _correlations(study, {"mmr": "MMR at", "kurtosis": "kurtosis at"}, "increase")
    return (
        f"MMR is lowest for {label(lowest)}, {written(compared.mean(lowest), 2)}, and highest for {label(highest)}, "
        f"{written(compared.mean(highest), 2)} ({compared.over}, {compared.n(lowest, highest)}).{compared.caveat} "
        f"The loss increase under {study.protocol.measure.primary} correlates with {listed(numbers)} (Pearson within "
        f"sizes, {_checkpoint(study)[1]}, n {n} runs)."
    )


def _checkpoint(study) -> tuple[str, str]:
    """Where the scale's rules read correlations, for tables and for sentences."""
    return ("common", "at the Common Loss") if study.scale == SCALE else ("final", "at the end of training")


def _correlations(study, candidates: dict[str, str], target: str) -> tuple[list[str], int]:
    """Pearson correlations with what quantization costs, within sizes: "MMR 0.31 [-0.08, 0.58]" each, and the runs.

    candidates: column of `predictor_table` -> name. Without an interval where an optimizer has few seeds; none at all
    of fewer than three runs.
    """
    table = predictor_table(study, checkpoint=_checkpoint(study)[0], spec=study.protocol.measure.primary)
    table = eligible(study, table).dropna(subset=target)
    certain = compare(study, table, target).certain
    found = correlations(table, within="size", candidates=tuple(candidates), targets=(target,)).set_index("candidate")
    numbers = []
    for name, row in zip(candidates.values(), found.loc[list(candidates)].itertuples(), strict=True):
        interval = (row.pearson, row.pearson_low, row.pearson_high) if certain else without(row.pearson)
        if np.isfinite(row.pearson):
            numbers.append(f"{name} {written(interval, 2)}")
    return numbers, int(found.n.max())


@finding("03_ptq")
def ptq(study) -> str:
    spec = study.protocol.measure.primary
    compared = compare(study, readings.damage(study, spec=spec), "increase")
    difference = compared.difference("muon", "shampoo")
    apart = "" if excludes_zero(difference) or not compared.certain else ", which can be none"
    least, second, *_, most = compared.order
    return (
        f"At equal loss (the Common Loss) {spec} costs Muon {written(compared.mean('muon'))} nats a token and Shampoo "
        f"{written(compared.mean('shampoo'))} ({compared.over}, {compared.n('muon', 'shampoo')}): a difference of "
        f"{written(difference)}{apart}. Least hurt is {label(least)}, with {_beside(compared, second, least)}; most "
        f"hurt is {label(most)}, {written(compared.mean(most))}.{compared.caveat}"
    )


@finding("04_error_propagation")
def error_propagation(study) -> str:
    modules = eligible(study, readings.with_input_error(readings.modules(study)))
    if modules.empty:
        raise NothingToCompare("no run's error has been measured")
    shares = readings.accumulated_dominates(modules).groupby(modules.run).mean()
    runs = modules.drop_duplicates("run").assign(share=lambda rows: rows.run.map(shares))
    mean = t_interval(shares) if compare(study, runs, "share").certain else without(shares.mean())
    increase, n = _correlations(study, {"R_L": "the loss increase at"}, "increase")
    accuracy, _ = _correlations(study, {"R_L": "cloze accuracy at"}, "accuracy")
    return (
        f"Under {study.protocol.measure.primary} the error at the network's end, R_L, correlates with "
        f"{listed(increase + accuracy)} (Pearson within sizes, {_checkpoint(study)[1]}, n {n} runs). Inherited error "
        f"(A) exceeds both new error (B) and their interaction (C) in {written(mean, 0, 100)} % of the modules (mean "
        f"over {len(shares)} runs, modules that add no error included)."
    )


@finding("05_qat")
def qat(study) -> str:
    losses = eligible(study, readings.qat_losses(study))
    losses = losses[losses.status_qat == "finished"] if len(losses) else losses
    increase, full, quantized = (compare(study, losses, of) for of in ("increase", "val_loss_fp", "val_loss_qat"))
    least, most = increase.order[0], increase.order[-1]
    best, second = quantized.order[:2]
    same = f"{label(best)}, best in full precision, is" if best == full.order[0] else f"{label(best)} is"
    before = "" if best == full.order[0] else f" ({label(full.order[0])} in full precision)"
    return (
        f"Training in 4 bits (QAT) costs {label(least)} least, {written(increase.mean(least))} nats a token, and "
        f"{label(most)} most, {written(increase.mean(most))} ({increase.over}, {increase.n(least, most)}). {same} best "
        f"under QAT{before}, with {_beside(quantized, second, best)}.{increase.caveat}"
    )


@finding("06_scaling_laws")
def scaling_laws(study) -> str:
    runs = eligible(study, readings.scaling_runs(study))
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
    numbers = [f"{label(name)} {written((row.rho, row.low, row.high), 2)}" for name, row in known.iterrows()]
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
        f"{len(rows)} {verdict}{f' ({listed(list(rows.id))})' if verdict != 'undecided' else ''}"
        for verdict in ("reproduced", "not reproduced", "tie", "undecided")
        if len(rows := table[table.verdict == verdict])
    ]
    rules = "the rules of the confirmatory study" if study.scale == SCALE else "rules written down beforehand"
    return f"Of the paper's {len(table)} claims, by {rules}: {', '.join(by_verdict)}."


@finding("08_probe_your_model")
def probed(found) -> str:
    """Of what `probe` found; the one finding that is not of a study."""
    worst = found.worst(1).iloc[0]
    interval = (found.error.value, found.error.low, found.error.high)
    return (
        f"{found.name} in {found.spec.name}: the relative squared error at its end, R_L, is {written(interval)} "
        f"(n {found.error.n_sequences} sequences). Of its linear layers, {worst['name']} adds most new error "
        f"(B = {worst['B']:.3f})."
    )


finding("09_real_quantizers")(methods.finding)
finding("10_your_optimizer")(beside.finding)
