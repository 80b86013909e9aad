"""Pairs of optimizers on two architectures: which differences carry over."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_ind

from beyond_outliers.claims import architectures
from beyond_outliers.study.tables import MissingResults

SEEDS = np.arange(5)
NOISE = {"adamw": [0.01, -0.02, 0.0, 0.02, -0.01], "muon": [-0.01, 0.02, 0.01, 0.0, -0.02], "soap": [0, 0.01, 0, 0, 0]}


class Trained:
    """Losses in full precision of five seeds an optimizer, MMR on request; nothing else is measured."""

    scale = "another"

    def __init__(self, size, **losses):
        rows = [
            (f"{name}{seed}", size, name, seed, loss + NOISE[name][seed], "finished")
            for name, loss in losses.items()
            for seed in SEEDS
        ]
        self.rows = pd.DataFrame(rows, columns=["run", "size", "optimizer", "seed", "val_loss", "status"])
        measure = SimpleNamespace(primary="W4A4+head")
        self.protocol = SimpleNamespace(optimizers=list(losses), measure=measure)

    def runs(self, purpose):
        return self.rows if purpose == "full_precision" else self.rows[:0]

    def measured(self, table, purpose="full_precision"):
        if table != "outliers":
            raise MissingResults(table)
        rows = self.rows.assign(mmr=np.exp(self.rows.val_loss), lr=0.1, kind="q", checkpoint="final", spec="none")
        return rows.assign(module="blocks.0.attention.q")

    table = measured


def found(here, there):
    table = architectures.differences({"one": (here, "s"), "other": (there, "t")})
    return table.set_index(["quantity", "pair"])


def test_differences_of_both_with_their_intervals():
    """Against Welch's interval of scipy, in nats and as a ratio; only optimizers that both have."""
    here, there = Trained("s", adamw=3.0, muon=2.8, soap=2.5), Trained("t", adamw=3.5, muon=3.2)
    table = found(here, there)
    assert list(table.index) == [("loss in full precision", "Muon - AdamW"), ("MMR at the end", "Muon / AdamW")]
    welch = ttest_ind(*(2.8 + np.array(NOISE["muon"]), 3.0 + np.array(NOISE["adamw"])), equal_var=False)
    low, high = welch.confidence_interval()
    assert table.one.iloc[0] == f"-0.200 [{low:.3f}, {high:.3f}]"
    assert table.one.iloc[1] == f"{np.exp(-0.2):.2f} [{np.exp(low):.2f}, {np.exp(high):.2f}]"
    assert table.other.iloc[0].startswith("-0.300 [") and list(table["carries over"]) == ["yes", "yes"]


@pytest.mark.parametrize(
    ("here", "there", "said"),
    [
        (2.9, 2.8, "yes"),
        (2.9, 3.1, "no, the other way round"),
        (2.9, 3.001, "seen in one alone"),
        (3.001, 3.1, "seen in other alone"),
        (3.001, 3.001, "seen in neither"),
    ],
)
def test_what_carries_over(here, there, said):
    table = found(Trained("s", adamw=3.0, muon=here), Trained("t", adamw=3.0, muon=there))
    assert set(table["carries over"]) == {said}
    words = {"yes": "carry over", "no, the other way round": "turn round"}.get(said, said)
    assert f"2 {words}" in architectures.summary(table)


def test_other_sizes_do_not_count():
    here, there = Trained("s", adamw=3.0, muon=2.8), Trained("elsewhere", adamw=3.5, muon=3.2)
    assert found(here, there).empty
