"""Your runs and the committed ones: every run and verdict counted once, and nothing but your folder written."""

import numpy as np
import pandas as pd
import pytest

from beyond_outliers import paths, reproduction
from beyond_outliers.cli import say_where
from beyond_outliers.study import MissingResults, Study
from beyond_outliers.study.publish import take_up
from made_up_runs import table
from repository import repository_of_pocket

COLUMNS = "run purpose size optimizer seed scheme lr val_loss"
OURS = table(
    COLUMNS,
    ("a", "sweep", "s", "muon", 0, "none", 0.1, 3.0),
    ("b", "full_precision", "s", "muon", 0, "none", 0.2, 2.0),
    ("c", "qat", "s", "muon", 0, "quest", 0.2, 2.5),
    ("d", "sweep+full_precision", "s", "soap", 0, "none", 0.3, 2.1),
    ("e", "full_precision", "s", "adamw", 0, "none", 0.3, np.nan),
    ("f", "full_precision", "s", "adamw", 1, "none", 0.3, 4.0),
)


def test_runs_are_compared_by_name_then_by_what_they_are():
    mine = table(
        COLUMNS,
        ("a", "sweep", "s", "muon", 0, "none", 0.1, np.nextafter(3.0, 4)),  # the last bit
        ("B", "full_precision", "s", "muon", 0, "none", 0.21, 2.25),  # its sweep chose otherwise
        ("c", "qat", "s", "muon", 0, "quest", 0.2, 2.5),
        ("x", "sweep", "s", "soap", 0, "none", 0.5, 2.0),  # a rate that was not tried: no main run stands in for it
        ("e", "full_precision", "s", "adamw", 0, "none", 0.3, np.nan),
        ("f", "full_precision", "s", "adamw", 1, "none", 0.3, np.nan),
    )
    found = reproduction.compare_runs(mine, OURS).set_index("run")
    same, other, none = reproduction.SAME_RATE, reproduction.OTHER_RATE, reproduction.NOT_COMMITTED
    assert list(found.match) == [same, other, same, none, same, same]
    assert list(found.same) == [False, False, True, False, True, False]
    assert found.difference["B"] == 0.25 and found.difference["c"] == 0 and 0 < found.difference["a"] < 1e-14
    assert found.difference[["x", "e", "f"]].isna().all()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The committed tables of pocket, and a study of one's own that made its full-precision runs again."""
    return repository_of_pocket(tmp_path, monkeypatch)


def made(monkeypatch, study, losses):
    """As if the full-precision runs had ended here, with these changes of their losses."""
    runs = study.table("runs")
    names = list(study.runs("full_precision").run)
    monkeypatch.setattr(Study, "result", lambda self, p: True if p.config.name in names else None)
    for place, add in losses.items():
        runs.loc[runs.run == names[place], "val_loss"] += add
    runs.to_csv(study.results / "runs.csv", index=False)
    return names


def test_the_comparison_is_printed_and_written_beside_ones_own_figures(repository, monkeypatch, capsys):
    study = Study("pocket")
    take_up(study)
    names = made(monkeypatch, study, {0: 0.25, 1: -0.5})
    committed = {file: file.read_bytes() for file in (repository / "results").rglob("*.csv")}
    say_where(Study("pocket"))
    said = capsys.readouterr().out
    assert f"Of {len(names)} runs made here, {len(names) - 2} end at the committed loss to the last digit" in said
    assert f"0.5000 at most ({names[1]})" in said and "of 14 verdicts agree" in said
    file = paths.RUNS / "pocket" / "figures" / "comparison.md"
    page = file.read_text()
    assert "](../../../../docs/reproducibility.md)" in page
    assert [words in page for words in (*names[:2], "| C14 ", names[2])] == [
        True,
        True,
        True,
        False,
    ]  # agree: not listed
    assert not paths.FIGURES.exists() and committed == {f: f.read_bytes() for f in committed}
    reproduction.write("pocket")
    assert file.read_text() == page


def test_a_verdict_that_differs_is_named(repository, monkeypatch):
    study = Study("pocket")
    take_up(study)
    made(monkeypatch, study, {})
    verdicts = pd.read_csv(repository / "results" / "pocket" / "judged.csv")
    verdicts.loc[verdicts.id == "C4", "verdict"] = "tie"
    verdicts.to_csv(study.results / "judged.csv", index=False)
    said = reproduction.write("pocket")
    assert "13 of 14 verdicts agree: not C4 (tie; committed reproduced)" in said


def test_without_runs_of_ones_own_it_says_so(repository, capsys):
    say_where(Study("pocket"))
    assert "make reproduce SCALE=pocket" in capsys.readouterr().out
    take_up(Study("pocket"))
    with pytest.raises(MissingResults, match="no run of scale pocket was made here"):
        reproduction.write("pocket")
    with pytest.raises(MissingResults, match="nothing is committed of scale smoke"):
        reproduction.write("smoke")
