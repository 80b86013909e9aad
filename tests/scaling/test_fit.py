"""Scaling-law fits: synthetic losses of known parameters, scipy's optimizer, closed forms, and honest refusals."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from beyond_outliers.scaling import IdentificationWarning, compare_forms, fit_scaling_law, fit_shared
from beyond_outliers.scaling.fit import resamples
from beyond_outliers.scaling.least_squares import build_problem, starting_points

# tests that are about the warning ask for it with pytest.warns or turn it into an error
pytestmark = pytest.mark.filterwarnings("ignore::beyond_outliers.scaling.IdentificationWarning")

TRUTH = {"A": 400.0, "alpha": 0.34, "E": 1.69}
RHO = {16: 1.0, 8: 0.93, 4: 0.65}
SIZES = np.array([30e6, 60e6, 125e6, 350e6, 800e6])


def loss(N, bits, truth=TRUTH, rho=RHO):
    return truth["A"] / (N * rho[bits]) ** truth["alpha"] + truth["E"]


def synthetic(seed=0, noise=0.002, sizes=SIZES, each=3, bits=(16, 8, 4), **law):
    """The size and noise of published studies: 30M to 800M, 0.2 %; 45 runs."""
    rng = np.random.default_rng(seed)
    rows = [(N, b, loss(N, b, **law) * np.exp(noise * rng.standard_normal()))
            for N in sizes for _ in range(each) for b in bits]  # fmt: skip
    return pd.DataFrame(rows, columns=["N", "bits", "loss"])


def interval(law, name):
    return law.table().set_index("parameter").loc[name, ["low", "high"]]


def known_of(law):
    """A, alpha, E, and the bits of rho -> whether it is identified."""
    return {row.bits if row.parameter == "rho" else row.parameter: row.identified for row in law.table().itertuples()}


# --------------------------------------------------------------------------------------------------------- recovery


def test_noiseless_losses_give_back_every_parameter():
    fit = fit_scaling_law(synthetic(noise=0))
    assert fit.parameters == pytest.approx(TRUTH, rel=1e-3)
    assert fit.rho == pytest.approx(RHO, rel=1e-4) and not fit.warnings
    table = fit.table()
    assert table.parameter.tolist() == [*fit.parameters, "rho", "rho", "rho"] and table.identified.all()
    assert table.bits.tolist()[-3:] == [16, 4, 8] and table.value.tolist()[-3:] == [*fit.rho.values()]
    assert (table.low <= table.value).all() and (table.value <= table.high).all()


@pytest.mark.filterwarnings("error")  # nothing to warn about
@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say():
    """Nominal 95 %; of 40 data sets at least 33 must be covered (38 expected, binomial standard deviation 1.4)."""
    covered = []
    for seed in range(40):
        table = fit_scaling_law(synthetic(seed)).table().query("bits != 16")
        truth = [TRUTH.get(row.parameter, RHO.get(row.bits)) for row in table.itertuples()]
        covered.append((table.low <= truth) & (truth <= table.high))
        four = table[table.bits == 4].iloc[0]
        assert four.value == pytest.approx(0.65, rel=0.06)
        assert four.high - four.low < 0.1  # covering the truth by saying nothing does not count
    assert (np.sum(covered, 0) >= 33).all()


def test_intervals_widen_with_noise():
    def width(noise, **options):
        return np.ptp(interval(fit_scaling_law(synthetic(noise=noise), **options), "alpha"))

    assert width(0.002) < width(0.01) and np.isnan(width(0.002, bootstrap=0))


def test_the_huber_loss_shrugs_off_a_run_that_went_wrong():
    runs = synthetic()
    runs.loc[7, "loss"] *= 1.5
    fit = fit_scaling_law(runs, bootstrap=0)
    assert fit.rho[4] == pytest.approx(0.65, rel=0.05) and fit.parameters["alpha"] == pytest.approx(0.34, rel=0.1)


# ------------------------------------------------------------------------------------- against independent optimizers


def objective(theta, runs, delta=1e-3):
    """Hoffmann's objective, written out anew: Huber of log-sum-exp minus log loss, theta in log scale."""
    a, alpha, e, rho8, rho4 = theta
    log_rho = runs["bits"].map({16: 0.0, 8: rho8, 4: rho4})
    terms = [a - np.exp(alpha) * (np.log(runs["N"]) + log_rho), e + 0 * runs["N"]]
    r = (np.logaddexp.reduce(terms, axis=0) - np.log(runs["loss"])).abs()
    return np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).sum()


def test_no_other_optimizer_finds_a_better_fit():
    runs = synthetic(4)
    fit = fit_scaling_law(runs, bootstrap=0)
    ours, truth = (np.log([*p.values(), rho[8], rho[4]]) for p, rho in ((fit.parameters, fit.rho), (TRUTH, RHO)))
    assert objective(ours, runs) == pytest.approx(fit.objective, rel=1e-6)
    options = {"maxiter": 4000, "maxfev": 4000, "fatol": 1e-14}
    for start in (ours, truth):
        found = minimize(objective, start, (runs,), "Nelder-Mead", options=options)
        assert fit.objective <= found.fun * (1 + 1e-3)


