"""Readings on tables small enough to work out by hand, and the same quantity wherever it is shown."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from beyond_outliers import paths
from beyond_outliers.claims import predictor_table, readings
from beyond_outliers.propagation import summarise
from beyond_outliers.study import Study


class Tables:
    """A study of two runs, `a` and `b`, whose tables are given."""

    protocol = SimpleNamespace(measure=SimpleNamespace(primary="W4A4"))

    def __init__(self, **tables):
        self.tables = tables

    def runs(self, purpose):
        return self.tables[purpose]

    def table(self, name):
        return self.tables[name]

    def measured(self, name, purpose="full_precision"):
        runs = pd.DataFrame({"run": ["a", "b"], "size": "s", "optimizer": ["adamw", "muon"], "lr": 0.1, "seed": 0})
        return runs.merge(self.tables[name].assign(**{"checkpoint": "final"} | dict(self.tables[name])), on="run")


def inputs(**columns):
    return pd.DataFrame({"run": ["a", "a", "a", "b"], "kind": ["up", "down", "q", "up"], **columns})


@pytest.mark.parametrize("file", sorted(paths.NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_call_readings_and_define_none(file):
    """Which rows count, and at which checkpoint, is said by readings alone."""
    code = "\n".join("".join(c["source"]) for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code")
    own = (
        r"""checkpoint ==|["']down["']|R_in|\.R > 0|attention ==|["']head["']|\.A >|study\.measured|spearmanr|cloze'"""
    )
    assert re.findall(own, code) == []


def test_the_spread_over_seeds_and_what_another_machine_changes():
    runs = [("a", 1, 3.0, 0.1), ("b", 2, 3.2, 0.3), ("c", 3, 3.4, 0.2)]
    runs = pd.DataFrame(runs, columns=["run", "seed", "val_loss", "val_standard_error"])
    runs = runs.assign(size="s", optimizer=["soap", "soap", "muon"], scheme="none")
    qat = runs[:2].assign(run=["d", "e"], scheme="quest", val_loss=[3.5, 3.9])
    there = [3.02, 3.14, 3.9, 3.4, 3.51]
    machines = pd.DataFrame({"run": [*"abcda"], "val_loss_here": [3.0, 3.2, 3.4, 3.5, 3.0], "val_loss_there": there})
    machines = machines.assign(device_name_here="x", device_name_there=[*"yyyyz"])
    machines["difference"] = (machines.val_loss_there - machines.val_loss_here).abs()
    study = Tables(full_precision=runs, qat=qat, runs=pd.concat([runs, qat]), machines=machines)
    spread = readings.spread(study).set_index("optimizer")
    assert spread.loc["soap", ["n_seeds", "mean", "lowest", "highest"]].tolist() == pytest.approx([2, 3.1, 3.0, 3.2])
    assert spread.loc["soap", ["between_seeds", "of_the_text", "rank"]].tolist() == pytest.approx([0.02**0.5, 0.2, 1])
    effect = readings.machine_effect(study).set_index(["pair", "scheme", "optimizer"])
    columns = ["n", "median", "largest", "between_seeds"]
    assert effect.loc[(1, "none", "soap"), columns].tolist() == pytest.approx([2, 0.04, 0.06, 0.02**0.5])
    assert effect.loc[(1, "quest", "soap"), columns].tolist() == pytest.approx([1, 0.1, 0.1, 0.08**0.5])
    assert effect.loc[(1, "none", "muon"), columns[:3]].tolist() == pytest.approx([1, 0.5, 0.5])
    assert math.isnan(effect.between_seeds[1, "none", "muon"])  # one seed has no spread
    assert effect.loc[(2, "none", "soap"), "median"] == pytest.approx(0.51)
    shift = readings.machine_shift(study).set_index(["device_name_there", "scheme"])
    assert shift.n.to_dict() == {("y", "none"): 3, ("y", "quest"): 1, ("z", "none"): 1}
    expected = ttest_1samp([0.02, -0.06, 0.5], 0)
    interval = expected.confidence_interval(0.95)
    found = shift.loc[("y", "none"), ["mean", "low", "high"]].tolist()
    assert found == pytest.approx([0.46 / 3, interval.low, interval.high])
    assert shift.loc[("y", "quest"), "mean"] == pytest.approx(-0.1) and math.isnan(shift.low["y", "quest"])


def test_mmr_leaves_out_down():
    found = readings.mmr(Tables(outliers=inputs(mmr=[2.0, 1e6, 4.0, 5.0])))
    assert found.set_index("run").mmr.to_dict() == {"a": 3.0, "b": 5.0}
    assert list(found.columns) == [*readings.RUN, "mmr"]


