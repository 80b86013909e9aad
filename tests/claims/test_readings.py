"""Readings on tables small enough to work out by hand, and the same quantity wherever it is shown."""

import re

import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from beyond_outliers import paths
from beyond_outliers.claims import predictor_table, readings
from beyond_outliers.propagation import summarise
from beyond_outliers.study import Study
from made_up_runs import Made, table

NAN = float("nan")
TWO = pd.DataFrame({"run": ["a", "b"], "size": "s", "optimizer": ["adamw", "muon"], "lr": 0.1, "seed": 0})


class Tables(Made):
    """A study of two runs, `a` and `b`, whose tables are given."""

    def __init__(self, by_purpose=None, primary="W4A4", **tables):
        super().__init__(by_purpose, primary, **tables)

    def measured(self, name, purpose="full_precision"):
        return TWO.merge(self.table(name).assign(**{"checkpoint": "final"} | dict(self.table(name))), on="run")


def inputs(**columns):
    return pd.DataFrame({"run": ["a", "a", "a", "b"], "kind": ["up", "down", "q", "up"], **columns})


@pytest.mark.parametrize("file", sorted(paths.NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_call_readings_and_define_none(file):
    """Which rows count, and at which checkpoint, is said by readings alone."""
    code = "\n".join(cell.source for cell in nbformat.read(file, 4).cells if cell.cell_type == "code")
    own = (
        r"""checkpoint ==|["']down["']|R_in|\.R > 0|attention ==|["']head["']|\.A >|study\.measured|spearmanr|cloze'"""
    )
    assert re.findall(own, code) == []


def test_the_spread_over_seeds_and_what_another_machine_changes():
    runs = table("run optimizer seed val_loss val_standard_error",
                 ("a", "soap", 1, 3.0, 0.1), ("b", "soap", 2, 3.2, 0.3), ("c", "muon", 3, 3.4, 0.2))  # fmt: skip
    runs = runs.assign(size="s", scheme="none", val_loss_here=runs.val_loss)
    pairs = zip("abca", "yyyz", [3.02, 3.14, 3.9, 3.51], strict=True)
    machines = table("run device_name_there val_loss_there", *pairs).merge(runs[["run", "val_loss_here"]])
    machines = machines.assign(
        device_name_here="x", difference=(machines.val_loss_there - machines.val_loss_here).abs()
    )
    study = Tables({"full_precision": runs}, runs=runs, machines=machines)
    spread = readings.spread(study).set_index("optimizer").loc["soap"]
    columns = ["n_seeds", "mean", "lowest", "highest", "between_seeds", "of_the_text", "rank"]
    assert spread[columns].tolist() == pytest.approx([2, 3.1, 3.0, 3.2, 0.02**0.5, 0.2, 1])
    effect = readings.machine_effect(study).set_index(["pair", "optimizer"])[
        ["n", "median", "largest", "between_seeds"]
    ]
    assert effect.loc[(1, "soap")].tolist() == pytest.approx([2, 0.04, 0.06, 0.02**0.5])
    assert effect.loc[(1, "muon")].tolist() == pytest.approx([1, 0.5, 0.5, NAN], nan_ok=True)  # one seed has no spread
    assert effect.loc[(2, "soap")].tolist() == pytest.approx([1, 0.51, 0.51, 0.02**0.5])
    shift = readings.machine_shift(study).set_index("device_name_there")[["mean", "low", "high", "n"]]
    expected = 0.46 / 3, *ttest_1samp([0.02, -0.06, 0.5], 0).confidence_interval(0.95), 3
    assert shift.loc["y"].tolist() == pytest.approx(expected)
    assert shift.loc["z"].tolist() == pytest.approx([0.51, NAN, NAN, 1], nan_ok=True)


def by_run(rows, column):
    return rows.set_index("run")[column].to_dict()


def test_mmr_leaves_out_down():
    found = readings.mmr(Tables(outliers=inputs(mmr=[2.0, 1e6, 4.0, 5.0])))
    assert by_run(found, "mmr") == {"a": 3.0, "b": 5.0} and list(found.columns) == [*readings.RUN, "mmr"]


def test_a_checkpoint_that_is_not_there_is_refused():
    study = Tables(outliers=inputs(mmr=1.0).assign(checkpoint=["final", "common", "final", "common"]))
    assert [len(readings.measured(study, "outliers", checkpoint=c)) for c in ("final", "common", None)] == [2, 2, 4]
    with pytest.raises(ValueError, match="unknown checkpoint 'last'; valid: final, common"):
        readings.measured(study, "outliers", checkpoint="last")


# Run a: an exact first module, linear layers, a norm, the head; b: one linear layer. Attention closed and open.
NETWORK = Tables(propagation=table(
    "run attention index name kind R_in R A B C gain",
    ("a", "unit", 0, "embedding", "embedding", 0.0, 0.0, 0.0, 0.0, 0.0, NAN),
    ("a", "unit", 1, "blocks.0.up", "linear", 0.0, 0.2, 0.0, 0.2, 0.0, NAN),
    ("a", "unit", 10, "head", "linear", 0.1, 0.4, 0.3, 0.05, 0.05, 3.0),
    ("a", "unit", 2, "blocks.0.norm", "norm", 0.2, 0.1, 0.1, 0.0, 0.0, 0.5),
    ("a", "open", 1, "blocks.0.up", "linear", 0.0, 0.2, 0.0, 0.2, 0.0, NAN),
    ("a", "open", 2, "blocks.0.down", "linear", 0.2, 0.5, 0.3, 0.2, 0.0, 1.5),
    ("a", "open", 3, "blocks.0.out", "linear", 0.5, 0.6, 0.25, 0.3, 0.05, 0.5),
    ("a", "open", 10, "head", "linear", 0.1, 0.4, 0.3, 0.05, 0.05, 3.0),
    ("b", "open", 1, "blocks.0.up", "linear", 0.1, 0.4, 0.2, 0.1, 0.1, 2.0),
    ("b", "unit", 1, "blocks.0.up", "linear", 0.1, 0.4, 0.2, 0.1, -0.25, 2.0),
))  # fmt: skip


def test_the_networks_end_is_the_last_index_however_rows_are_ordered():
    assert by_run(readings.output_error(NETWORK), "R_L") == {"a": 0.4, "b": 0.4}
    assert by_run(readings.new_error(NETWORK), "mean_B") == {"a": pytest.approx(0.25 / 4), "b": 0.1}
    own = readings.modules(NETWORK).query("run == 'a'").sort_values("index")
    assert summarise(own.assign(spectral_ratio=1.0, alignment_ratio=1.0)).R_L == 0.4


def test_linear_gain_is_that_of_the_blocks_with_attention_open():
    assert by_run(readings.linear_gain(NETWORK), "gain") == {"a": 1.0, "b": 2.0}  # no head, no exact input
    assert len(readings.modules(NETWORK, attention=None)) == 10


def test_what_kinds_of_modules_do_to_the_error():
    """Of those with an error behind and before them."""
    rows = readings.modules(NETWORK)
    inner = readings.with_input_error(rows)
    assert list(readings.with_error(rows).name) == ["blocks.0.up", *inner.name]
    assert list(inner.name) == ["head", "blocks.0.norm", "blocks.0.up"]
    assert list(readings.accumulated_dominates(inner)) == [True, True, False]  # the last has |C| above A
    found = readings.error_by(rows, "kind")  # modules, factor, falls, new
    assert found.loc["linear"].tolist() == pytest.approx([2, 4, 0, (0.05 / 0.4 + 0.1 / 0.4) / 2])
    assert found.loc["norm"].tolist() == pytest.approx([1, 0.5, 1, 0])


def test_damage_is_of_the_primary_format_at_the_common_loss_unless_told_otherwise():
    rows = table(
        "run spec checkpoint increase",
        *[("a", "W4A4+head", "final", 0.3), ("a", "W4A4+head", "common", 0.2), ("b", "W4A4+head", "final", 0.5)],
        *[("a", "W4A4", "common", 0.1), ("a", "none", "final", 0.0)],
    )
    error = table("run index R", ("a", 1, 0.1), ("a", 2, 0.3)).assign(attention="unit", checkpoint="common")
    study = Tables(primary="W4A4+head", ptq=rows, propagation=error)
    asked = [{}, {"spec": "W4A4"}, {"checkpoint": "final"}, {"checkpoint": None}]
    found = [readings.damage(study, **of).increase.tolist() for of in asked]
    assert found == [[0.2], [0.1], [0.3, 0.5], [0.3, 0.2, 0.5]]
    assert readings.damage_and_error(study)[["run", "increase", "R_L"]].to_numpy().tolist() == [["a", 0.2, 0.3]]


def runs(losses):
    return TWO.assign(run=["r0", "r1"], val_loss=losses, status="finished")


def test_full_precision_beside_qat():
    qat = runs([2.5, 4.5]).iloc[::-1]
    found = readings.qat_losses(Tables({"full_precision": runs([2.0, 4.0]), "qat": qat})).set_index("optimizer")
    assert found.loc["adamw", ["increase", "relative_increase"]].tolist() == [0.5, 0.25]
    assert found.loc["muon", ["increase", "relative_increase"]].tolist() == [0.5, 0.125]


def test_the_relative_drop_and_its_error():
    """The paper's definition, (fp - qat) / fp; its error against the spread of simulated accuracies."""

    class Both(Tables):
        def measured(self, name, purpose="full_precision"):
            qat = purpose == "qat"
            rows = TWO.assign(task="cloze", checkpoint="final", spec="QAT" if qat else "none")
            return rows.assign(accuracy=[0.8 - 0.2 * qat, 0.6 - 0.2 * qat], standard_error=[0.02, 0.03])

    found = readings.qat_accuracies(Both())
    assert found.relative_drop.tolist() == pytest.approx([0.25, 1 / 3])
    full, qat = np.array([[0.8], [0.6]]) + 0.02 * np.random.default_rng(0).normal(size=(2, 200_000))
    assert found.drop_error[0] == pytest.approx(((full - qat) / full).std(), rel=0.02)


def test_optimizers_in_order():
    rows = table("size optimizer val_loss", ("l", "adamw", 3.0), ("l", "muon", 1.0), ("s", "adamw", 1.0),
                 ("s", "muon", 1.4), ("s", "adamw", 2.0))  # fmt: skip
    assert readings.ranking(rows, "val_loss").to_dict() == {"l": "muon < adamw", "s": "muon < adamw"}  # 1.4 < 1.5
    assert list(readings.ranking(rows.iloc[::-1], "val_loss").index) == ["s", "l"]


def test_evaluations_after_the_first_step_in_the_order_of_the_runs():
    curves = table("run tokens val_loss", ("r1", 10, 3), ("r0", 0, 5), ("r0", 10, NAN), ("r0", 20, 3), ("r9", 10, 3))
    found = readings.validation_curves(Tables(curves=curves), runs(3.0).drop(columns="val_loss"))
    assert found[["run", "tokens", "optimizer"]].to_numpy().tolist() == [["r0", 20, "adamw"], ["r1", 10, "muon"]]


def test_how_far_a_checkpoint_lies_below_the_common_loss():
    checkpoints = table("step final_step common_loss val_loss", (50, 200, 3.0, 2.75))
    found = readings.common_loss(Tables(common_loss=checkpoints))
    assert (found.share[0], found.undershoot[0]) == (0.25, 0.25)


def test_candidates_are_the_readings_of_the_committed_study():
    study = Study("pocket")
    found = predictor_table(study, checkpoint="common").set_index("run")
    rows = readings.measured(study, "outliers", checkpoint="common").query("kind != 'down'")
    assert found.mmr.to_dict() == pytest.approx(rows.groupby("run").mmr.mean().to_dict(), rel=1e-12)
    damage = readings.damage(study).set_index("run").increase
    assert (found.increase == damage[found.index]).all() and len(found) == 24
