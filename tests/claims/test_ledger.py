"""Predictors and claims on tables whose answer is known."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from beyond_outliers import paths
from beyond_outliers.claims import Estimate, correlations, mean, read_verdicts, rules, share, verdict, verdicts
from beyond_outliers.claims import ledger as claims
from beyond_outliers.study import TABLES, Study

OPTIMIZERS = ["adamw", "muon", "psgd", "scion", "shampoo", "soap"]


def test_an_interval_does_not_depend_on_what_else_is_asked_for():
    """A page shows one correlation in its finding and again in the table of all candidates: the same interval."""
    rng = np.random.default_rng(3)
    table = pd.DataFrame(rng.normal(size=(12, 3)), columns=["x", "z", "y"])
    alone = correlations(table, candidates=("z",), targets=("y",)).iloc[0]
    among = correlations(table, candidates=("x", "z"), targets=("x", "y")).set_index(["target", "candidate"])
    assert among.loc[("y", "z")].tolist() == alone.drop(["target", "candidate"]).tolist()


def test_correlations_agree_with_scipy():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": rng.normal(size=30), "size": "s"})
    table["y"] = table.x + rng.normal(size=30)
    row = correlations(table, candidates=("x",), targets=("y",)).iloc[0]
    pearson = stats.pearsonr(table.x, table.y)
    assert row.pearson == pytest.approx(pearson.statistic)
    assert row.spearman == pytest.approx(stats.spearmanr(table.x, table.y).statistic)
    low, high = pearson.confidence_interval(0.95)  # Fisher's, a different method: about the same
    assert row.pearson_low == pytest.approx(low, abs=0.12) and row.pearson_high == pytest.approx(high, abs=0.12)
    assert row.n == 30


def test_within_groups_the_groups_themselves_do_not_correlate():
    rng = np.random.default_rng(1)
    group = np.repeat([0.0, 10.0, 20.0], 40)
    table = pd.DataFrame({"x": group + rng.normal(size=120), "y": group + rng.normal(size=120), "size": group})
    pooled = correlations(table, candidates=("x",), targets=("y",)).iloc[0]
    within = correlations(table, within="size", candidates=("x",), targets=("y",)).iloc[0]
    assert pooled.pearson > 0.95
    assert abs(within.pearson) < 0.25 and within.pearson_low < 0 < within.pearson_high


def test_too_few_points_have_no_interval():
    table = pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 4.0]})
    row = correlations(table, candidates=("x",), targets=("y",)).iloc[0]
    assert row.n == 3 and np.isnan(row.pearson_low)
    constant = correlations(table.assign(x=1.0), candidates=("x",), targets=("y",)).iloc[0]
    assert np.isnan(constant.pearson)


def test_wilson_interval_solves_its_equation():
    """Its ends are the shares p from which the observed one lies exactly 1.96 standard errors, of p itself, away."""
    for hits, n in ((3, 3), (0, 5), (7, 20)):
        found = share([True] * hits + [False] * (n - hits))
        assert found.value == hits / n and found.n == n
        for end in (found.low, found.high):
            if 1e-9 < end < 1 - 1e-9:
                away = abs(found.value - end) / np.sqrt(end * (1 - end) / n)
                assert away == pytest.approx(stats.norm.ppf(0.975))
        assert 0 <= found.low <= found.value <= found.high <= 1
    assert share([True] * 3).low == pytest.approx(3 / (3 + stats.norm.ppf(0.975) ** 2)) and share([]).n == 0


def test_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(0).normal(5, 1, size=200)
    found = mean(values)
    assert (found.low, found.high) == pytest.approx(
        stats.norm.interval(0.95, values.mean(), values.std() / 200**0.5), abs=0.03
    )
    assert np.isnan(mean([1.0]).low) and mean([]).n == 0


@pytest.mark.parametrize(
    ("estimate", "side", "expected"),
    [
        (Estimate(0.9, 0.7, 1.0, 10), "above", "reproduced"),
        (Estimate(0.9, 0.7, 1.0, 10), "below", "not reproduced"),
        (Estimate(0.6, 0.4, 0.8, 10), "above", "undecided"),
        (Estimate(0.1, 0.0, 0.3, 10), "above", "not reproduced"),
        (Estimate(0.9, 0.7, 1.0, 2), "above", "undecided"),
        (Estimate(0.9, np.nan, np.nan, 10), "above", "undecided"),
    ],
)
def test_the_rule(estimate, side, expected):
    assert verdict(estimate, side, 0.5) == expected


class FakeStudy:
    """Tables in which every ranking claim of the paper holds in every unit, or in none."""

    protocol = SimpleNamespace(measure=SimpleNamespace(primary="W4A4"))

    def __init__(self, holds: bool, seeds: int = 20):
        self.seeds, self.holds = seeds, holds
        # place in the ranking; the lowest value first
        self.loss = ["muon", "soap", "scion", "adamw", "psgd", "shampoo"]
        self.mmr = ["muon", "adamw", "psgd", "scion", "soap", "shampoo"]
        self.damage = ["shampoo", "adamw", "psgd", "scion", "soap", "muon"]
        self.gain = ["adamw", "shampoo", "psgd", "scion", "soap", "muon"]

    def order(self, names):
        names = names if self.holds else names[::-1]
        return {name: float(place) for place, name in enumerate(names)}

    def rows(self):
        frame = pd.DataFrame([(o, s) for s in range(self.seeds) for o in OPTIMIZERS], columns=["optimizer", "seed"])
        return frame.assign(run=frame.optimizer + frame.seed.astype(str), size="x", lr=1.0, checkpoint="final")

    def runs(self, purpose):
        rows = self.rows()
        fp = 0.01 * rows.optimizer.map(self.order(self.loss)) + 3
        if purpose == "full_precision":
            return rows.assign(val_loss=fp, n_parameters=100, tokens=2000, status="finished")
        qat = fp * (1 + 0.1 * (1 + rows.optimizer.map(self.order(self.damage))))
        if not self.holds:
            qat = fp + 0.001  # the best stays the best
        return rows.assign(val_loss=qat, n_parameters=100, tokens=2000, status="finished")

    def measured(self, name, purpose="full_precision"):
        rows = self.rows()
        if name == "outliers" and purpose == "sweep":
            swept = pd.concat([rows.assign(lr=lr, run=rows.run + str(lr)) for lr in (1.0, 2.0, 3.0)])
            return swept.assign(mmr=swept.lr * (1 if self.holds else -1), kind="up")
        if name == "outliers":
            return rows.assign(mmr=rows.optimizer.map(self.order(self.mmr)), kurtosis=1.0, kind="up")
        if name == "ptq":
            table = rows.assign(increase=rows.optimizer.map(self.order(self.damage)), spec="W4A4", checkpoint="common")
            return table
        share_a = 0.95 if self.holds else 0.3
        parts = []
        for index in range(10):
            kind = "norm" if index % 2 else "linear"
            parts.append(
                rows.assign(
                    index=index,
                    kind=kind,
                    name=f"layer{index}",
                    R=0.5 if self.holds else 1.5,
                    R_in=1.0,
                    A=share_a,
                    B=0.4,
                    C=0.0,
                    gain=rows.optimizer.map(self.order(self.gain)),
                    spectral_ratio=1.01 if self.holds else 1.5,
                )
            )
        table = pd.concat(parts, ignore_index=True)
        return pd.concat([table.assign(attention=view) for view in ("unit", "open")], ignore_index=True)


RANKED = ["C1", "C2", "C3", "C4", "C5", "C8", "C9", "C10", "C11", "C12", "C13"]


@pytest.mark.parametrize("claim", RANKED)
@pytest.mark.parametrize("holds", [True, False])
def test_a_claim_that_always_holds_is_reproduced_and_one_that_never_does_is_not(claim, holds):
    rule = rules()[claim]
    found = claims.CLAIMS[claim](FakeStudy(holds))
    assert verdict(found, rule["side"], rule["threshold"]) == ("reproduced" if holds else "not reproduced")
    two_seeds = claims.CLAIMS[claim](FakeStudy(holds, seeds=2))
    if rule["unit"].startswith("size and seed"):
        assert verdict(two_seeds, rule["side"], rule["threshold"]) == "undecided"


def test_many_runs_of_few_sizes_and_seeds_decide_nothing():
    estimate = Estimate(0.9, 0.8, 1.0, 12)
    assert verdict(estimate, "above", 0.5, cells=3) == "reproduced"
    assert verdict(estimate, "above", 0.5, cells=2) == "undecided"


def test_a_seed_that_lacks_an_optimizer_is_no_cell(monkeypatch):
    study = FakeStudy(True, seeds=4)
    assert claims.complete_cells(study) == 4
    rows = study.runs("full_precision")
    monkeypatch.setattr(
        study, "runs", lambda purpose: rows.drop(rows.index[(rows.seed == 3) & (rows.optimizer == "soap")])
    )
    assert claims.complete_cells(study) == 3
    monkeypatch.setattr(study, "runs", lambda purpose: rows[rows.optimizer.isin(["muon", "soap"])])
    assert claims.complete_cells(study) == 0 and claims.c1(study).n == 0  # best of two is not best of six


def test_rho_needs_three_sizes():
    assert claims.c14(FakeStudy(True)).n == 1


def predictors_with(slopes: dict[str, float], n: int = 60) -> pd.DataFrame:
    """A predictor table in which a candidate is `slope` times the target plus noise, above an offset of its size."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"size": np.repeat(["s", "m"], n // 2), "increase": rng.normal(size=n)})
    table["accuracy"] = -table.increase
    offset = table["size"].map({"s": 0.0, "m": 50.0})
    noise = {name: rng.normal(size=n) for name in slopes}
    return table.assign(**{name: slope * table.increase + offset + noise[name] for name, slope in slopes.items()})


