"""A study's own tables: where they are read from and written to, what they begin with, and how they are published."""

import shutil

import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.cli import main
from beyond_outliers.study import MissingResults, Study, collect
from beyond_outliers.study.publish import publish, take_up
from repository import repository_of_pocket

COMMITTED = paths.RESULTS / "pocket"


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.csv"))}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose committed tables are those of pocket, and which nobody has run anything in."""
    return repository_of_pocket(tmp_path, monkeypatch)


@pytest.fixture
def committed(repository):
    return repository / "results" / "pocket"


def change(folder, add=0.5, rows=3):
    """As if the first runs had come out otherwise; returns their names."""
    table = pd.read_csv(folder / "runs.csv")
    table.loc[: rows - 1, "val_loss"] += add
    table.to_csv(folder / "runs.csv", index=False)
    return list(table.run[:rows])


def test_a_clone_reads_the_committed_tables(committed):
    assert paths.results("pocket") == committed == Study("pocket").results
    assert paths.pages("pocket") == paths.FIGURES / "pocket" != paths.figures("pocket")
    assert paths.way_up(paths.pages("pocket")) == "../.."


def test_what_a_study_writes_goes_beside_the_committed_tables(committed):
    before = bytes_of(committed)
    study = Study("pocket")
    folder = take_up(study)
    assert folder == study.results == paths.results("pocket") == paths.RUNS / "pocket" / "results"
    assert paths.pages("pocket") == paths.RUNS / "pocket" / "figures" == paths.figures("pocket")
    assert paths.way_up(paths.pages("pocket")) == "../../../.."
    # it begins with the committed rows, but for verdicts, which would be on other rows soon
    assert bytes_of(folder) == {name: of for name, of in before.items() if name not in ("claims.csv", "judged.csv")}
    change(folder)
    assert Study("pocket").table("runs").val_loss[0] != pd.read_csv(committed / "runs.csv").val_loss[0]
    assert take_up(Study("pocket")) == folder and bytes_of(committed) == before  # nothing is begun a second time
    assert Study("pocket").table("runs").val_loss[0] != pd.read_csv(committed / "runs.csv").val_loss[0]


def test_collecting_changes_no_committed_table(committed, monkeypatch):
    before, study = bytes_of(committed), Study("pocket")
    monkeypatch.setattr(Study, "result", lambda *_: None)
    study.collect()
    assert study.results == paths.own_results("pocket") and bytes_of(committed) == before
    assert set(study.table("runs").run) <= set(pd.read_csv(committed / "runs.csv").run)


def test_rows_that_others_committed_since_are_taken_up_when_a_study_goes_on(committed):
    study = Study("pocket")
    folder = take_up(study)
    mine = change(folder)
    runs = pd.read_csv(folder / "runs.csv")
    runs[runs.run != runs.run.iloc[-1]].to_csv(folder / "runs.csv", index=False)  # committed after this study began
    collect.merge(study, committed)
    after = study.table("runs").set_index("run").val_loss
    theirs = pd.read_csv(committed / "runs.csv").set_index("run").val_loss
    assert set(after.index) == set(theirs.index)
    assert {run for run in theirs.index if after[run] != pytest.approx(theirs[run])} == set(mine)


def judged(folder):
    shutil.copyfile(COMMITTED / "judged.csv", folder / "judged.csv")


def test_publishing_moves_the_tables_and_says_what_it_replaces(committed, monkeypatch):
    folder = take_up(Study("pocket"))
    change(folder, rows=3)
    judged(folder)
    mine = bytes_of(folder) | {"claims.csv": (committed / "claims.csv").read_bytes()}  # frozen: it stays
    monkeypatch.setattr(Study, "complete", lambda self: True)
    said = publish(Study("pocket"))
    n = len(pd.read_csv(COMMITTED / "runs.csv"))
    assert f"{n} runs, {n - 3} of them with the loss that was there, 0 new; 0 that" in said
    assert "make figures SCALE=pocket" in said
    after = bytes_of(committed)
    assert (
        {name: after[name] for name in mine if name != "SHA256SUMS"}
        == {name: mine[name] for name in mine if name != "SHA256SUMS"}
        and not folder.exists()
        and paths.results("pocket") == committed
    )


def test_incomplete_tables_are_published_only_when_told(committed, capsys):
    before, folder = bytes_of(committed), take_up(Study("pocket"))
    table = pd.read_csv(folder / "runs.csv")
    gone = table[table.purpose == "qat"].run.iloc[0]
    table[table.run != gone].to_csv(folder / "runs.csv", index=False)
    judged(folder)
    with pytest.raises(SystemExit) as stopped:
        main(["publish", "--scale", "pocket"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and bytes_of(committed) == before
    assert gone in said and "make reproduce SCALE=pocket" in said and "PARTIAL=1" in said
    assert main(["publish", "--scale", "pocket", "--partial"]) == 0
    assert "1 that were there are gone" in capsys.readouterr().out
    assert gone not in set(pd.read_csv(committed / "runs.csv").run)


def test_tables_without_verdicts_are_not_published(committed, monkeypatch):
    take_up(Study("pocket"))
    monkeypatch.setattr(Study, "complete", lambda self: True)
    with pytest.raises(ValueError, match=r"lacks judged\.csv: run `beyond-outliers claims --scale pocket`"):
        publish(Study("pocket"), partial=True)


def test_nothing_of_ones_own_cannot_be_published(committed):
    with pytest.raises(MissingResults, match="make reproduce SCALE=pocket"):
        publish(Study("pocket"))
