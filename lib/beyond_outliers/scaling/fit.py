"""Scaling laws of loss against size, with a parameter efficiency for every precision, and what the runs tell of them.

    fixed_ratio    L(N, bits)    = A / (N rho_bits)^alpha + E
    full           L(N, D, bits) = A / (N rho_bits)^alpha + B / D^beta + E

N parameters, D training tokens, L nats per token; rho is 1 at 16 bits (full precision), so that a model of N parameters
trained at b bits is worth a full-precision one of rho_b N. arXiv 2509.23500, section 6, fits the first at D/N = 20
for every optimizer; the second is Hoffmann et al. (arXiv 2203.15556, section 3.3) with rho, as in arXiv 2502.05003.

The objective is Hoffmann's: the Huber loss (delta 1e-3) of log L - log prediction, over all precisions jointly, from
many starts. All starts, all bootstrap resamples and all profiles are minimised side by side as one batch.
"""

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import f as f_distribution

from beyond_outliers.scaling.least_squares import (
    FORMS,
    FULL_PRECISION,
    Problem,
    build_problem,
    checked_runs,
    minimise,
    starting_points,
)

SIZES_NEEDED = 3  # three numbers, A, alpha and E, describe a curve over N
RUNS_NEEDED = 3  # at a precision, for its rho: the spread of fewer is not known
NOISE_FLOOR = 1e-4  # relative; residuals below are taken for noise of this size when a profile is judged