@pytest.mark.parametrize(
    ("claim", "slopes", "expected"),
    [
        ("C6", {"mmr": -2.0, "kurtosis": 0.0}, "reproduced"),
        ("C6", {"mmr": -2.0, "kurtosis": 2.0}, "not reproduced"),  # one that predicts is enough
        ("C6", {"mmr": 0.6, "kurtosis": 0.0}, "undecided"),
        ("C7", {"R_L": 2.0}, "reproduced"),  # the error rises with the loss, the accuracy falls
        ("C7", {"R_L": -2.0}, "not reproduced"),
        ("C7", {"R_L": 0.6}, "undecided"),
    ],
)
def test_claims_on_correlations(claim, slopes, expected):
    rule, found = rules()[claim], claims.CLAIMS[claim].estimate(predictors_with(slopes))
    assert found.n == 60 and verdict(found, rule["side"], rule["threshold"]) == expected


def scaling_losses(rho: dict[str, float]) -> pd.DataFrame:
    """Losses with 0.2 % noise of a law with these efficiencies at 4 bits: four sizes, three seeds."""
    rng, rows = np.random.default_rng(0), []
    for name in OPTIMIZERS:
        for n_parameters in (30e6, 100e6, 300e6, 1000e6):
            for bits, efficiency in ((16, 1.0), (4, rho[name])):
                losses = (400 / (n_parameters * efficiency) ** 0.34 + 1.7) * np.exp(0.002 * rng.normal(size=3))
                rows += [{"N": n_parameters, "bits": bits, "loss": loss, "optimizer": name} for loss in losses]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("shampoo", "others", "expected"),
    [(0.95, 0.6, "reproduced"), (0.6, 0.95, "not reproduced"), (0.8, 0.8, "undecided")],
)
def test_the_claim_on_parameter_efficiency(shampoo, others, expected):
    runs = scaling_losses(dict.fromkeys(OPTIMIZERS, others) | {"shampoo": shampoo})
    rule, found = rules()["C14"], claims.c14.estimate(runs)
    assert verdict(found, rule["side"], rule["threshold"]) == expected
    assert found.low < shampoo - others + 0.1 and found.high > shampoo - others - 0.1  # the highest of five lies above


