"""Scaling-law fits: synthetic losses of known parameters, scipy's optimizer, closed forms, and honest refusals."""

import time
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from beyond_outliers.scaling import IdentificationWarning, compare_forms, fit_scaling_law, fit_shared
from beyond_outliers.scaling import fit as scaling
from beyond_outliers.scaling.fit import resamples
from beyond_outliers.scaling.least_squares import build_problem, starting_points

# tests that are about the warning ask for it with pytest.warns or turn it into an error
pytestmark = pytest.mark.filterwarnings("ignore::beyond_outliers.scaling.IdentificationWarning")

TRUTH = {"A": 400.0, "alpha": 0.34, "E": 1.69, "B": 410.0, "beta": 0.28}
RHO = {16: 1.0, 8: 0.93, 4: 0.65}
SIZES = np.array([30e6, 60e6, 125e6, 350e6, 800e6])


def loss(form, N, D, bits, truth=TRUTH, rho=RHO):
    terms = truth["A"] / (N * rho[bits]) ** truth["alpha"] + truth["E"]
    return terms + (truth["B"] / D ** truth["beta"] if form == "full" else 0)


def synthetic(form, seed=0, noise=0.002, sizes=SIZES, ratios=(25, 50, 100), bits=(16, 8, 4), truth=TRUTH, rho=RHO):
    """The size and noise of published studies: 30M to 800M, 25 to 100 tokens per parameter, 0.2 %; 45 runs."""
    rng = np.random.default_rng(seed)
    grid = [(N, N * ratio, b) for N in sizes for ratio in ratios for b in bits]
    rows = [(N, D, b, loss(form, N, D, b, truth, rho) * np.exp(noise * rng.standard_normal())) for N, D, b in grid]
    runs = pd.DataFrame(rows, columns=["N", "D", "bits", "loss"])
    return runs if form == "full" else runs.drop(columns="D")


def quiet(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdentificationWarning)
        return function(*args, **options)


# --------------------------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize("form", ["fixed_ratio", "full"])
def test_noiseless_losses_give_back_every_parameter(form):
    fit = fit_scaling_law(synthetic(form, noise=0), form)
    for name, value in fit.parameters.items():
        assert value == pytest.approx(TRUTH[name], rel=1e-3), name
    assert fit.rho == pytest.approx(RHO, rel=1e-4)
    assert not fit.warnings and all(fit.identified["rho"].values())
    assert set(fit.parameters) == set(fit.identified) - {"rho"} == set(fit.intervals) - {"rho"}


@pytest.mark.filterwarnings("error")  # nothing to warn about
@pytest.mark.slow
@pytest.mark.parametrize("form", ["fixed_ratio", "full"])
def test_intervals_cover_the_truth_as_often_as_they_say(form):
    """Nominal 95 %; of 40 data sets at least 33 must be covered (38 expected, binomial standard deviation 1.4)."""
    covered = []
    for seed in range(40):
        fit = fit_scaling_law(synthetic(form, seed=seed), form)
        row = {name: fit.intervals[name][0] <= TRUTH[name] <= fit.intervals[name][1] for name in fit.parameters}
        row |= {b: fit.intervals["rho"][b][0] <= RHO[b] <= fit.intervals["rho"][b][1] for b in (4, 8)}
        covered.append(row)
        assert fit.rho[4] == pytest.approx(0.65, rel=0.06) and fit.intervals["rho"][16] == (1, 1)
        low, high = fit.intervals["rho"][4]
        assert high - low < 0.1  # covering the truth by saying nothing does not count
    assert (pd.DataFrame(covered).sum() >= 33).all()


def test_intervals_widen_with_confidence_and_noise():
    def width(noise, **options):
        low, high = quiet(fit_scaling_law, synthetic("fixed_ratio", noise=noise), **options).intervals["alpha"]
        return high - low

    assert width(0.002, confidence=0.5) < width(0.002) < width(0.01)
    assert width(0.002, seed=1) == pytest.approx(width(0.002), rel=0.4)
    assert np.isnan(width(0.002, bootstrap=0))


