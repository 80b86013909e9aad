"""Figures of studies that are larger, or less complete, than pocket."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from beyond_outliers import paths, plots
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
        runs = pd.DataFrame({"optimizer": "muon", "N": [1e5, 2e5], "bits": [16, 4], "loss": [3.0, 2.9]})
        return drawn(plots.scaling_fits(runs, {"muon": law}))

    assert fits(0.0) == fits(1e-9) != fits(0.1)


def test_two_runs_alike_are_labelled_by_colour_and_marker(sweep):
    """Colour alone would not do in print, nor for everybody."""
    lines = shown(draw(sweep))[0].get_lines()
    styles = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(styles) == len(OPTIMIZER_NAMES) == len({marker for _, marker in styles})
