"""The least-squares problem under a scaling law: runs as arrays, residuals with derivatives, and its minimiser.

`scaling` says what is fitted and what the fit means; here is how: all starts, resamples and profiles as one batch.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import huber

FORMS = {"fixed_ratio": ("A", "alpha", "E"), "full": ("A", "alpha", "E", "B", "beta")}
FULL_PRECISION = 16
LIMITS = {"alpha": (0.01, 5.0), "beta": (0.01, 5.0), "rho": (1e-3, 1e2)}


def checked_runs(runs: pd.DataFrame, form: str, by: str | None) -> pd.DataFrame:
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; valid: {', '.join(FORMS)}")
    numeric = ["N", "bits", "loss"] + ["D"] * (form == "full" or "D" in runs)
    needed = numeric + [by] * (by is not None)
    missing = [name for name in needed if name not in runs]
    if missing:
        raise ValueError(f"runs lacks the columns {missing}; needed: {needed}; there are: {list(runs.columns)}")
    if runs.empty:
        raise ValueError("runs has no rows")
    if "diverged" in runs and runs["diverged"].any():
        raise ValueError(f"diverged runs cannot be fitted, leave out the rows {runs.index[runs['diverged']].tolist()}")
    for name in numeric:
        values = pd.to_numeric(runs[name], errors="coerce").to_numpy(dtype=float)
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise ValueError(
                f"column {name} must be finite and positive, but is {runs[name].iloc[bad[0]]} in row "
                f"{runs.index[bad[0]]} ({len(bad)} such rows); leave diverged runs out"
            )
        if not pd.api.types.is_numeric_dtype(runs[name]):  # numbers as text
            runs = runs.assign(**{name: values})
    if by is not None and runs[by].isna().any():
        raise ValueError(f"column {by} is empty in the rows {runs.index[runs[by].isna()].tolist()}")
    for name, part in [("", runs)] if by is None else runs.groupby(by):
        if not (part["bits"] == FULL_PRECISION).any():
            raise ValueError(
                f"no run {f'of {name} ' if by else ''}has bits {FULL_PRECISION}, which rho is relative to; "
                f"there are: {sorted(set(part['bits']))}"
            )
    return runs


@dataclass
class Problem:
    """Runs and, for every role in the law, which column of theta each run takes it from (n,).

    theta holds logarithms, (S, P) for S problems at once. N and D are relative to their geometric means, so that a
    and alpha are nearly uncorrelated: T1 = exp(a - alpha (log N - mean + log rho)).
    """

    keys: list[tuple]  # of every column: (parameter, group or None, bits or None)
    columns: dict[str, np.ndarray]  # -1 in "rho": rho is 1
    x: np.ndarray  # log N, centred
    y: np.ndarray | None  # log D, centred; None without that term
    centre: dict[str, float]
    log_loss: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    delta: float

    def residuals(self, theta: np.ndarray, jacobian: bool = False):
        """log loss - log prediction (S, n), and its derivatives by theta (S, n, P)."""
        c, rows = self.columns, np.arange(len(self.x))
        alpha = np.exp(theta[:, c["alpha"]])
        log_rho = np.where(c["rho"] >= 0, theta[:, c["rho"]], 0.0)
        log_size = self.x + log_rho
        size_term = np.exp(theta[:, c["A"]] - alpha * log_size)
        floor = np.exp(theta[:, c["E"]])
        prediction = size_term + floor
        if self.y is not None:
            beta = np.exp(theta[:, c["beta"]])
            data_term = np.exp(theta[:, c["B"]] - beta * self.y)
            prediction = prediction + data_term
        r = self.log_loss - np.log(prediction)
        if not jacobian:
            return r
        j = np.zeros((*r.shape, theta.shape[1]))
        share = size_term / prediction
        quantized = np.flatnonzero(c["rho"] >= 0)
        j[:, rows, c["A"]] = -share
        j[:, rows, c["alpha"]] = share * alpha * log_size
        j[:, rows, c["E"]] = -floor / prediction
        j[:, quantized, c["rho"][quantized]] = (share * alpha)[:, quantized]
        if self.y is not None:
            j[:, rows, c["B"]] = -data_term / prediction
            j[:, rows, c["beta"]] = data_term / prediction * beta * self.y
        return r, j

    def cost(self, r: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Weighted Huber loss, (S, n) -> (S,)."""
        return (weights * huber(self.delta, r)).sum(1)


