"""Resampled runs, and what a fit says of each draw: for differences between groups that share parameters."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from beyond_outliers.scaling.least_squares import build_problem, checked_runs, minimise, starting_points


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
    starts = starting_points(problem)
    fits, costs = minimise(problem, starts, np.ones((len(starts), len(runs))))
    best = fits[np.argmin(costs)]
    strata = runs.groupby([by, "bits", "N"]).ngroup().to_numpy()
    if (spare := len(runs) - strata.max() - 1) < 1:
        raise ValueError(f"{len(runs)} runs in {strata.max() + 1} strata: nothing is left to resample")
    weights = resamples(strata, bootstrap, np.random.default_rng(seed))
    draws = minimise(problem, np.tile(best, (bootstrap, 1)), weights)[0]
    draws = best + np.sqrt(len(runs) / spare) * (draws - best)
    bounded = (best > problem.lower + 1e-6) & (best < problem.upper - 1e-6)
    groups = sorted(set(runs[by]))
    columns = [problem.keys.index(("rho", group, bits)) for group in groups]
    estimate = np.where(bounded, best, np.nan)[columns]
    return pd.Series(estimate, groups), pd.DataFrame(draws[:, columns], columns=groups)


def resamples(strata: np.ndarray, times: int, rng: np.random.Generator) -> np.ndarray:
    """How often each run is drawn, with replacement within its stratum, (times, n)."""
    weights = np.zeros((times, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=times)
    return weights