def test_the_huber_loss_shrugs_off_a_run_that_went_wrong():
    runs = synthetic("fixed_ratio")
    runs.loc[7, "loss"] *= 1.5
    fit = quiet(fit_scaling_law, runs, bootstrap=0)
    assert fit.rho[4] == pytest.approx(0.65, rel=0.05) and fit.parameters["alpha"] == pytest.approx(0.34, rel=0.1)


# ------------------------------------------------------------------------------------- against independent optimizers


def objective(theta, runs, form, delta):
    """Hoffmann's objective, written out anew: Huber of log-sum-exp minus log loss, theta in log scale."""
    a, alpha, e, b, beta, rho8, rho4 = theta
    log_rho = runs["bits"].map({16: 0.0, 8: rho8, 4: rho4})
    terms = [a - np.exp(alpha) * (np.log(runs["N"]) + log_rho), e + 0 * runs["N"]]
    if form == "full":
        terms.append(b - np.exp(beta) * np.log(runs["D"]))
    r = (np.logaddexp.reduce(terms, axis=0) - np.log(runs["loss"])).abs()
    return np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).sum()


@pytest.mark.parametrize("form", ["fixed_ratio", "full"])
def test_no_other_optimizer_finds_a_better_fit(form):
    runs = synthetic(form, seed=4)
    fit = fit_scaling_law(runs, form, bootstrap=0)
    p = fit.parameters | {"B": fit.parameters.get("B", 1), "beta": fit.parameters.get("beta", 1)}
    names = ("A", "alpha", "E", "B", "beta")
    ours = np.log([*(p[name] for name in names), fit.rho[8], fit.rho[4]])
    assert objective(ours, runs, form, 1e-3) == pytest.approx(fit.objective, rel=1e-6)
    truth = np.log([*(TRUTH[name] for name in names), RHO[8], RHO[4]])
    for start in (ours, truth):
        found = minimize(
            objective,
            start,
            (runs, form, 1e-3),
            "Nelder-Mead",
            options={"maxiter": 4000, "maxfev": 4000, "fatol": 1e-14},
        )
        assert fit.objective <= found.fun * (1 + 1e-3)


def test_the_jacobian_is_the_derivative_of_the_residuals():
    runs = synthetic("full").assign(optimizer=["muon", "adamw", "soap"] * 15)
    problem = build_problem(runs, "full", "optimizer", ("E",), 1e-3)
    theta = starting_points(problem)[[17]] + np.random.default_rng(0).normal(0, 0.1, len(problem.keys))
    _, jacobian = problem.residuals(theta, jacobian=True)
    step = 1e-6 * np.eye(theta.shape[1])
    numeric = (problem.residuals(theta + step) - problem.residuals(theta - step)).T / 2e-6
    np.testing.assert_allclose(jacobian[0], numeric, atol=1e-7)
    assert (np.abs(jacobian[0]).max(0) > 1e-3).all()


def test_bootstrap_refits_reach_the_optimum_of_their_resample():
    runs = synthetic("full", seed=1)
    problem = build_problem(runs, "full", None, (), 1e-3)
    starts = starting_points(problem)
    fits, costs = scaling.minimise(problem, starts, np.ones((len(starts), len(runs))))
    weights = resamples(runs["bits"].to_numpy(), 20, np.random.default_rng(0))
    assert (weights.sum(1) == len(runs)).all() and (weights[:, runs["bits"] == 4].sum(1) == 15).all()
    warm = scaling.minimise(problem, np.tile(fits[costs.argmin()], (20, 1)), weights)[1]
    cold = np.min([scaling.minimise(problem, np.tile(s, (20, 1)), weights)[1] for s in starts[::15]], axis=0)
    np.testing.assert_allclose(warm, cold, rtol=1e-5)


def test_two_points_of_a_known_power_law_by_hand():
    """rho in closed form: with E and alpha known, (L4 - E) / (L16 - E) = rho^-alpha at every size."""
    runs = synthetic("fixed_ratio", noise=0, bits=(16, 4))
    fit = fit_scaling_law(runs, bootstrap=0)
    pivot = runs.drop_duplicates(["N", "bits"]).pivot(index="N", columns="bits", values="loss") - TRUTH["E"]
    by_hand = (pivot[4] / pivot[16]) ** (-1 / TRUTH["alpha"])
    assert fit.rho[4] == pytest.approx(by_hand.mean(), rel=1e-4)


