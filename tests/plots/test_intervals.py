"""Figures of differences: what is drawn is what the table says, and nothing yet is said, not drawn."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from beyond_outliers import plots


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture
def ratios():
    rows = [
        ("s", "adamw", 1.0, np.nan, np.nan, 3),
        ("s", "muon", 2.0, 1.5, 3.0, 3),
        ("m", "adamw", 1.0, np.nan, np.nan, 1),
        ("m", "muon", 0.5, np.nan, np.nan, 1),
    ]
    return pd.DataFrame(rows, columns=["size", "optimizer", "ratio", "low", "high", "n"])


def arms(container):
    """Both ends of every horizontal or vertical error bar of a container."""
    return [segment.tolist() for bars in container.lines[2] for segment in bars.get_segments()]


def test_a_forest_draws_every_interval_and_hollow_points_without_one(ratios):
    small, medium = plots.ratio_forest(ratios, "x").axes
    muon = small.containers[1]
    assert arms(muon) == [[[1.5, 1.0], [3.0, 1.0]]] and muon.lines[0].get_markerfacecolor() == plots.COLOURS["muon"]
    assert medium.containers[1].lines[0].get_markerfacecolor() == "white"
    assert [text.get_text() for text in small.get_yticklabels()] == ["AdamW", "Muon"]
    assert small.get_title() == "s, n 3" and small.get_xscale() == "log"


def test_effects_have_a_panel_each_and_what_is_missing_is_named():
    rows = [("loss", "muon", -0.5, -1.0, 0.25, 6, "s"), ("mmr", "muon", 0.5, np.nan, np.nan, 2, "s")]
    rows += [("loss", "soap", 0.3, 0.2, 0.4, 5, "s")]
    table = pd.DataFrame(rows, columns=["quantity", "optimizer", "effect", "low", "high", "n", "over"])
    titles = {"loss": ("loss", "nats"), "qat": ("by QAT", "nats"), "mmr": ("MMR", "times")}
    titles |= {name: (name, "nats") for name in "abc"}
    loss, qat, ratio = plots.effect_forest(table, titles).axes[:3]
    assert arms(loss.containers[0]) == [[[-1.0, 0.0], [0.25, 0.0]]] and len(loss.containers) == 2
    assert (loss.get_title(), loss.get_xlabel()) == ("loss", "nats above AdamW; s, n 5 to 6")
    assert qat.get_title() == "by QAT" and [text.get_text() for text in qat.texts] == ["not measured yet"]
    assert ratio.get_xscale() == "log" and ratio.get_xlabel() == "times AdamW; s, n 2"
    assert ratio.containers[0].lines[0].get_markerfacecolor() == "white"
    assert [text.get_text() for text in loss.get_yticklabels()] == ["Muon", "SOAP"]


def test_lines_over_methods_have_gaps_where_a_method_lacks(ratios):
    table = pd.concat([ratios.assign(format="int4", method=method) for method in ("RTN", "both")])
    table = pd.concat([table, ratios.assign(format="nvfp4", method="GPTQ")])
    figure = plots.method_lines(table, ("RTN", "GPTQ", "rotation", "both"), "y")  # rotation is nowhere: left out
    assert [ax.get_title() for ax in figure.axes] == ["int4, s", "int4, m", "nvfp4, s", "nvfp4, m"]
    line = figure.axes[0].containers[1].lines[0]
    assert line.get_ydata()[[0, 2]].tolist() == [2, 2] and np.isnan(line.get_ydata()[1])
    assert np.round(line.get_xdata()).tolist() == [0, 1, 2]


def test_points_carry_both_intervals():
    table = pd.DataFrame({"optimizer": ["adamw", "muon"], "x": [-1.0, 1.0], "y": [0.0, 2.0]})
    table = table.assign(x_half=0.5, y_half=[0.25, np.nan])
    (ax,) = plots.centred_points(table, "x", "y", "a", "b").axes
    assert arms(ax.containers[0]) == [[[-1.5, 0.0], [-0.5, 0.0]], [[-1.0, -0.25], [-1.0, 0.25]]]
    assert ax.containers[1].lines[0].get_markerfacecolor() == "white"


def test_a_name_is_not_written_over_the_next_point():
    names = ["scion", "adamw", "psgd"]
    table = pd.DataFrame({"optimizer": names, "x": [0.0, 0.1, 1.0], "y": [0.0, 0.05, 1.0], "x_half": 0.1})
    table["y_half"] = 0.1
    (ax,) = plots.centred_points(table, "x", "y", "a", "b").axes
    sides = {text.get_text(): (text.get_ha(), text.get_va()) for text in ax.texts}
    assert sides == {"Scion": ("right", "top"), "AdamW": ("left", "baseline"), "PSGD": ("left", "baseline")}


def test_paths_go_from_small_to_large_rates_and_count_what_is_outside():
    rates = pd.DataFrame({"lr": [0.4, 0.1, 0.2], "before": [3.2, 3.0, 3.1], "after": [9.0, 3.2, 3.3]})
    table = pd.concat([rates.assign(optimizer="adamw"), rates.assign(optimizer="muon", before=rates.before - 0.1)])
    (ax,) = plots.rate_paths(table.assign(size="s"), "a", "b").axes
    assert ax.get_lines()[0].get_xdata().tolist() == [3.0, 3.1, 3.2]
    areas = ax.collections[0].get_sizes()
    assert (np.diff(areas) > 0).all()
    assert ax.get_title() == "s (2 of 6 beyond the frame)" and ax.get_ylim()[1] < 9


def test_curves_along_training_have_their_band():
    table = pd.DataFrame({"size": "s", "optimizer": "adamw", "share": [0.5, 1.0], "mean": [0.1, 0.2]})
    (ax,) = plots.along_training(table.assign(low=[0.05, 0.1], high=0.3), "mean", "y", 0.8).axes
    assert ax.get_lines()[0].get_ydata().tolist() == [0.1, 0.2]
    band = ax.collections[0].get_paths()[0].vertices
    assert {0.05, 0.1, 0.3} <= set(band[:, 1])


@pytest.mark.parametrize("draw", [
    lambda rows: plots.ratio_forest(rows, "x"),
    lambda rows: plots.method_lines(rows, ("RTN",), "y"),
    lambda rows: plots.centred_points(rows, "x", "y", "a", "b"),
    lambda rows: plots.rate_paths(rows, "a", "b"),
    lambda rows: plots.along_training(rows, "mean", "y", 0.8),
])  # fmt: skip
def test_nothing_yet_is_said(draw):
    (ax,) = draw(pd.DataFrame()).axes
    assert " yet" in ax.texts[0].get_text()
