"""Figures: what is drawn is what the table says, nothing yet is said, and one theme rules them all."""

import itertools
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from beyond_outliers import paths, plots
from beyond_outliers.config import OPTIMIZER_NAMES
from made_up_runs import table

NAN = float("nan")


def texts(found):
    return [text.get_text() for text in found]


# ------------------------------------------------------------------------------------------------------------- curves


@pytest.fixture
def sweep():
    rows = itertools.product(("s", "m", "l", "xl", "xxl"), OPTIMIZER_NAMES, (0, 1), (0.1, 0.2, 0.4))
    rows = table("size optimizer seed lr", *rows).query("size != 'xxl' or optimizer == 'adamw'")  # it has hardly begun
    return rows.assign(val_loss=3 + rows.seed + rows.lr)


def draw(sweep):
    return plots.optimizer_lines(sweep, "lr", "val_loss", "size", "learning rate", "loss", logx=True)


def test_lines_of_a_large_study(sweep):
    """A telephone's width holds the panels, and colour alone names no optimizer."""
    figure = draw(sweep)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) == 5 and figure.get_size_inches()[0] < 6.7
    assert [bool(ax.get_ylabel()) for ax in shown] == [True, False, True, False, True]
    lines = shown[0].get_lines()
    assert len(lines) == len(OPTIMIZER_NAMES)
    assert all(len(set(line.get_xdata())) == len(line.get_xdata()) == 3 for line in lines)
    styles = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(styles) == len(OPTIMIZER_NAMES) == len({marker for _, marker in styles})


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The bytes of a figure, as `plots.save` writes it."""
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    return lambda figure: plots.save(figure, "smoke", "a_figure").path.read_bytes()


@pytest.mark.parametrize("settings", [{"text.usetex": True}, {"axes.titlesize": 30, "lines.linestyle": "--"}])
def test_a_matplotlibrc_changes_no_figure(sweep, drawn, settings):
    ours = drawn(draw(sweep))
    plt.rcParams.update(settings)
    assert drawn(draw(sweep)) == ours


def test_fits_of_another_processor_draw_the_same_curves(drawn):
    """Their last digits differ; committed figures must not."""

    def fits(difference):
        law = SimpleNamespace(rho={16: 1.0, 4: 0.8}, predict=lambda n, bits: 40 * n**-0.2 + difference)
        runs = table("optimizer N bits loss", ("muon", 1e5, 16, 3.0), ("muon", 2e5, 4, 2.9))
        return drawn(plots.scaling_fits(runs, {"muon": law}))

    assert fits(0.0) == fits(1e-9) != fits(0.1)


def test_the_size_of_points_is_explained():
    runs = table("size optimizer mmr increase", ("s", "adamw", 1, 1), ("s", "adamw", 2, 2), ("m", "adamw", 3, 3))
    row = table("target candidate pearson pearson_low pearson_high n", ("increase", "mmr", 1, 1, 1, 3))
    (legend,) = plots.candidate_scatter(runs, row, "increase", "loss").legends
    assert texts(legend.get_texts()) == ["AdamW", "s", "m"]


def test_paths_go_from_small_to_large_rates_and_count_what_is_outside():
    rates = table("lr before after", (0.4, 3.2, 9.0), (0.1, 3.0, 3.2), (0.2, 3.1, 3.3))
    both = pd.concat([rates.assign(optimizer="adamw"), rates.assign(optimizer="muon", before=rates.before - 0.1)])
    (ax,) = plots.rate_paths(both.assign(size="s"), "a", "b").axes
    assert ax.get_lines()[0].get_xdata().tolist() == [3.0, 3.1, 3.2]
    assert (np.diff(ax.collections[0].get_sizes()) > 0).all()
    assert ax.get_title() == "s (2 of 6 beyond the frame)" and ax.get_ylim()[1] < 9
    assert {*texts(ax.texts)} == {"+0.20", "+0.25", "+0.30"}  # damages 0.2, 0.3 of each


def test_curves_along_training_have_their_band():
    curve = table(
        "size optimizer share mean low high", ("s", "adamw", 0.5, 0.1, 0.05, 0.3), ("s", "adamw", 1, 0.2, 0.1, 0.3)
    )
    (ax,) = plots.along_training(curve, "mean", "y", 0.8).axes
    assert ax.get_lines()[0].get_ydata().tolist() == [0.1, 0.2]
    assert {0.05, 0.1, 0.3} <= set(ax.collections[0].get_paths()[0].vertices[:, 1])


# ---------------------------------------------------------------------------------------------------------- intervals

RATIOS = table(
    "size optimizer ratio low high n",
    ("s", "adamw", 1.0, NAN, NAN, 3),
    ("s", "muon", 2.0, 1.5, 3.0, 3),
    ("m", "adamw", 1.0, NAN, NAN, 1),
    ("m", "muon", 0.5, NAN, NAN, 1),
)


def arms(container):
    """Both ends of every horizontal or vertical error bar of a container."""
    return [segment.tolist() for bars in container.lines[2] for segment in bars.get_segments()]


def fill(container):
    return container.lines[0].get_markerfacecolor()


def test_a_forest_draws_every_interval_and_hollow_points_without_one():
    small, medium = plots.ratio_forest(RATIOS, "x").axes
    muon = small.containers[1]
    assert arms(muon) == [[[1.5, 1.0], [3.0, 1.0]]] and fill(muon) == plots.COLOURS["muon"]
    assert fill(medium.containers[1]) == "white" != fill(small.containers[0])  # the reference itself is known
    assert texts(small.get_yticklabels()) == ["AdamW", "Muon"]
    assert small.get_title() == "s, n 3" and small.get_xscale() == "log"


def test_effects_have_a_panel_each_and_what_is_missing_is_named():
    effects = table(
        "quantity optimizer effect low high n over",
        ("loss", "muon", -0.5, -1.0, 0.25, 6, "s"),
        ("mmr", "muon", 0.5, NAN, NAN, 2, "s"),
        ("loss", "soap", 0.3, 0.2, 0.4, 5, "s"),
    )
    titles = {"loss": ("loss", "nats"), "qat": ("by QAT", "nats"), "mmr": ("MMR", "times")}
    figure = plots.effect_forest(effects, titles)
    loss, ratio = figure.axes
    assert arms(loss.containers[0]) == [[[-1.0, 0.0], [0.25, 0.0]]] and len(loss.containers) == 2
    assert (loss.get_title(), loss.get_xlabel()) == ("loss", "nats above AdamW; s, n 5 to 6")
    assert figure.get_supxlabel() == "not measured yet: by QAT"
    assert ratio.get_xscale() == "log" and ratio.get_xlabel() == "times AdamW; s, n 2"
    assert fill(ratio.containers[0]) == "white"
    assert texts(loss.get_yticklabels()) == ["Muon", "SOAP"]


def test_points_carry_both_intervals_and_no_name_is_written_over_the_next_one():
    places = table(
        "optimizer x y x_half y_half",
        ("scion", 0.0, 0.0, 0.5, 0.25),
        ("adamw", 0.1, 0.05, 0.5, NAN),
        ("psgd", 1.0, 1.0, 0.5, 0.5),
    )
    (ax,) = plots.centred_points(places, "x", "y", "a", "b").axes
    assert arms(ax.containers[0]) == [[[-0.5, 0.0], [0.5, 0.0]], [[0.0, -0.25], [0.0, 0.25]]]
    assert fill(ax.containers[1]) == "white"
    sides = {text.get_text(): (text.get_ha(), text.get_va()) for text in ax.texts}
    assert sides == {"Scion": ("right", "top"), "AdamW": ("left", "baseline"), "PSGD": ("left", "baseline")}


@pytest.mark.parametrize("draw", [
    lambda rows: plots.ratio_forest(rows, "x"),
    lambda rows: plots.centred_points(rows, "x", "y", "a", "b"),
    lambda rows: plots.rate_paths(rows, "a", "b"),
    lambda rows: plots.along_training(rows, "mean", "y", 0.8),
])  # fmt: skip
def test_nothing_yet_is_said(draw):
    (ax,) = draw(pd.DataFrame()).axes
    assert " yet" in ax.texts[0].get_text()


# ----------------------------------------------------------------------------------------------------------- verdicts


def test_a_scorecard_has_a_cell_per_verdict_and_gaps():
    claims = pd.Series({"C1": "First", "C8": "Second " * 30})
    (ax,) = plots.scorecard(pd.DataFrame({"six": {"C1": "tie", "C8": "reproduced"}, "then": {"C8": NAN}}), claims).axes
    assert texts(ax.texts) == ["tie", "yes"] and len(ax.patches) == 2


def test_places_are_of_the_sizes_that_every_method_has():
    rows = [("s", "muon", "RTN", 3), ("s", "soap", "RTN", 2), ("s", "muon", "GPTQ", 1), ("s", "soap", "GPTQ", 2)]
    rows += [("m", "muon", "RTN", 0), ("m", "soap", "RTN", 9)]  # without GPTQ
    (ax,) = plots.rank_lines(table("size optimizer method val_loss", *rows).assign(format="int4"), ("RTN", "GPTQ")).axes
    assert {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()} == {"Muon": [2, 1], "SOAP": [1, 2]}
    assert texts(ax.texts) == ["Muon", "SOAP"]  # at the lines' ends


def test_names_at_the_ends_of_curves_keep_apart(sweep):
    figure = plots.optimizer_lines(sweep, "lr", "val_loss", "size", "x", "y")
    names = figure.axes[0].texts
    heights = [text.xy[1] for text in names]
    assert sorted(texts(names)) == sorted(plots.LABELS[name] for name in OPTIMIZER_NAMES)
    assert np.diff(heights).max() < -0.07


def test_points_show_the_mean_as_a_number():
    runs = table("size optimizer loss", ("s", "muon", 1), ("s", "muon", 3), ("s", "adamw", 3))
    (ax,) = plots.optimizer_points(runs, "loss", "size", "loss").axes
    assert texts(ax.texts) == ["3.00", "2.00"]


def test_shares_name_the_modules_that_add_an_error():
    modules = table("index name optimizer R A B C", (0, "norm", "muon", 1, 1, 0, 0), (1, "up", "muon", 2, 1, 1.5, -0.5))
    (ax,) = plots.stacked_abc(modules, "a title").axes
    assert texts(ax.get_yticklabels()) == ["up"]
    assert [bar.get_width() for bar in ax.patches] == [0.5, 0.75] and list(ax.get_lines()[0].get_xdata()) == [-0.25]


def test_who_cannot_see_a_figure_is_told_its_axes(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    shown = plots.save(draw(sweep), "smoke", "a_figure").shown
    assert shown["alt"] == "Panels: s, m, l, xl, xxl. Across: learning rate. Up: loss."