def test_a_checkpoint_that_is_not_there_is_refused():
    table = inputs(mmr=1.0).assign(checkpoint=["final", "common", "final", "common"])
    study = Tables(outliers=table)
    assert [len(readings.measured(study, "outliers", checkpoint=c)) for c in ("final", "common", None)] == [2, 2, 4]
    with pytest.raises(ValueError, match="unknown checkpoint 'last'; valid: final, common"):
        readings.measured(study, "outliers", checkpoint="last")


@pytest.fixture
def network():
    """Run a: an exact first module, linear layers, a norm, the head; b: one linear layer. Attention closed and open."""
    columns = ["run", "attention", "index", "name", "kind", "R_in", "R", "A", "B", "C", "gain"]
    rows = [
        ("a", "unit", 0, "embedding", "embedding", 0.0, 0.0, 0.0, 0.0, 0.0, np.nan),
        ("a", "unit", 1, "blocks.0.up", "linear", 0.0, 0.2, 0.0, 0.2, 0.0, np.nan),
        ("a", "unit", 10, "head", "linear", 0.1, 0.4, 0.3, 0.05, 0.05, 3.0),
        ("a", "unit", 2, "blocks.0.norm", "norm", 0.2, 0.1, 0.1, 0.0, 0.0, 0.5),
        ("a", "open", 1, "blocks.0.up", "linear", 0.0, 0.2, 0.0, 0.2, 0.0, np.nan),
        ("a", "open", 2, "blocks.0.down", "linear", 0.2, 0.5, 0.3, 0.2, 0.0, 1.5),
        ("a", "open", 3, "blocks.0.out", "linear", 0.5, 0.6, 0.25, 0.3, 0.05, 0.5),
        ("a", "open", 10, "head", "linear", 0.1, 0.4, 0.3, 0.05, 0.05, 3.0),
        ("b", "open", 1, "blocks.0.up", "linear", 0.1, 0.4, 0.2, 0.1, 0.1, 2.0),
        ("b", "unit", 1, "blocks.0.up", "linear", 0.1, 0.4, 0.2, 0.1, -0.25, 2.0),
    ]
    return Tables(propagation=pd.DataFrame(rows, columns=columns))


def by_run(rows, column):
    return rows.set_index("run")[column].to_dict()


def test_the_networks_end_is_the_last_index_however_rows_are_ordered(network):
    assert by_run(readings.output_error(network), "R_L") == {"a": 0.4, "b": 0.4}
    assert by_run(readings.new_error(network), "mean_B") == {"a": pytest.approx(0.25 / 4), "b": 0.1}
    own = readings.modules(network).query("run == 'a'").sort_values("index")
    assert summarise(own.assign(spectral_ratio=1.0, alignment_ratio=1.0)).R_L == 0.4


def test_linear_gain_is_that_of_the_blocks_with_attention_open(network):
    assert by_run(readings.linear_gain(network), "gain") == {"a": 1.0, "b": 2.0}  # no head, no exact input
    assert len(readings.modules(network, attention=None)) == 10


def test_modules_with_an_error_behind_and_before(network):
    rows = readings.modules(network)
    assert list(readings.with_error(rows).name) == ["blocks.0.up", "head", "blocks.0.norm", "blocks.0.up"]
    inner = readings.with_input_error(rows)
    assert list(inner.name) == ["head", "blocks.0.norm", "blocks.0.up"]
    assert list(readings.accumulated_dominates(inner)) == [True, True, False]  # the last has |C| above A


def test_what_kinds_of_modules_do_to_the_error(network):
    found = readings.error_by(readings.modules(network), "kind")
    assert found.modules.to_dict() == {"linear": 2, "norm": 1}  # one without an input error is none of them
    assert found.factor.linear == pytest.approx(math.sqrt((0.4 / 0.1) * (0.4 / 0.1))) and found.factor.norm == 0.5
    assert found.falls.to_dict() == {"linear": 0.0, "norm": 1.0}
    assert found.new.linear == pytest.approx((0.05 / 0.4 + 0.1 / 0.4) / 2) and found.new.norm == 0