def test_predict_follows_the_formula_and_the_definition_of_rho():
    runs = synthetic("full", seed=2)
    fit = fit_scaling_law(runs, "full", bootstrap=0)
    p = fit.parameters
    expected = p["A"] / (1e8 * fit.rho[4]) ** p["alpha"] + p["B"] / 2e9 ** p["beta"] + p["E"]
    assert fit.predict(1e8, 2e9, 4) == pytest.approx(expected, rel=1e-12)
    # a 4-bit model of N parameters is worth a full-precision one of rho N
    assert fit.predict(1e8, 2e9, 4) == pytest.approx(fit.predict(1e8 * fit.rho[4], 2e9), rel=1e-12)
    np.testing.assert_allclose(fit.predict(runs["N"], runs["D"], runs["bits"]), runs["loss"], rtol=0.01)
    with pytest.raises(ValueError, match=r"no rho was fitted for bits \[3\]; fitted: \[4, 8, 16\]"):
        fit.predict(1e8, 2e9, 3)
    with pytest.raises(ValueError, match="needs D"):
        fit.predict(1e8)


def test_table_has_one_row_a_parameter():
    fit = fit_scaling_law(synthetic("fixed_ratio"))
    table = fit.table()
    assert table["parameter"].tolist() == ["A", "alpha", "E", "rho", "rho", "rho"]
    assert table["bits"].tolist()[3:] == [16, 4, 8]
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


# ---------------------------------------------------------------------------------------------- what cannot be known


def test_two_sizes_are_not_enough_and_it_says_so():
    with pytest.warns(IdentificationWarning, match="2 sizes cannot determine a curve of three parameters"):
        fit = fit_scaling_law(synthetic("fixed_ratio", sizes=SIZES[:2]))
    assert not any(fit.identified[name] for name in ("A", "alpha", "E")) and not fit.identified["rho"][4]
    assert fit.warnings and not fit.table().query("bits != 16")["identified"].any()


def test_a_narrow_noisy_range_has_a_flat_profile():
    runs = synthetic("fixed_ratio", sizes=[100e6, 120e6, 140e6], noise=0.01, ratios=(20,), bits=(16, 4), seed=3)
    runs = pd.concat([runs, runs.assign(loss=runs["loss"] * 1.001)])
    with pytest.warns(IdentificationWarning, match="E = .* (is flat|lies at the limit of the search)"):
        fit = fit_scaling_law(runs)
    assert not fit.identified["E"]


def test_losses_that_do_not_fall_with_size_identify_no_exponent():
    runs = synthetic("fixed_ratio")
    runs["loss"] = 3 * np.exp(0.002 * np.random.default_rng(0).standard_normal(len(runs)))
    with pytest.warns(IdentificationWarning, match="alpha"):
        fit = fit_scaling_law(runs)
    assert not fit.identified["alpha"] and not fit.identified["rho"][4]


def test_one_ratio_cannot_tell_the_two_terms_of_the_full_form_apart():
    with pytest.warns(IdentificationWarning, match=r"all runs have the same D/N \(20\)"):
        fit = fit_scaling_law(synthetic("full", ratios=(20,)), "full")
    assert not any(fit.identified[name] for name in ("A", "alpha", "B", "beta", "E"))


def test_the_fixed_ratio_form_notices_that_the_ratio_varies():
    with pytest.warns(IdentificationWarning, match=r"D/N varies from 25 to 100"):
        fit_scaling_law(synthetic("full"), "fixed_ratio", bootstrap=0)


def test_as_many_parameters_as_runs_are_open():
    runs = synthetic("fixed_ratio", ratios=(20,), bits=(16,), sizes=SIZES[:3])
    with pytest.warns(IdentificationWarning, match="3 runs cannot determine 3 parameters"):
        fit = fit_scaling_law(runs)
    assert not any(fit.identified[name] for name in ("A", "alpha", "E"))