class IdentificationWarning(UserWarning):
    """The runs do not determine a parameter of the scaling law."""


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law. `intervals` and `identified` mirror `parameters`, with one entry "rho" that is a dict by bits.

    parameters: A, alpha, E (and B, beta). rho: by bits, 1 at 16. intervals: (low, high). identified: False where the
    runs leave a parameter open; `warnings` says why, in words. objective: the Huber loss; n: the number of runs.
    """

    form: str
    parameters: dict[str, float]
    rho: dict[float, float]
    intervals: dict = field(repr=False)
    identified: dict
    warnings: list[str]
    objective: float
    n: int

    def predict(self, N, D=None, bits=FULL_PRECISION) -> np.ndarray:
        """Loss in nats per token; N, D and bits broadcast; ValueError for bits without a rho, or no D in "full"."""
        unknown = sorted(set(np.unique(bits).tolist()) - set(self.rho))
        if unknown:
            raise ValueError(f"no rho was fitted for bits {unknown}; fitted: {sorted(self.rho)}")
        p, bits = self.parameters, np.asarray(bits)
        rho = np.select([bits == b for b in self.rho], list(self.rho.values()))
        loss = p["A"] / (np.asarray(N, dtype=float) * rho) ** p["alpha"] + p["E"]
        if self.form == "full":
            if D is None:
                raise ValueError('the form "full" needs D, the number of training tokens')
            loss = loss + p["B"] / np.asarray(D, dtype=float) ** p["beta"]
        return loss

    def table(self) -> pd.DataFrame:
        """One row a parameter: parameter, bits (rho only), value, low, high, identified."""
        keys = [(name, None) for name in self.parameters] + [("rho", bits) for bits in self.rho]
        parts: tuple[dict, ...] = ({"rho": self.rho, **self.parameters}, self.intervals, self.identified)
        found = []
        for name, bits in keys:
            value, interval, known = (of[name] if bits is None else of[name][bits] for of in parts)
            found.append((name, bits, value, *interval, known))
        return pd.DataFrame(found, columns=["parameter", "bits", "value", "low", "high", "identified"])


def fit_scaling_law(
    runs: pd.DataFrame,
    form: str = "fixed_ratio",
    delta: float = 1e-3,
    bootstrap: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> ScalingLaw:
    """Fits one law to `runs`: columns N, bits, loss and, for "full", D; one row a run; further columns are ignored.

    Intervals are percentiles over `bootstrap` resamples of the runs, drawn within each precision, widened about the
    estimate by sqrt(n / (n - parameters)), the usual correction of residuals for the parameters that they were
    fitted with; NaN for `bootstrap=0`, and where there are no more runs than parameters: nothing is left to resample.
    A parameter counts as not identified, with an `IdentificationWarning`, if there are no more runs than parameters;
    if fewer than three sizes were trained (for "full" also: only one ratio D/N; for "fixed_ratio" with a column D:
    ratios that differ by more than a fifth); if a rho rests on fewer than three runs; if it ends at a limit of the
    search; or if its profile is flat: with it held at half or at double its value and all others fitted anew, an
    F test at 5 % cannot tell the fits apart. A and B, which shift with their exponents, are identified when those are.
    Raises ValueError for an unknown form, missing columns, no rows, no runs at 16 bits, for values that are not
    finite and positive (diverged runs must be left out), and for such a `delta`, `bootstrap` or `confidence`.
    """
    return _fit(checked_runs(runs, form, None), form, None, (), delta, bootstrap, confidence, seed)[None]


def fit_shared(
    runs: pd.DataFrame,
    by: str = "optimizer",
    share: Sequence[str] = ("E",),
    form: str = "fixed_ratio",
    delta: float = 1e-3,
    bootstrap: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, ScalingLaw]:
    """One law for every value of the column `by`, fitted jointly, with the parameters in `share` common to all.

    rho is always each one's own; a group needs as many sizes as it has parameters of its own among A, alpha and E.
    `objective` and `n` of every law are those of the joint fit. Otherwise as
    `fit_scaling_law`; raises ValueError also for a parameter in `share` that the form does not have.
    """
    return _fit(checked_runs(runs, form, by), form, by, share, delta, bootstrap, confidence, seed)


def compare_forms(
    runs: pd.DataFrame,
    by: str = "optimizer",
    forms: Sequence[str] = ("fixed_ratio",),
    shares: Sequence[Sequence[str]] = ((), ("E",), ("alpha",), ("E", "alpha")),
    delta: float = 1e-3,
) -> pd.DataFrame:
    """Fits every form with every choice of shared parameters to all sizes but the largest, and predicts that one.

    Returns one row a variant, the best first: form, share, n_parameters, n_fit, n_heldout, fit_error and
    heldout_error (mean |log loss - log prediction|, about the relative error), heldout_bias (its signed mean:
    positive where losses are worse than predicted), identified (every parameter).
    Raises ValueError as `fit_shared`, and if there are not two sizes or a law has no run below the largest.
    """
    largest = checked_runs(runs, forms[0], by)["N"].max()
    rest, heldout = runs[runs["N"] < largest], runs[runs["N"] == largest]
    if rest.empty:
        raise ValueError(f"all runs have N = {largest:g}: there is no larger size to predict")
    lacking = sorted({*zip(heldout[by], heldout["bits"], strict=True)} - {*zip(rest[by], rest["bits"], strict=True)})
    if lacking:
        raise ValueError(f"no run below the largest size N = {largest:g} for ({by}, bits) in {lacking}")
    rows = []
    for form, share in itertools.product(forms, shares):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IdentificationWarning)  # told by the column `identified`
            laws = fit_shared(rest, by, share, form, delta, bootstrap=0)
        within, errors = (_log_errors(laws, part, by) for part in (rest, heldout))
        row: dict[str, Any] = {"form": form, "share": ", ".join(share) or "nothing"}
        own = len(FORMS[form]) - len(share)
        row["n_parameters"] = len(share) + sum(own + len(law.rho) - 1 for law in laws.values())
        row |= {"n_fit": len(rest), "n_heldout": len(heldout), "fit_error": np.abs(within).mean()}
        row |= {"heldout_error": np.abs(errors).mean(), "heldout_bias": errors.mean()}
        rows.append(row | {"identified": not any(law.warnings for law in laws.values())})
    return pd.DataFrame(rows).sort_values("heldout_error", ignore_index=True)


def _log_errors(laws: dict[str, ScalingLaw], runs: pd.DataFrame, by: str) -> np.ndarray:
    predicted = [laws[name].predict(part["N"], part.get("D"), part["bits"]) for name, part in runs.groupby(by)]
    losses = [part["loss"] for _, part in runs.groupby(by)]
    return np.log(np.concatenate(losses)) - np.log(np.concatenate(predicted))


def log_rho_draws(
    runs: pd.DataFrame,
    by: str = "optimizer",
    share: Sequence[str] = ("E", "alpha"),
    bits: float = 4,
    delta: float = 1e-3,
    bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[pd.Series, pd.DataFrame]:
    """log rho of every group at `bits` in the joint "fixed_ratio" fit, and the same in `bootstrap` resamples.

    Runs are resampled within `by` x bits x N, so that every draw has the design of the study, and draws are widened
    about the estimate by sqrt(runs / (runs - strata)), since each stratum's mean is taken from the data. One draw is
    one row with a column a group: differences of columns carry what the groups share. An estimate at a limit of the
    search is NaN. Raises ValueError as `fit_shared`, and for a group without runs at `bits`.
    """
    runs = checked_runs(runs, "fixed_ratio", by)
    lacking = sorted(set(runs[by]) - set(runs.loc[runs["bits"] == bits, by]))
    if lacking:
        raise ValueError(f"no run at {bits:g} bits of {lacking}")
    problem = build_problem(runs, "fixed_ratio", by, share, delta)
    strata = [by, "bits", "N"]
    if (spare := len(runs) - runs.groupby(strata).ngroups) < 1:
        raise ValueError(f"{len(runs)} runs in {len(runs) - spare} strata: nothing is left to resample")
    best, _, draws = _drawn(problem, runs, strata, bootstrap, seed)
    draws = best + np.sqrt(len(runs) / spare) * (draws - best)
    bounded = (best > problem.lower + 1e-6) & (best < problem.upper - 1e-6)
    groups = sorted(set(runs[by]))
    columns = [problem.keys.index(("rho", group, bits)) for group in groups]
    estimate = np.where(bounded, best, np.nan)[columns]
    return pd.Series(estimate, groups), pd.DataFrame(draws[:, columns], columns=groups)


# ----------------------------------------------------------------------------------------------------------- the fit


def _fit(runs, form, by, share, delta, bootstrap, confidence, seed) -> dict:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if not 0 < delta < np.inf:
        raise ValueError(f"delta must be positive and finite, not {delta}")
    if bootstrap != int(bootstrap) or bootstrap < 0:
        raise ValueError(f"bootstrap must be a whole number of resamples from 0, not {bootstrap}")
    problem = build_problem(runs, form, by, share, delta)
    n, p = len(runs), len(problem.keys)
    bootstrap = bootstrap if n > p else 0
    best, objective, draws = _drawn(problem, runs, [by, "bits"] if by else ["bits"], bootstrap, seed)

    reasons = _unidentified(problem, runs, form, by, best, objective)
    for message in dict.fromkeys(itertools.chain.from_iterable(reasons.values())):
        warnings.warn(message, IdentificationWarning, stacklevel=3)

    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    widening = np.sqrt(n / (n - p)) if bootstrap else np.nan
    laws = {}
    for group in [None] if by is None else sorted(set(runs[by])):
        own = [key for key in problem.keys if key[1] in (None, group)]
        values = {key: float(_natural(problem, key, best[None], group)[0]) for key in own}
        intervals = {}
        for key in own:
            sample = np.log(_natural(problem, key, draws, group))
            centre = np.log(values[key])
            ends = np.quantile(centre + widening * (sample - centre), tails) if bootstrap else (np.nan, np.nan)
            intervals[key] = (float(np.exp(ends[0])), float(np.exp(ends[1])))
        open_questions = {key: reasons[key] for key in own}
        laws[group] = ScalingLaw(
            form=form,
            parameters={key[0]: values[key] for key in own if key[0] != "rho"},
            rho=_mirror(values, 1.0)["rho"],
            intervals=_mirror(intervals, (1.0, 1.0)),
            identified=_mirror({key: not found for key, found in open_questions.items()}, True),
            warnings=list(dict.fromkeys(itertools.chain.from_iterable(open_questions.values()))),
            objective=objective,
            n=n,
        )
    return laws


def _drawn(problem: Problem, runs, strata: list[str], times: int, seed: int) -> tuple[np.ndarray, float, np.ndarray]:
    """The best theta (P,) from all starts, its objective, and theta (times, P) of resampled runs, from the best on."""
    starts = starting_points(problem)
    fits, costs = minimise(problem, starts, np.ones((len(starts), len(runs))))
    best = fits[np.argmin(costs)]
    weights = resamples(runs.groupby(strata).ngroup().to_numpy(), times, np.random.default_rng(seed))
    return best, float(costs.min()), minimise(problem, np.tile(best, (times, 1)), weights)[0]


def _mirror(of: Mapping[tuple, object], full_precision) -> dict:
    """Column keys -> names, "rho" a dict by bits with `full_precision` at 16."""
    rho = {key[2]: of[key] for key in sorted((k for k in of if k[0] == "rho"), key=lambda k: k[2])}
    return {key[0]: of[key] for key in of if key[0] != "rho"} | {"rho": {FULL_PRECISION: full_precision} | rho}


def _natural(problem: Problem, key: tuple, theta: np.ndarray, group) -> np.ndarray:
    """The values of a parameter (S,) out of theta (S, P), A and B no longer relative to the mean N and D."""
    value = theta[:, problem.keys.index(key)]
    if key[0] in problem.centre:
        exponent = "alpha" if key[0] == "A" else "beta"
        column = next(i for i, k in enumerate(problem.keys) if k[0] == exponent and k[1] in (None, group))
        value = value + np.exp(theta[:, column]) * problem.centre[key[0]]
    return np.exp(value)


def _unidentified(problem, runs, form, by, best, objective) -> dict[tuple, list[str]]:
    """Why each parameter (column of theta) is not identified; an empty list where it is."""
    n, p = problem.log_loss.shape[0], len(problem.keys)
    reasons: dict[tuple, list[str]] = {key: [] for key in problem.keys}

    def mark(keys: Iterable[tuple], message: str):
        for key in keys:
            reasons[key].append(message)

    if n <= p:
        mark(problem.keys, f"{n} runs cannot determine {p} parameters and their uncertainty: every estimate is open")
    # shared parameters are seen by all runs, a group's own by its runs only
    for group, part in [(None, runs), *(runs.groupby(by) if by else [])]:
        keys = [key for key in problem.keys if key[1] == group]
        of_group = f" of {group}" if group is not None else ""
        sizes = part["N"].nunique()
        needed = SIZES_NEEDED if group is None else sum(key[0] in ("A", "alpha", "E") for key in keys)
        if sizes < needed:
            mark(
                keys,
                f"{sizes} size{'s' * (sizes != 1)}{of_group} cannot determine a curve of three parameters "
                f"(A, alpha, E), nor rho, which is read off it: at least {needed} are needed",
            )
        if form == "full" or "D" in runs:
            ratios = part["D"] / part["N"]
            has_data_term = any(key[0] in ("B", "beta") for key in keys)
            if has_data_term and ratios.max() < 1.05 * ratios.min():
                mark(
                    keys,
                    f"all runs{of_group} have the same D/N ({ratios.mean():.3g}): "
                    "the terms in N and in D cannot be told apart",
                )
            if form == "fixed_ratio" and ratios.max() > 1.2 * ratios.min():
                mark(
                    keys,
                    f'D/N{of_group} varies from {ratios.min():.3g} to {ratios.max():.3g}, but "fixed_ratio" has no '
                    'term for it: use form="full"',
                )
    for key in problem.keys:
        n_runs = int((problem.columns["rho"] == problem.keys.index(key)).sum())
        if key[0] == "rho" and n_runs < RUNS_NEEDED:
            mark([key], f"{_label(key)} rests on {n_runs} run{'s' * (n_runs != 1)}: at least {RUNS_NEEDED} are needed")

    judged = [c for c, key in enumerate(problem.keys) if key[0] not in ("A", "B")]
    theta = np.tile(best, (2 * len(judged), 1))
    frozen = np.zeros(theta.shape, dtype=bool)
    for row, column in enumerate(np.repeat(judged, 2)):
        theta[row, column] += np.log(2) * (1 if row % 2 else -1)
        frozen[row, column] = True
    costs = minimise(problem, theta, np.ones((len(theta), n)), frozen)[1].reshape(-1, 2)
    noise = max(objective, n * NOISE_FLOOR**2 / 2) / max(1, n - p)
    flat = (costs - objective) / noise < f_distribution.ppf(0.95, 1, max(1, n - p))
    for row, column in enumerate(judged):
        key, value = problem.keys[column], np.exp(best[column])
        label = _label(key)
        if best[column] <= problem.lower[column] + 1e-6 or best[column] >= problem.upper[column] - 1e-6:
            mark([key], f"{label} = {value:.3g} lies at the limit of the search: the runs do not bound it")
        elif flat[row].any():
            sides = " and ".join(
                f"{value * factor:.3g}" for factor, hit in zip((0.5, 2), flat[row], strict=True) if hit
            )
            mark([key], f"the profile of {label} = {value:.3g} is flat: {sides} fits about as well")
    for column, key in enumerate(problem.keys):
        if key[0] in ("A", "B"):
            exponents = problem.columns["alpha" if key[0] == "A" else "beta"][problem.columns[key[0]] == column]
            for message in itertools.chain.from_iterable(reasons[problem.keys[e]] for e in np.unique(exponents)):
                reasons[key] += [message] if message not in reasons[key] else []
    return reasons


def _label(key: tuple) -> str:
    name, group, bits = key
    return name + (f" at {bits} bits" if bits is not None else "") + (f" of {group}" if group is not None else "")


def resamples(strata: np.ndarray, times: int, rng: np.random.Generator) -> np.ndarray:
    """How often each run is drawn, with replacement within its stratum, (times, n)."""
    weights = np.zeros((times, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=times)
    return weights