def test_the_jacobian_is_the_derivative_of_the_residuals():
    runs = synthetic().assign(optimizer=["muon", "adamw", "soap"] * 15)
    problem = build_problem(runs.sort_values("bits"), "optimizer", ("E",))
    theta = starting_points(problem)[[17]] + np.random.default_rng(0).normal(0, 0.1, len(problem.keys))
    _, jacobian = problem.residuals(theta, jacobian=True)
    step = 1e-6 * np.eye(theta.shape[1])
    numeric = (problem.residuals(theta + step) - problem.residuals(theta - step)).T / 2e-6
    np.testing.assert_allclose(jacobian[0], numeric, atol=1e-7)
    assert (np.abs(jacobian[0]).max(0) > 1e-3).all()


def test_runs_are_resampled_within_their_stratum():
    weights = resamples(np.repeat([16, 4], [30, 15]), 20)
    assert (weights[:, :30].sum(1) == 30).all() and (weights[:, 30:].sum(1) == 15).all() and weights.std() > 0.5


def test_predict_follows_the_formula_and_the_definition_of_rho():
    runs = synthetic(2)
    fit = fit_scaling_law(runs, bootstrap=0)
    expected = loss(1e8, 4, fit.parameters, fit.rho)
    assert fit.predict(1e8, 4) == pytest.approx(expected, rel=1e-12)
    # a 4-bit model of N parameters is worth a full-precision one of rho N
    assert fit.predict(1e8 * fit.rho[4]) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(fit.predict(runs["N"], runs["bits"]), runs["loss"], rtol=0.01)
    with pytest.raises(ValueError, match=r"no rho was fitted for bits \[3\]; fitted: \[4, 8, 16\]"):
        fit.predict(1e8, 3)


# ---------------------------------------------------------------------------------------------- what cannot be known


def narrow():
    runs = synthetic(3, 0.01, [100e6, 120e6, 140e6], 1, (16, 4))
    return pd.concat([runs, runs.assign(loss=runs["loss"] * 1.001)])


def flat():
    return synthetic().assign(loss=3 * np.exp(0.002 * np.random.default_rng(0).standard_normal(45)))


def one_run_at_8_bits():
    runs = synthetic(bits=(16, 4))
    runs.loc[len(runs)] = {"N": 60e6, "bits": 8, "loss": loss(60e6, 8)}
    return runs


@pytest.mark.parametrize(("runs", "message", "unknown", "known"), [
    (synthetic(sizes=SIZES[:2]), "2 sizes cannot determine a curve of three parameters",
     ["A", "alpha", "E", 4, 8], []),
    (narrow(), "E = .* (is flat|lies at the limit of the search)", ["E"], []),
    (flat(), "alpha", ["alpha", 4], []),  # losses that do not fall with size identify no exponent
    (synthetic().assign(D=lambda runs: runs.N * np.resize([25, 100], 45)), r"D/N varies from 25 to 100",
     ["A", "alpha", "E"], []),
    (synthetic(sizes=SIZES[:3], each=1, bits=(16,)), "3 runs cannot determine 3 parameters", ["A", "alpha", "E"], []),
    (one_run_at_8_bits(), r"rho at 8 bits rests on 1 run: at least 3 are needed",
     [8], ["A", "alpha", "E", 16, 4]),
])  # fmt: skip
def test_what_the_runs_leave_open_is_said(runs, message, unknown, known):
    with pytest.warns(IdentificationWarning, match=message):
        fit = fit_scaling_law(runs)
    identified = known_of(fit)
    assert fit.warnings and not any(identified[name] for name in unknown) and all(identified[name] for name in known)


# ---------------------------------------------------------------------------------------------------------- bad input


WITH_D = synthetic().assign(D=lambda runs: 20 * runs.N)


def with_value(column, value):
    runs = WITH_D.astype({"bits": float})
    runs.loc[7, column] = value
    return runs


@pytest.mark.parametrize(("runs", "message"), [
    (synthetic().drop(columns="bits"), r"lacks the columns \['bits'\]; needed: \['N', 'bits', 'loss'\]"),
    (synthetic().iloc[:0], "no rows"),
    (synthetic().assign(N=-1), r"N must be finite and positive, but is -1 in row 0 \(45 such rows\)"),
    (synthetic(bits=(8, 4)), r"has bits 16, which rho is relative to; there are: \[4, 8\]"),
    *((with_value(column, value), rf"{column} must be finite and positive, but is {value} in row 7 \(1 such rows\)")
      for column in ("N", "D", "loss", "bits") for value in (float("nan"), float("inf"), 0.0, -3.0)),
])  # fmt: skip
def test_bad_runs_are_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        fit_scaling_law(runs)