@pytest.mark.parametrize("bits", [4, 16])
def test_an_optimizer_whose_runs_of_one_precision_all_diverged_leaves_rho_open(bits):
    runs = scaling_losses(dict.fromkeys(OPTIMIZERS, 0.8))
    found = claims.c14.estimate(runs[(runs.optimizer != "soap") | (runs.bits != bits)])
    assert np.isnan(found.value) and found.n == 4


# ------------------------------------------------------------------------------------- more and fewer than the six


@pytest.fixture
def copied(tmp_path):
    """copied(change): a study with the committed tables of scale laptop, each passed through `change`."""

    def copy(change):
        study = Study("laptop")
        for name in {file.stem for file in study.results.glob("*.csv")} & set(TABLES):
            change(study.table(name)).to_csv(tmp_path / f"{name}.csv", index=False)
        study.results = tmp_path
        return study

    return copy


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_seventh_optimizer_changes_no_verdict(copied, factor):
    """Its rows are Muon's with every measured number smaller, or larger, than anyone's."""
    measured = ["val_loss", "increase", "mmr", "kurtosis", "accuracy", "R", "A", "B", "C", "R_in", "gain"]
    measured += ["spectral_ratio"]

    def with_lion(table):
        own = table.optimizer == "muon" if "optimizer" in table else table.run.str.contains("-muon-")
        lion = table[own].copy()
        for column in lion.columns.intersection(["run", "optimizer"]):
            lion[column] = lion[column].str.replace("muon", "lion")
        for column in lion.columns.intersection(measured):
            lion[column] *= factor
        return pd.concat([lion, table], ignore_index=True)

    before, study = verdicts(Study("laptop")), copied(with_lion)
    assert "lion" in set(study.runs("sweep").optimizer) & set(study.measured("propagation").optimizer)
    after = verdicts(study)
    assert len(after) == 14
    pd.testing.assert_frame_equal(before, after, check_exact=True)


def test_without_one_of_the_six_nothing_is_decided_and_it_says_why(copied):
    def without_shampoo(table):
        keep = table.optimizer != "shampoo" if "optimizer" in table else ~table.run.str.contains("-shampoo-")
        return table[keep]

    table = verdicts(copied(without_shampoo))
    assert len(table) == 14 and set(table.verdict) == {"undecided"}
    assert table.comment.str.startswith("No rows of shampoo: ").all()


# ------------------------------------------------------------------------------------------------ what is committed


@pytest.mark.parametrize("scale", [file.parent.name for file in sorted(paths.RESULTS.glob("*/claims.csv"))])
def test_committed_verdicts_are_those_of_the_committed_tables(scale):
    study = Study(scale)
    pd.testing.assert_frame_equal(pd.read_csv(study.results / "claims.csv"), verdicts(study), check_dtype=False)


def test_verdicts_are_read_where_they_are_written_and_computed_where_not(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "verdicts", lambda study: pd.DataFrame({"id": ["computed"]}))
    study = SimpleNamespace(results=tmp_path)
    assert read_verdicts(study).id.tolist() == ["computed"] and not list(tmp_path.iterdir())
    pd.DataFrame({"id": ["written"]}).to_csv(tmp_path / "claims.csv", index=False)
    assert read_verdicts(study).id.tolist() == ["written"]
