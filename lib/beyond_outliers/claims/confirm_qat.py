"""The rules on quantization-aware training: does the order of optimizers change (C12), who is worth most (C14)?"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from beyond_outliers.claims.confirm_kinds import WHOLE, Finding, numbers, thin, verdicts_of
from beyond_outliers.claims.contrasts import STRICT, UNDECIDED, USUAL, Cells, cells, contrast, decide, exists
from beyond_outliers.scaling import log_rho_draws

# ----------------------------------------------------------------------------------------------------- reversal: C12


def judge_reversal(full: Cells, qat: Cells, comparisons: int) -> tuple[np.ndarray, np.ndarray]:
    """At one size: verdict (...) and the place (...) of the optimizer with the lowest mean full-precision loss.

    reproduced: a rival is worse than it in full precision (95 %) and better under QAT, by an interval corrected for
    `comparisons` (Bonferroni); not reproduced: under QAT it is lower than every rival (95 %, intersection-union).
    """
    names, pairs = full.optimizers, [(a, b) for a in full.optimizers for b in full.optimizers]
    shape = (*full.mean.shape[:-2], len(names), len(names))  # best, rival
    fp, after = contrast(full, pairs), contrast(qat, pairs)
    worse = (fp.interval(USUAL)[1] < 0).reshape(shape)
    better = (after.interval(1 - (1 - USUAL) / comparisons)[0] > 0).reshape(shape)
    lower = (after.interval(USUAL)[1] < 0).reshape(shape) | np.eye(len(names), dtype=bool)
    best = np.nan_to_num(full.mean[..., 0], nan=np.inf).argmin(-1)
    row = best[..., None]
    holds, fails = (np.take_along_axis(c, row, -1)[..., 0] for c in ((worse & better).any(-1), lower.all(-1)))
    return decide(holds, fails), best


def reversal(table: pd.DataFrame, rule: dict, optimizers: Sequence[str], sizes: Sequence[str]) -> list[Finding]:
    """At some size the best optimizer in full precision is not the best under QAT."""
    full, qat = (cells(table, value, optimizers, sizes) for value in ("loss", "qat_loss"))
    comparisons, parts = (len(optimizers) - 1) * len(sizes), []
    for size in sizes:
        here, there = full.one_size(size), qat.one_size(size)
        if few := thin(here) or thin(there):
            parts.append(Finding(UNDECIDED, f"Undecided, {few}.", size, n=numbers(there)))
            continue
        verdict, best = (values.item() for values in judge_reversal(here, there, comparisons))
        name, losses = optimizers[best], there.mean[..., 0].copy()
        losses[best] = np.inf
        rival = optimizers[int(losses.argmin())]
        against = contrast(there, [(name, rival)])
        (low_95, high_95), (low_99, high_99) = ([float(end[0]) for end in against.interval(c)] for c in (USUAL, STRICT))
        low, high = (float(end[0]) for end in against.interval(1 - (1 - USUAL) / comparisons))
        comment = f"Under QAT {name}, the best in full precision, minus {rival}; corrected {low:.4f} to {high:.4f}."
        estimate = float(against.estimate[0])
        parts.append(
            Finding(verdict, comment, size, estimate, low_95, high_95, low_99, high_99, str(there.n.min()), rival)
        )
    return [Finding(exists([part.verdict for part in parts]), verdicts_of(parts), n=numbers(qat)), *parts]


# --------------------------------------------------------------------------------------------------- efficiency: C14


def efficiency(table: pd.DataFrame, rule: dict, optimizers: Sequence[str], sizes: Sequence[str]) -> list[Finding]:
    """log rho at 4 bits of one optimizer against every rival's, alpha and E shared, from the same bootstrap draws."""
    runs = table[table["optimizer"].isin(optimizers) & table["size"].isin(sizes)].dropna(subset=["loss"])
    by_bits = [cells(runs[runs["bits"] == bits], "loss", optimizers, sizes) for bits in (16, 4)]
    few = thin(by_bits[0]) or thin(by_bits[1])
    if few:
        return [Finding(UNDECIDED, f"Undecided, {few}.", n=numbers(by_bits[1]))]
    estimate, draws = log_rho_draws(runs, bootstrap=rule["draws"])
    half = rule["half"][0]
    (who,), rivals = half["who"], [name for name in optimizers if name not in half["who"]]
    if estimate.isna().any():
        open_ones = ", ".join(name for name in optimizers if not np.isfinite(estimate[name]))
        return [Finding(UNDECIDED, f"Undecided: the runs do not bound rho of {open_ones}.", n=numbers(by_bits[1]))]
    difference = np.stack([draws[who] - draws[rival] for rival in rivals], -1)
    ends = {c: np.quantile(difference, [(1 - c) / 2, (1 + c) / 2], axis=0) for c in (USUAL, STRICT)}
    values = np.array([estimate[who] - estimate[rival] for rival in rivals])
    verdict = judge_efficiency(values, ends[USUAL], ends[STRICT], half["margin"])
    place = int(values.argmin())
    (low, high), (low_99, high_99) = (tuple(float(end[place]) for end in ends[c]) for c in (USUAL, STRICT))
    comment = ", ".join(f"{name} {np.exp(estimate[name]):.3f}" for name in optimizers)
    n = numbers(by_bits[1])
    value, rival = float(values[place]), rivals[place]
    return [Finding(verdict, f"rho: {comment}.", WHOLE, value, low, high, low_99, high_99, n, rival)]


def judge_efficiency(estimate: np.ndarray, usual: np.ndarray, strict: np.ndarray, margin: float) -> str:
    """`judge_extreme` for "highest", with estimates (rivals,) and percentile intervals (2, rivals) at 95 and 99 %."""
    nearest = estimate.argmin()
    tie = usual[0, nearest] > -margin and usual[1, nearest] < margin
    return str(decide((usual[0] > 0).all(), (strict[1] < 0).any(), tie))