def test_numbers_as_text_are_numbers():
    runs = synthetic(noise=0)
    assert fit_scaling_law(runs.astype(str), bootstrap=0).parameters == fit_scaling_law(runs, bootstrap=0).parameters


MUON = synthetic().assign(optimizer="muon")


@pytest.mark.parametrize(("call", "message"), [
    (lambda: fit_scaling_law(MUON, bootstrap=-1), "whole number of resamples from 0, not -1"),
    (lambda: fit_scaling_law(MUON, bootstrap=2.5), "whole number of resamples from 0, not 2.5"),
    (lambda: fit_shared(MUON, share=("rho",)), r"cannot share \['rho'\].*valid: A, alpha, E"),
    (lambda: fit_shared(MUON, by="scheme"), r"lacks the columns \['scheme'\]"),
    (lambda: fit_shared(MUON.assign(optimizer=None)), "column optimizer is empty in the rows"),
    (lambda: compare_forms(MUON[MUON["N"] == 30e6]), "no larger size to predict"),
    (lambda: compare_forms(MUON[(MUON["bits"] == 16) | (MUON["N"] == 800e6)]),
     r"no run below the largest size N = 8e\+08 for \(optimizer, bits\)"),
])  # fmt: skip
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -------------------------------------------------------------------------------------------------- several optimizers

OPTIMIZERS = {
    "adamw": ({"A": 400.0, "alpha": 0.34, "E": 1.69}, {16: 1.0, 4: 0.65}),
    "muon": ({"A": 420.0, "alpha": 0.345, "E": 1.69}, {16: 1.0, 4: 0.55}),
    "shampoo": ({"A": 390.0, "alpha": 0.335, "E": 1.69}, {16: 1.0, 4: 0.8}),
}


def many(each=3):
    parts = [
        synthetic(seed, each=each, bits=(16, 4), truth=truth, rho=rho).assign(optimizer=name)
        for seed, (name, (truth, rho)) in enumerate(OPTIMIZERS.items())
    ]
    return pd.concat(parts, ignore_index=True)


def test_what_is_shared_is_one_number_and_sharpens_the_rest():
    runs = many(each=2)
    shared, alone = fit_shared(runs), fit_shared(runs, share=())
    for laws, count in ((shared, 1), (alone, 3)):
        assert len({law.parameters["E"] for law in laws.values()}) == count
    for name, (truth, rho) in OPTIMIZERS.items():
        low, high = interval(shared[name], "E")
        assert low <= truth["E"] <= high and high - low < np.ptp(interval(alone[name], "E"))
        assert shared[name].rho[4] == pytest.approx(rho[4], rel=0.08)
    assert shared["muon"].objective >= alone["muon"].objective  # fewer parameters never fit better
    singles = {name: fit_scaling_law(part, bootstrap=0) for name, part in runs.groupby("optimizer")}
    for name, single in singles.items():  # sharing nothing is fitting one by one
        assert alone[name].parameters == pytest.approx(single.parameters, rel=1e-2)
        assert alone[name].rho == pytest.approx(single.rho, rel=1e-3)
    assert alone["muon"].objective == pytest.approx(sum(s.objective for s in singles.values()), rel=1e-6)


def test_an_optimizer_with_two_sizes_is_open_by_itself_and_leans_on_the_others_where_parameters_are_shared():
    runs = many()
    runs = runs[(runs["optimizer"] != "muon") | (runs["N"] > 200e6)]
    with pytest.warns(IdentificationWarning, match="2 sizes of muon cannot determine"):
        alone = fit_shared(runs, share=())
    muon = known_of(alone["muon"])
    assert not muon["alpha"] and not muon[4] and known_of(alone["adamw"])["alpha"] and not alone["adamw"].warnings
    joint = fit_shared(runs, share=("E", "alpha"))
    assert not any(law.warnings for law in joint.values()) and joint["muon"].rho[4] == pytest.approx(0.55, rel=0.1)


def test_compare_forms_ranks_by_the_error_on_the_largest_size():
    runs = many()
    table = compare_forms(runs, ((), ("E",), ("E", "alpha")))
    assert table["heldout_error"].is_monotonic_increasing
    assert table.set_index("share")["n_parameters"].to_dict() == {"nothing": 12, "E": 10, "E, alpha": 8}
    assert (table["n_heldout"] == 18).all() and (table["n_fit"] == 72).all()
    laws = fit_shared(runs[runs["N"] < 800e6], bootstrap=0)  # the entry of one variant, by hand
    errors = [np.log(r.loss / laws[r.optimizer].predict(r.N, r.bits)) for r in runs.query("N == 8e8").itertuples()]
    row = table.set_index("share").loc["E"]
    assert [row.heldout_error, row.heldout_bias] == pytest.approx([np.abs(errors).mean(), np.mean(errors)])
    assert row.heldout_error < 0.01
