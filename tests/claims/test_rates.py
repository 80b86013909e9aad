"""What learning rates leave before and after quantization."""

import re
from types import SimpleNamespace

import pandas as pd
import pytest

from beyond_outliers.claims import rates
from beyond_outliers.study import Study


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        ("laptop", "at 0.08M, 0.26M. .* Sizes between take the rate of the next smaller one"),
        ("pocket", "at 0.03M. .* At 0.08M the rates are those that scale `confirm` chose there"),
        ("confirm", "at every size, on seed 100, over rates a factor 2 apart: .* within 0.015 nats of the best"),
    ],
)
def test_how_rates_are_chosen_is_read_off_the_scale_file(scale, said):
    assert re.search(said.replace(". ", r"\. "), rates.how_chosen(Study(scale)))


def test_main_runs_stand_beside_the_tuned_ones_of_their_seeds_if_there_are_any():
    columns = ["size", "optimizer", "lr", "hyper", "seed", "val_loss"]
    swept = [
        ("s", "muon", 0.1, "{}", 0, 3.0),
        ("s", "muon", 0.1, "{}", 1, 3.2),
        ("s", "muon", 0.1, "{'embedding_lr': 1}", 0, 9.0),  # another auxiliary rate is another choice
        ("s", "muon", 0.2, "{}", 0, 4.0),
        ("s", "soap", 1.0, "{}", 0, 2.5),
    ]
    main = [
        ("s", "muon", 0.1, "{}", 0, 3.3),
        ("s", "muon", 0.1, "{}", 7, 9.0),
        ("s", "soap", 1.0, "{}", 7, 2.0),
        ("s", "soap", 1.0, "{}", 8, 3.0),
    ]
    runs = {"sweep": pd.DataFrame(swept, columns=columns), "full_precision": pd.DataFrame(main, columns=columns)}
    table = rates.tuned_and_main(SimpleNamespace(runs=runs.get)).set_index("optimizer")
    assert table.loc["muon", ["best_tuned", "main", "seeds"]].tolist() == pytest.approx([3.1, 3.3, "the same"])
    assert table.loc["soap", ["best_tuned", "main", "seeds"]].tolist() == pytest.approx([2.5, 2.5, "others"])
    assert table.difference.tolist() == pytest.approx([0.2, 0.0])


class Sweep:
    """Tuning runs: (optimizer, lr, embedding rate, seed, loss before, damage, status)."""

    scale = "made up"

    def __init__(self, rows, tuned=False, chosen=None):
        self.protocol = SimpleNamespace(tuned=tuned, measure=SimpleNamespace(primary="W4A4+head"))
        columns = ["optimizer", "lr", "embedding", "seed", "before", "increase", "status"]
        self.rows = pd.DataFrame(rows, columns=columns)
        self.rows["run"] = [f"r{place}" for place in self.rows.index]
        self.rows["size"] = "s"
        self.rows["hyper"] = [f'{{"embedding_lr": {rate}}}' for rate in self.rows.embedding]
        self.chosen = pd.DataFrame(chosen or [], columns=["size", "optimizer", "auxiliary"])

    def runs(self, purpose):
        assert purpose == "sweep"
        return self.rows[["run", "size", "optimizer", "lr", "seed", "hyper", "status"]]

    def table(self, name):
        assert name == "learning_rates"
        return self.chosen

    def measured(self, name, purpose):
        rows = self.rows[self.rows.status == "finished"].assign(checkpoint="final", spec="W4A4+head")
        rows = rows.assign(val_loss=rows.before + rows.increase)
        return pd.concat([rows, rows.assign(spec="W4A4", increase=9.0)])


GRID = [
    ("muon", 0.1, 0.5, 0, 3.0, 0.4, "finished"),
    ("muon", 0.1, 0.5, 1, 3.2, 0.2, "finished"),
    ("muon", 0.05, 0.5, 0, 3.2, 0.1, "finished"),
    ("adamw", 0.1, 0.5, 0, 3.3, 0.1, "finished"),
    ("adamw", 0.2, 0.5, 0, 9.0, 0.1, "diverged"),
]


def test_losses_are_means_over_seeds_in_the_primary_format():
    table = rates.before_and_after(Sweep(GRID)).set_index(["optimizer", "lr"])
    found = table.loc[("muon", 0.1), ["before", "after", "damage", "seeds"]].tolist()
    assert found == pytest.approx([3.1, 3.4, 0.3, 2])
    assert ("adamw", 0.2) not in table.index


def test_another_rate_may_be_best_after_quantization():
    study = Sweep(GRID)
    best = rates.best(rates.before_and_after(study)).set_index("optimizer")
    assert best.loc["muon", ["lr_before", "lr_after", "gain"]].tolist() == pytest.approx([0.1, 0.05, 0.1])
    assert best.gain["adamw"] == 0
    assert rates.finding(study) == (
        "- s: lowest loss in full precision Muon, after quantization Muon; for 1 of 2 optimizers another learning rate "
        "is best after quantization (1 smaller), by at most 0.100 nats."
    )


def test_a_tuned_scale_has_the_line_at_the_chosen_auxiliary_rate():
    rows = [("muon", 0.1, 0.5, 0, 3.0, 0.4, "finished"), ("muon", 0.1, 0.25, 0, 2.9, 0.4, "finished")]
    study = Sweep(rows, tuned=True, chosen=[("s", "muon", 0.5)])
    assert rates.line(study).run.tolist() == ["r0"]
    assert rates.line(Sweep(rows, tuned=True)).empty  # nothing is chosen yet
    assert len(rates.line(Sweep(rows))) == 2


def test_a_scale_without_tuning_runs_says_so():
    assert rates.finding(Sweep([])) == "No tuning run of scale made up has been measured yet."