def test_a_rho_from_one_run_is_open_but_the_rest_is_not():
    runs = synthetic("fixed_ratio", bits=(16, 4))
    runs.loc[len(runs)] = {"N": 60e6, "bits": 8, "loss": loss("fixed_ratio", 60e6, None, 8)}
    with pytest.warns(IdentificationWarning, match=r"rho at 8 bits rests on 1 run: at least 3 are needed"):
        fit = fit_scaling_law(runs)
    assert fit.identified == {"A": True, "alpha": True, "E": True, "rho": {16: True, 4: True, 8: False}}


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.drop(columns="bits"), r"lacks the columns \['bits'\]; needed: \['N', 'bits', 'loss'\]"),
        (lambda r: r.iloc[:0], "no rows"),
        (
            lambda r: r.assign(loss=r["loss"].where(r.index != 3)),
            "loss must be finite and positive, but is nan in row 3",
        ),
        (lambda r: r.assign(loss=r["loss"].mask(r.index == 5, np.inf)), "but is inf in row 5"),
        (lambda r: r.assign(N=-r["N"]), r"N must be finite and positive.*\(45 such rows\)"),
        (lambda r: r.assign(diverged=r.index == 2), r"diverged runs cannot be fitted, leave out the rows \[2\]"),
        (lambda r: r[r["bits"] != 16], r"has bits 16, which rho is relative to; there are: \[4, 8\]"),
    ],
)
def test_bad_runs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fit_scaling_law(change(synthetic("fixed_ratio")))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -3.0])
@pytest.mark.parametrize("column", ["N", "D", "loss", "bits"])
def test_one_row_of_a_value_that_is_none_is_named(column, value):
    runs = synthetic("full").astype({"bits": float})
    runs.loc[7, column] = value
    with pytest.raises(ValueError, match=rf"column {column} must be finite and positive, but is {value} in row 7 \(1"):
        fit_scaling_law(runs, "full")


def test_numbers_as_text_are_numbers():
    runs = synthetic("fixed_ratio", noise=0)
    assert fit_scaling_law(runs.astype(str), bootstrap=0).parameters == fit_scaling_law(runs, bootstrap=0).parameters


def test_bad_arguments_are_refused():
    runs = synthetic("fixed_ratio").assign(optimizer="muon")
    with pytest.raises(ValueError, match="unknown form 'chinchilla'; valid: fixed_ratio, full"):
        fit_scaling_law(runs, "chinchilla")
    with pytest.raises(ValueError, match=r"lacks the columns \['D'\]"):
        fit_scaling_law(runs, "full")
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, not 95"):
        fit_scaling_law(runs, confidence=95)
    for delta in (float("nan"), 0.0, -1e-3, float("inf")):
        with pytest.raises(ValueError, match=f"delta must be positive and finite, not {delta}"):
            fit_scaling_law(runs, delta=delta)
    for bootstrap in (-1, 2.5):
        with pytest.raises(ValueError, match=f"whole number of resamples from 0, not {bootstrap}"):
            fit_scaling_law(runs, bootstrap=bootstrap)
    with pytest.raises(ValueError, match=r"cannot share \['rho'\].*valid: A, alpha, E"):
        fit_shared(runs, share=("rho",))
    with pytest.raises(ValueError, match=r"lacks the columns \['scheme'\]"):
        fit_shared(runs, by="scheme")
    with pytest.raises(ValueError, match="no larger size to predict"):
        compare_forms(runs[runs["N"] == 30e6])
    with pytest.raises(ValueError, match=r"no run below the largest size N = 8e\+08 for \(optimizer, bits\)"):
        compare_forms(runs[(runs["bits"] == 16) | (runs["N"] == 800e6)])


# -------------------------------------------------------------------------------------------------- several optimizers

OPTIMIZERS = {
    "adamw": ({"A": 400.0, "alpha": 0.34, "E": 1.69}, {16: 1.0, 4: 0.65}),
    "muon": ({"A": 420.0, "alpha": 0.345, "E": 1.69}, {16: 1.0, 4: 0.55}),
    "shampoo": ({"A": 390.0, "alpha": 0.335, "E": 1.69}, {16: 1.0, 4: 0.8}),
}


def many(noise=0.002, seed=0, ratios=(20, 20)):
    parts = [
        synthetic("fixed_ratio", seed + i, noise, ratios=ratios, bits=(16, 4), truth=truth, rho=rho).assign(
            optimizer=name
        )
        for i, (name, (truth, rho)) in enumerate(OPTIMIZERS.items())
    ]
    return pd.concat(parts, ignore_index=True)


