"""Scaling laws of loss against size, with a parameter efficiency for every precision, and what the runs tell of them.

    L(N, bits) = A / (N rho_bits)^alpha + E

N parameters, L nats per token; rho is 1 at 16 bits (full precision), so that a model of N parameters trained at b bits
is worth a full-precision one of rho_b N. arXiv 2509.23500, section 6, fits this law at D/N = 20 tokens per parameter
for every optimizer.

The objective is that of Hoffmann et al. (arXiv 2203.15556, section 3.3): the Huber loss (delta 1e-3) of
log L - log prediction, over all precisions jointly, from many starts. All starts, all bootstrap resamples and all
profiles are minimised side by side as one batch.
"""

import itertools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.stats import f as f_distribution

from beyond_outliers.scaling.least_squares import (
    FULL_PRECISION,
    PARAMETERS,
    Problem,
    build_problem,
    checked_runs,
    minimise,
    starting_points,
)

SIZES_NEEDED = 3  # three numbers, A, alpha and E, describe a curve over N
RUNS_NEEDED = 3  # at a precision, for its rho: the spread of fewer is not known
TAILS = (1 - 0.95) / 2, (1 + 0.95) / 2  # of a 95 % interval
NOISE_FLOOR = 1e-4  # relative; residuals below are taken for noise of this size when a profile is judged


