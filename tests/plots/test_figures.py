"""Figures of studies that are larger, or less complete, than pocket."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from beyond_outliers import plots
from beyond_outliers.config import OPTIMIZER_NAMES


@pytest.fixture
def sweep():
    rows = [
        {"size": size, "optimizer": name, "seed": seed, "lr": lr, "val_loss": 3 + seed + lr}
        for size in ("s", "m", "l", "xl", "xxl")
        for name in (OPTIMIZER_NAMES if size != "xxl" else ("adamw",))  # the last size has hardly begun
        for seed in (0, 1)
        for lr in (0.1, 0.2, 0.4)
    ]
    yield pd.DataFrame(rows)
    plt.close("all")


def draw(table):
    return plots.optimizer_lines(table, "lr", "val_loss", "size", "learning rate", "loss", seeds=True, logx=True)


def shown(figure):
    return [ax for ax in figure.axes if ax.get_visible()]


def test_panels_do_not_grow_into_one_endless_row(sweep):
    figure = draw(sweep)
    assert len(shown(figure)) == 5 and figure.get_size_inches()[0] < 17
    assert [bool(ax.get_ylabel()) for ax in shown(figure)] == [True, False, False, False, True]


def test_the_legend_names_every_optimizer_of_any_panel(sweep):
    (legend,) = draw(sweep).legends
    assert [text.get_text() for text in legend.get_texts()] == [plots.LABELS[name] for name in OPTIMIZER_NAMES]


def test_seeds_are_not_joined_with_each_other(sweep):
    curves = shown(draw(sweep))[0].get_lines()
    assert len(curves) == 2 * len(OPTIMIZER_NAMES)
    assert all(len(set(line.get_xdata())) == len(line.get_xdata()) == 3 for line in curves)


def test_the_size_of_points_is_explained():
    table = pd.DataFrame({"size": ["s", "s", "m"], "optimizer": "adamw", "mmr": [1.0, 2, 3], "increase": [1.0, 2, 3]})
    row = {"target": "increase", "candidate": "mmr", "pearson": 1.0, "pearson_low": 1.0, "pearson_high": 1.0, "n": 3}
    (legend,) = plots.candidate_scatter(table, pd.DataFrame([row]), "increase", "loss").legends
    plt.close("all")
    assert [text.get_text() for text in legend.get_texts()] == ["AdamW", "s", "m"]