def build_problem(runs: pd.DataFrame, form: str, by: str | None, share: Sequence[str], delta: float) -> Problem:
    unknown = [name for name in share if name not in FORMS[form]]
    if unknown:
        raise ValueError(f"cannot share {unknown} in the form {form!r}; valid: {', '.join(FORMS[form])}")
    groups = runs[by].tolist() if by else [None] * len(runs)
    bits = runs["bits"].tolist()
    roles: dict[str, list[tuple | None]] = {
        name: [(name, None if name in share else g, None) for g in groups] for name in FORMS[form]
    }
    roles["rho"] = [None if b == FULL_PRECISION else ("rho", g, b) for g, b in zip(groups, bits, strict=True)]
    keys = list(dict.fromkeys(key for name in roles for key in roles[name] if key is not None))
    position: dict[tuple | None, int] = {key: column for column, key in enumerate(keys)} | {None: -1}
    log_n = np.log(runs["N"].to_numpy(dtype=float))
    log_d = np.log(runs["D"].to_numpy(dtype=float)) if form == "full" else None
    loss = runs["loss"].to_numpy(dtype=float)
    limits = {"E": (1e-3 * loss.min(), loss.max()), "A": (1e-12, 1e12), "B": (1e-12, 1e12)} | LIMITS
    return Problem(
        keys=keys,
        columns={name: np.array([position[key] for key in roles[name]]) for name in roles},
        x=log_n - log_n.mean(),
        y=None if log_d is None else log_d - log_d.mean(),
        centre={"A": log_n.mean()} | ({} if log_d is None else {"B": log_d.mean()}),
        log_loss=np.log(loss),
        lower=np.log([limits[key[0]][0] for key in keys]),
        upper=np.log([limits[key[0]][1] for key in keys]),
        delta=delta,
    )


def starting_points(problem: Problem) -> np.ndarray:
    """A grid over alpha, the share of the smallest loss that is E, and beta; amplitudes from the data. (S, P)."""
    loss, c = np.exp(problem.log_loss), problem.columns
    terms = 1 if problem.y is None else 2
    axes = (0.1, 0.2, 0.4, 0.7, 1.2), (0.02, 0.3, 0.6, 0.8, 0.95), (0.15, 0.4, 0.9) if terms == 2 else (1.0,)
    starts = []
    for alpha, share, beta in itertools.product(*axes):
        theta = {"alpha": np.log(alpha), "beta": np.log(beta), "rho": 0.0}
        terms_of: dict[str, tuple] = {"A": (alpha, problem.x), "B": (beta, problem.y)}
        start = []
        for column, (name, _, _) in enumerate(problem.keys):
            members = c[name] == column
            floor = share * loss[members].min()
            if name in terms_of:
                slope, where = terms_of[name]
                theta[name] = np.log(np.median((loss - floor)[members] / terms * np.exp(slope * where[members])))
            start.append(np.log(floor) if name == "E" else theta[name])
        starts.append(start)
    return np.array(starts)


def minimise(
    problem: Problem, theta: np.ndarray, weights: np.ndarray, frozen: np.ndarray | None = None, iterations: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt on reweighted least squares, S problems at once. Returns theta (S, P) and costs (S,).

    weights (S, n) multiply the runs; `frozen` (S, P) marks parameters that stay. Reweighting by min(1, delta / |r|)
    gives a quadratic that touches the Huber loss from above, so that each accepted step lowers it.

    `scipy.optimize.least_squares(loss="huber")` finds the same minima (tests/scaling/test_least_squares.py), but one
    problem a call: a law with 200 resamples on 30 runs of five sizes takes it 1.2 s on one core (`full`: 2.1 s), this
    0.1 s. At every verdict on six optimizers that is 7 s against 0.6 s, and in the test that intervals cover the truth,
    80 laws, two minutes against some seconds.
    """
    theta = np.clip(theta, problem.lower, problem.upper)
    frozen = np.zeros(theta.shape, dtype=bool) if frozen is None else frozen
    diagonal = np.arange(theta.shape[1])
    cost = problem.cost(problem.residuals(theta), weights)
    damping, stalled = np.full(len(theta), 1e-2), np.zeros(len(theta), dtype=int)
    for _ in range(iterations):
        active = np.flatnonzero((stalled < 5) & (damping < 1e10))
        if not len(active):
            break
        now, w = theta[active], weights[active]
        r, j = problem.residuals(now, jacobian=True)
        j = np.where(frozen[active][:, None, :], 0.0, j)
        weighted = j * (w * problem.delta / np.maximum(np.abs(r), problem.delta))[..., None]
        gradient = (weighted * r[..., None]).sum(1)
        hessian = np.swapaxes(weighted, 1, 2) @ j
        # the floor keeps a parameter without influence (frozen, or no run drawn) from making the matrix singular
        hessian[:, diagonal, diagonal] += damping[active, None] * hessian[:, diagonal, diagonal] + 1e-12
        step = np.clip(-np.linalg.solve(hessian, gradient[..., None])[..., 0], -2.0, 2.0)
        tried = np.clip(now + step, problem.lower, problem.upper)
        new = problem.cost(problem.residuals(tried), w)
        better = new < cost[active]
        small = ~better | (cost[active] - new < 1e-9 * cost[active] + 1e-30)
        theta[active] = np.where(better[:, None], tried, now)
        cost[active] = np.where(better, new, cost[active])
        stalled[active] = np.where(small, stalled[active] + 1, 0)
        damping[active] *= np.where(better, 0.2, 5.0)
    return theta, cost