class IdentificationWarning(UserWarning):
    """The runs do not determine a parameter of the scaling law."""


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law.

    parameters: A, alpha, E. rho: by bits, 1 at 16. rows: the table of both, with intervals (low, high), and identified,
    False where the runs leave a parameter open; `warnings` says why, in words. objective: the Huber loss; n: runs.
    """

    parameters: dict[str, float]
    rho: dict[float, float]
    rows: pd.DataFrame = field(repr=False)
    warnings: list[str]
    objective: float
    n: int

    def predict(self, N, bits=FULL_PRECISION) -> np.ndarray:
        """Loss in nats per token; N and bits broadcast; ValueError for bits without a rho."""
        if unknown := sorted(set(np.unique(bits).tolist()) - set(self.rho)):
            raise ValueError(f"no rho was fitted for bits {unknown}; fitted: {sorted(self.rho)}")
        p, bits = self.parameters, np.asarray(bits)
        rho = np.select([bits == b for b in self.rho], list(self.rho.values()))
        return p["A"] / (np.asarray(N, dtype=float) * rho) ** p["alpha"] + p["E"]

    def table(self) -> pd.DataFrame:
        """One row a parameter: parameter, bits (rho only), value, low, high, identified."""
        return self.rows


def fit_scaling_law(runs: pd.DataFrame, bootstrap: int = 200) -> ScalingLaw:
    """Fits one law to `runs`: columns N, bits, loss and, if you like, D; one row a run; further columns are ignored.

    Intervals (95 %) are percentiles over `bootstrap` resamples of the runs, drawn within each precision, widened about
    the estimate by sqrt(n / (n - parameters)), the usual correction of residuals for the parameters that they were
    fitted with; NaN for `bootstrap=0`, and where there are no more runs than parameters: nothing is left to resample.
    A parameter counts as not identified, with an `IdentificationWarning`, if there are no more runs than parameters;
    if fewer than three sizes were trained; if ratios D/N differ by more than a fifth; if a rho rests on fewer than
    three runs; if it ends at a limit of the search; or if its profile is flat: with it held at half or at double its
    value and all others fitted anew, an F test at 5 % cannot tell the fits apart. A, which shifts with alpha, is
    identified when alpha is. Raises ValueError for missing columns, no rows, no runs at 16 bits, for values that are
    not finite and positive (diverged runs must be left out), and for a `bootstrap` that is no whole number from 0.
    """
    return _fit(runs, None, (), bootstrap)[None]


def fit_shared(
    runs: pd.DataFrame, by: str = "optimizer", share: Sequence[str] = ("E",), bootstrap: int = 200
) -> dict[str, ScalingLaw]:
    """One law for every value of the column `by`, fitted jointly, with the parameters in `share` common to all.

    rho is always each one's own; a group needs as many sizes as it has parameters of its own among A, alpha and E.
    `objective` and `n` of every law are those of the joint fit. Otherwise as
    `fit_scaling_law`; raises ValueError also for a parameter in `share` that is none of A, alpha and E.
    """
    return _fit(runs, by, share, bootstrap)


def compare_forms(
    runs: pd.DataFrame, shares: Sequence[Sequence[str]] = ((), ("E",), ("alpha",), ("E", "alpha"))
) -> pd.DataFrame:
    """Fits the optimizers with every choice of shared parameters to all sizes but the largest, and predicts that one.

    Returns one row a choice, the best first: form ("fixed_ratio"), share, n_parameters, n_fit, n_heldout, fit_error and
    heldout_error (mean |log loss - log prediction|, about the relative error), heldout_bias (its signed mean:
    positive where losses are worse than predicted), identified (every parameter).
    Raises ValueError as `fit_shared`, and if there are not two sizes or a law has no run below the largest.
    """
    by = "optimizer"
    runs = checked_runs(runs, by)
    largest = runs["N"].max()
    rest, heldout = runs[runs["N"] < largest], runs[runs["N"] == largest]
    if rest.empty:
        raise ValueError(f"all runs have N = {largest:g}: there is no larger size to predict")
    fitted, asked = ({*zip(part[by], part["bits"], strict=True)} for part in (rest, heldout))
    if lacking := sorted(asked - fitted):
        raise ValueError(f"no run below the largest size N = {largest:g} for ({by}, bits) in {lacking}")
    rows = []
    for share in shares:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IdentificationWarning)  # told by the column `identified`
            laws = fit_shared(rest, by, share, bootstrap=0)
        within, errors = (_log_errors(laws, part, by) for part in (rest, heldout))
        own = len(PARAMETERS) - len(share)
        rows.append({
            "form": "fixed_ratio", "share": ", ".join(share) or "nothing",
            "n_parameters": len(share) + sum(own + len(law.rho) - 1 for law in laws.values()),
            "n_fit": len(rest), "n_heldout": len(heldout), "fit_error": np.abs(within).mean(),
            "heldout_error": np.abs(errors).mean(), "heldout_bias": errors.mean(),
            "identified": not any(law.warnings for law in laws.values()),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values("heldout_error", ignore_index=True)


def _log_errors(laws: dict[str, ScalingLaw], runs: pd.DataFrame, by: str) -> np.ndarray:
    groups = runs.groupby(by)
    predicted = [laws[name].predict(part["N"], part["bits"]) for name, part in groups]
    return np.log(np.concatenate([part["loss"] for _, part in groups])) - np.log(np.concatenate(predicted))


def log_rho_draws(runs: pd.DataFrame, bootstrap: int) -> tuple[pd.Series, pd.DataFrame]:
    """log rho of every optimizer at 4 bits in the joint fit with one E and alpha, and in resamples.

    Runs are resampled `bootstrap` times within optimizer x bits x N, so that every draw has the design of the study,
    and draws are widened about the estimate by sqrt(runs / (runs - strata)), since each stratum's mean is taken from
    the data. One draw is one row with a column an optimizer: differences of columns carry what they share. An estimate
    at a limit of the search is NaN. Raises ValueError as `fit_shared`, and for an optimizer without runs at 4 bits.
    """
    by, bits = "optimizer", 4
    runs = checked_runs(runs, by)
    if lacking := sorted(set(runs[by]) - set(runs.loc[runs["bits"] == bits, by])):
        raise ValueError(f"no run at {bits} bits of {lacking}")
    problem = build_problem(runs, by, ("E", "alpha"))
    strata = [by, "bits", "N"]
    if (spare := len(runs) - runs.groupby(strata).ngroups) < 1:
        raise ValueError(f"{len(runs)} runs in {len(runs) - spare} strata: nothing is left to resample")
    best, _, draws = _drawn(problem, runs, strata, bootstrap)
    draws = best + np.sqrt(len(runs) / spare) * (draws - best)
    bounded = (best > problem.lower + 1e-6) & (best < problem.upper - 1e-6)
    groups = sorted(set(runs[by]))
    columns = [problem.keys.index(("rho", group, bits)) for group in groups]
    estimate = np.where(bounded, best, np.nan)[columns]
    return pd.Series(estimate, groups), pd.DataFrame(draws[:, columns], columns=groups)


# ----------------------------------------------------------------------------------------------------------- the fit


def _fit(runs: pd.DataFrame, by: str | None, share: Sequence[str], bootstrap: int) -> dict:
    runs = checked_runs(runs, by)
    if bootstrap != int(bootstrap) or bootstrap < 0:
        raise ValueError(f"bootstrap must be a whole number of resamples from 0, not {bootstrap}")
    problem = build_problem(runs, by, share)
    n, p = len(runs), len(problem.keys)
    bootstrap = bootstrap if n > p else 0
    best, objective, draws = _drawn(problem, runs, [by, "bits"] if by else ["bits"], bootstrap)

    reasons = _unidentified(problem, runs, by, best, objective)
    for message in dict.fromkeys(itertools.chain(*reasons.values())):
        warnings.warn(message, IdentificationWarning, stacklevel=3)

    widening = np.sqrt(n / (n - p)) if bootstrap else np.nan
    laws = {}
    for group in sorted(set(runs[by])) if by else [None]:
        own = sorted((key for key in problem.keys if key[1] in (None, group)), key=lambda key: key[2] or 0)
        rows: list[tuple] = []
        for key in own:
            value = _natural(problem, key, best[None], group)[0]
            sample, centre = np.log(_natural(problem, key, draws, group)), np.log(value)
            ends = np.quantile(centre + widening * (sample - centre), TAILS) if bootstrap else (np.nan, np.nan)
            rows.append((key[0], key[2], float(value), *np.exp(ends).tolist(), not reasons[key]))
        rows.insert(len(PARAMETERS), ("rho", FULL_PRECISION, 1.0, 1.0, 1.0, True))
        laws[group] = ScalingLaw(
            parameters={name: value for name, bits, value, *_ in rows if bits is None},
            rho={bits: value for _, bits, value, *_ in rows if bits is not None},
            rows=pd.DataFrame(rows, columns=["parameter", "bits", "value", "low", "high", "identified"]),
            warnings=list(dict.fromkeys(itertools.chain(*(reasons[key] for key in own)))),
            objective=objective,
            n=n,
        )
    return laws


def _drawn(problem: Problem, runs, strata: list[str], times: int) -> tuple[np.ndarray, float, np.ndarray]:
    """The best theta (P,) from all starts, its objective, and theta (times, P) of resampled runs, from the best on."""
    starts = starting_points(problem)
    fits, costs = minimise(problem, starts, np.ones((len(starts), len(runs))))
    best = fits[costs.argmin()]
    weights = resamples(runs.groupby(strata).ngroup().to_numpy(), times)
    return best, float(costs.min()), minimise(problem, np.tile(best, (times, 1)), weights)[0]


def _natural(problem: Problem, key: tuple, theta: np.ndarray, group) -> np.ndarray:
    """The values of a parameter (S,) out of theta (S, P), A no longer relative to the mean N."""
    value = theta[:, problem.keys.index(key)]
    if key[0] == "A":
        column = next(i for i, k in enumerate(problem.keys) if k[0] == "alpha" and k[1] in (None, group))
        value = value + np.exp(theta[:, column]) * problem.centre
    return np.exp(value)


def _unidentified(problem: Problem, runs, by, best, objective) -> dict[tuple, list[str]]:
    """Why each parameter (column of theta) is not identified; an empty list where it is."""
    n, p = len(runs), len(problem.keys)
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
        needed = SIZES_NEEDED if group is None else sum(key[0] in PARAMETERS for key in keys)
        if sizes < needed:
            mark(
                keys,
                f"{sizes} size{'s' * (sizes != 1)}{of_group} cannot determine a curve of three parameters "
                f"(A, alpha, E), nor rho, which is read off it: at least {needed} are needed",
            )
        if "D" in runs and (ratios := part["D"] / part["N"]).max() > 1.2 * ratios.min():
            mark(
                keys,
                f"D/N{of_group} varies from {ratios.min():.3g} to {ratios.max():.3g}, but the law has no term for it",
            )
    for column, key in enumerate(problem.keys):
        n_runs = int((problem.columns["rho"] == column).sum())
        if key[0] == "rho" and n_runs < RUNS_NEEDED:
            mark([key], f"{_label(key)} rests on {n_runs} run{'s' * (n_runs != 1)}: at least {RUNS_NEEDED} are needed")

    judged = [column for column, key in enumerate(problem.keys) if key[0] != "A"]
    frozen = np.repeat(np.eye(p, dtype=bool)[judged], 2, axis=0)  # each at half and at double its value
    theta = best + np.log(2) * frozen * np.tile([-1, 1], len(judged))[:, None]
    costs = minimise(problem, theta, np.ones((len(theta), n)), frozen)[1].reshape(-1, 2)
    noise = max(objective, n * NOISE_FLOOR**2 / 2) / max(1, n - p)
    flat = (costs - objective) / noise < f_distribution.ppf(0.95, 1, max(1, n - p))
    for column, sides in zip(judged, flat, strict=True):
        key, value = problem.keys[column], np.exp(best[column])
        told = f"{_label(key)} = {value:.3g}"
        if not problem.lower[column] + 1e-6 < best[column] < problem.upper[column] - 1e-6:
            mark([key], f"{told} lies at the limit of the search: the runs do not bound it")
        elif sides.any():
            near = " and ".join(f"{end:.3g}" for end in value * np.array([0.5, 2])[sides])
            mark([key], f"the profile of {told} is flat: {near} fits about as well")
    for column, key in enumerate(problem.keys):
        if key[0] == "A":
            exponents = np.unique(problem.columns["alpha"][problem.columns["A"] == column])
            inherited = itertools.chain(*(reasons[problem.keys[e]] for e in exponents))
            reasons[key] = list(dict.fromkeys([*reasons[key], *inherited]))
    return reasons


def _label(key: tuple) -> str:
    name, group, bits = key
    return name + (f" at {bits} bits" if bits is not None else "") + (f" of {group}" if group is not None else "")


def resamples(strata: np.ndarray, times: int) -> np.ndarray:
    """How often each run is drawn, with replacement within its stratum, (times, n)."""
    weights, rng = np.zeros((times, len(strata))), np.random.default_rng(0)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=times)
    return weights