def test_damage_is_of_the_primary_format_at_the_common_loss_unless_told_otherwise():
    rows = [("a", "W4A4+head", "final", 0.3), ("a", "W4A4+head", "common", 0.2), ("a", "W4A4", "common", 0.1),
            ("a", "none", "final", 0.0), ("b", "W4A4+head", "final", 0.5)]  # fmt: skip
    error = {"attention": "unit", "index": [1, 2], "R": [0.1, 0.3], "checkpoint": "common"}
    study = Tables(
        ptq=pd.DataFrame(rows, columns=["run", "spec", "checkpoint", "increase"]),
        propagation=pd.DataFrame({"run": ["a", "a"], **error}),
    )
    study.protocol = SimpleNamespace(measure=SimpleNamespace(primary="W4A4+head"))
    asked = [{}, {"spec": "W4A4"}, {"checkpoint": "final"}, {"checkpoint": None}]
    assert [readings.damage(study, **of).increase.tolist() for of in asked] == [
        [0.2],
        [0.1],
        [0.3, 0.5],
        [0.3, 0.2, 0.5],
    ]
    assert readings.damage_and_error(study)[["run", "increase", "R_L"]].to_numpy().tolist() == [["a", 0.2, 0.3]]


def runs(losses, **columns):
    return pd.DataFrame(
        {"run": ["r0", "r1"], "size": "s", "optimizer": ["adamw", "muon"], "seed": 0, "val_loss": losses, **columns}
    )


def test_full_precision_beside_qat():
    full, qat = runs([2.0, 4.0], status="finished"), runs([2.5, 4.5], status="finished").iloc[::-1]
    found = readings.qat_losses(Tables(full_precision=full, qat=qat)).set_index("optimizer")
    assert found.increase.to_dict() == {"adamw": 0.5, "muon": 0.5}
    assert found.relative_increase.to_dict() == {"adamw": 0.25, "muon": 0.125}


def test_the_relative_drop_and_its_error():
    """The paper's definition, (fp - qat) / fp; its error against the spread of simulated accuracies."""
    rows = pd.DataFrame({"run": ["a", "b"], "task": "cloze", "accuracy": [0.8, 0.6], "standard_error": [0.02, 0.03]})

    class Both(Tables):
        def measured(self, name, purpose="full_precision"):
            own = rows.assign(accuracy=rows.accuracy - (0.2 if purpose == "qat" else 0), checkpoint="final")
            own = own.assign(spec="QAT" if purpose == "qat" else "none", size="s", optimizer=["adamw", "muon"])
            return own.assign(seed=0, lr=0.1)

    found = readings.qat_accuracies(Both())
    assert found.relative_drop.tolist() == pytest.approx([0.25, 1 / 3])
    rng = np.random.default_rng(0)
    full, qat = 0.8 + 0.02 * rng.normal(size=200_000), 0.6 + 0.02 * rng.normal(size=200_000)
    assert found.drop_error[0] == pytest.approx(((full - qat) / full).std(), rel=0.02)


def test_optimizers_in_order():
    rows = pd.DataFrame(
        [("l", "adamw", 3.0), ("l", "muon", 1.0), ("s", "adamw", 1.0), ("s", "muon", 1.4), ("s", "adamw", 2.0)],
        columns=["size", "optimizer", "val_loss"],
    )
    assert readings.ranking(rows, "val_loss").to_dict() == {"l": "muon < adamw", "s": "muon < adamw"}  # 1.4 < 1.5
    assert list(readings.ranking(rows.iloc[::-1], "val_loss").index) == ["s", "l"]


def test_evaluations_after_the_first_step():
    curves = pd.DataFrame({"run": ["r0", "r0", "r0", "r9"], "tokens": [0, 10, 20, 10], "val_loss": [5, np.nan, 3, 3]})
    found = readings.validation_curves(Tables(curves=curves), runs([3.0, 3.0]))
    assert found[["run", "tokens", "optimizer"]].to_numpy().tolist() == [["r0", 20, "adamw"]]
    both = runs([3.0, 3.0])
    curves = pd.DataFrame({"run": both.run[::-1], "tokens": 10, "val_loss": 3.0})
    assert readings.validation_curves(Tables(curves=curves), both).run.tolist() == both.run.tolist()  # of the runs


def test_how_far_a_checkpoint_lies_below_the_common_loss():
    table = pd.DataFrame({"step": [50], "final_step": [200], "common_loss": [3.0], "val_loss": [2.75]})
    found = readings.common_loss(Tables(common_loss=table))
    assert (found.share[0], found.undershoot[0]) == (0.25, 0.25)


def test_candidates_are_the_readings_of_the_committed_study():
    study = Study("pocket")
    table = predictor_table(study, checkpoint="common").set_index("run")
    for row in readings.measured(study, "outliers", checkpoint="common").groupby("run"):
        kept = [value for value, kind in zip(row[1].mmr, row[1].kind, strict=True) if kind != "down"]
        assert table.mmr[row[0]] == pytest.approx(sum(kept) / len(kept), rel=1e-12)
    damage = readings.damage(study).set_index("run").increase
    assert (table.increase == damage[table.index]).all() and len(table) == 24
