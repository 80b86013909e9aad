"""The batched minimiser against `scipy.optimize.least_squares(loss="huber")`, problem by problem, start by start."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from beyond_outliers.scaling.least_squares import DELTA, build_problem, minimise, starting_points


@pytest.fixture(scope="module")
def problem():
    """Noisy losses of five sizes in two precisions, one of them far off, so that Huber's linear part matters."""
    rng, rows = np.random.default_rng(0), []
    for size in (0.08e6, 0.16e6, 0.26e6, 0.52e6, 1.05e6):
        for bits, rho in ((16, 1.0), (4, 0.7)):
            for _ in range(3):
                loss = 60 / (size * rho) ** 0.4 + 2.2
                rows.append((size, bits, loss * np.exp(0.004 * rng.standard_normal())))
    runs = pd.DataFrame(rows, columns=["N", "bits", "loss"])
    runs.loc[7, "loss"] *= 1.2
    return build_problem(runs, None, ())


def by_scipy(problem, start, weights, frozen):
    """One problem: a run drawn twice stands twice, a frozen parameter is no variable. theta (P,) and the cost."""
    runs, free = np.repeat(np.arange(len(weights)), weights.astype(int)), np.flatnonzero(~frozen)

    def theta(x):
        whole = start.copy()
        whole[free] = x
        return whole

    found = least_squares(
        lambda x: problem.residuals(theta(x)[None])[0][runs],
        np.clip(start[free], problem.lower[free] + 1e-9, problem.upper[free] - 1e-9),
        lambda x: problem.residuals(theta(x)[None], jacobian=True)[1][0][runs][:, free],
        bounds=(problem.lower[free], problem.upper[free]),
        loss="huber",
        f_scale=DELTA,
        x_scale="jac",
        ftol=1e-11,
        xtol=1e-11,
        max_nfev=1000,
    )
    return theta(found.x), found.cost


def test_every_resample_is_fitted_as_scipy_fits_it(problem):
    n = len(problem.log_loss)
    rng = np.random.default_rng(1)
    weights = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=5)]).astype(float)
    start = starting_points(problem)[12]
    best = minimise(problem, np.tile(start, (6, 1)), weights)
    free = np.zeros(len(start), dtype=bool)
    for theta, cost, own in zip(*best, weights, strict=True):
        expected, lowest = by_scipy(problem, theta, own, free)
        assert cost == pytest.approx(lowest, rel=1e-6)
        assert theta == pytest.approx(expected, abs=0.02)  # logarithms; the valley of A, alpha and E is flat
        cold = by_scipy(problem, start, own, free)[1]
        assert cost <= cold * (1 + 1e-6)


def test_a_profile_is_fitted_as_scipy_fits_it(problem):
    start = starting_points(problem)[12]
    frozen = np.array([key[0] == "rho" for key in problem.keys])
    start[frozen] = np.log(0.5)
    ones = np.ones((1, len(problem.log_loss)))
    (theta,), (cost,) = minimise(problem, start[None], ones, frozen[None])
    expected, lowest = by_scipy(problem, theta, ones[0], frozen)
    assert cost == pytest.approx(lowest, rel=1e-6) and (theta[frozen] == np.log(0.5)).all()
    assert theta == pytest.approx(expected, abs=0.02)
    assert cost <= by_scipy(problem, start, ones[0], frozen)[1] * (1 + 1e-6)