def test_a_shared_floor_is_one_number_and_sharpens_the_rest():
    runs = many()
    shared, alone = quiet(fit_shared, runs), quiet(fit_shared, runs, share=())
    assert len({law.parameters["E"] for law in shared.values()}) == 1
    assert len({law.parameters["E"] for law in alone.values()}) == 3
    for name, (truth, rho) in OPTIMIZERS.items():
        low, high = shared[name].intervals["E"]
        assert low <= truth["E"] <= high
        assert shared[name].rho[4] == pytest.approx(rho[4], rel=0.08)
        assert high - low < np.subtract(*alone[name].intervals["E"][::-1])
    assert shared["shampoo"].rho[4] > shared["adamw"].rho[4] > shared["muon"].rho[4]
    assert shared["muon"].objective >= alone["muon"].objective  # fewer parameters never fit better


def test_sharing_nothing_is_fitting_one_by_one():
    runs = many()
    joint = quiet(fit_shared, runs, share=(), bootstrap=0)
    singles = {name: quiet(fit_scaling_law, part, bootstrap=0) for name, part in runs.groupby("optimizer")}
    for name, single in singles.items():
        assert joint[name].parameters == pytest.approx(single.parameters, rel=1e-2)
        assert joint[name].rho == pytest.approx(single.rho, rel=1e-3)
    assert joint["muon"].objective == pytest.approx(sum(s.objective for s in singles.values()), rel=1e-6)


def test_an_optimizer_with_two_sizes_is_open_by_itself_and_leans_on_the_others_where_parameters_are_shared():
    runs = many(ratios=(20, 20, 20))
    runs = runs[(runs["optimizer"] != "muon") | (runs["N"] > 200e6)]
    with pytest.warns(IdentificationWarning, match="2 sizes of muon cannot determine"):
        alone = fit_shared(runs, share=())
    assert not alone["muon"].identified["alpha"] and not alone["muon"].identified["rho"][4]
    assert alone["adamw"].identified["alpha"] and not alone["adamw"].warnings
    together = quiet(fit_shared, runs, share=("E", "alpha"))
    assert not any(law.warnings for law in together.values())
    assert together["muon"].rho[4] == pytest.approx(0.55, rel=0.1)


def test_compare_forms_ranks_by_the_error_on_the_largest_size():
    runs = many(ratios=(20, 20, 20))
    table = compare_forms(runs, shares=((), ("E",), ("E", "alpha")))
    assert table["heldout_error"].is_monotonic_increasing
    assert table.set_index("share")["n_parameters"].to_dict() == {"nothing": 12, "E": 10, "E, alpha": 8}
    assert (table["n_heldout"] == 18).all() and (table["n_fit"] == 72).all()
    # the entry of one variant, by hand
    rest, heldout = runs[runs["N"] < 800e6], runs[runs["N"] == 800e6]
    laws = quiet(fit_shared, rest, share=("E",), bootstrap=0)
    errors = [np.log(r.loss / laws[r.optimizer].predict(r.N, bits=r.bits)) for r in heldout.itertuples()]
    row = table.set_index("share").loc["E"]
    assert row["heldout_error"] == pytest.approx(np.abs(errors).mean())
    assert row["heldout_bias"] == pytest.approx(np.mean(errors))
    assert row["heldout_error"] < 0.01


def test_compare_forms_finds_out_that_floors_differ():
    """Optimizers with clearly different floors: sharing E must predict worse than not sharing it."""
    floors = {"adamw": 1.4, "muon": 1.7, "shampoo": 2.0}
    parts = [
        synthetic("fixed_ratio", i, 5e-4, ratios=(20,) * 3, bits=(16, 4), truth=TRUTH | {"E": e}).assign(optimizer=name)
        for i, (name, e) in enumerate(floors.items())
    ]
    table = compare_forms(pd.concat(parts, ignore_index=True), shares=((), ("E",)))
    assert table["share"].tolist() == ["nothing", "E"]
    assert table["heldout_error"].iloc[1] > 3 * table["heldout_error"].iloc[0]


def test_a_fit_with_intervals_takes_a_few_seconds_at_most():
    start = time.process_time()
    fit_scaling_law(synthetic("full"), "full", bootstrap=200)
    assert time.process_time() - start < 5
