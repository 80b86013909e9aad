"""The command line of the claims: what it writes, what it shows, what it refuses."""

import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.claims import CLAIMS, judge, read_rules, read_verdicts
from beyond_outliers.cli import main
from beyond_outliers.study import TABLES, Study


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The tables of scale pocket in a folder of their own, without verdicts."""
    folder = tmp_path / "pocket"
    folder.mkdir()
    for file in (paths.RESULTS / "pocket").glob("*.csv"):
        if file.stem in TABLES:
            (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    return folder


def test_the_verdicts_are_written_by_the_command_alone(results, capsys):
    table = judge(Study("pocket"))
    assert not (results / "judged.csv").exists()
    assert main(["claims", "--scale", "pocket"]) == 0
    assert capsys.readouterr().out.strip() == str(results / "judged.csv")
    pd.testing.assert_frame_equal(read_verdicts(Study("pocket")), table, check_dtype=False)


def test_a_claim_is_shown_with_its_rule_and_rows_and_nothing_is_written(results, capsys):
    assert main(["claims", "C4", "--scale", "pocket", "--rows", "0"]) == 0
    said = capsys.readouterr().out
    row, rule = judge(Study("pocket"), ("C4",)).iloc[0], read_rules()["C4"]
    told = [row.verdict, row.comment, f"n {row.runs}", "docs/rules.md#c", "pocket/03_w4a4_increase.png", "03_ptq"]
    told += [rule["statistic"], rule["paper"], rule["changes"]]
    rows = Study("pocket").measured("ptq").query("checkpoint == 'common' and spec == 'W4A4+head'")
    told += [f"{increase:.4g}" for increase in rows.increase]
    assert [text for text in told if text not in said] == [] and len(rows) == 24 and "rows more" not in said
    assert {file.stem for file in results.iterdir()} <= set(TABLES)


def test_a_frozen_verdict_stands_below_the_one_of_today(capsys):
    assert main(["claims", "C1", "--scale", "laptop", "--rows", "1"]) == 0
    assert "then       undecided, 0.8333 [0.4365, 0.9699], n 6" in capsys.readouterr().out


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_claim_can_be_shown_and_rows_are_cut(results, capsys, claim):
    assert main(["claims", claim, "--scale", "pocket", "--rows", "2"]) == 0
    said = capsys.readouterr().out
    assert "optimizer" in said and ("rows more (--rows 0: all)" in said) == (claim != "C9")  # which has none there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["C15", "--scale", "pocket"], "unknown claim 'C15'; valid: "),
        (["write", "C4", "--scale", "pocket"], "C4"),
        (["--scale", "pokcet"], "pocket"),
        (["--scale", "laptop"], "make reproduce SCALE=laptop"),
    ],
)
def test_bad_arguments_are_refused(results, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["claims", *arguments])
    assert stopped.value.code != 0 and message in capsys.readouterr().err
    assert not (results.parent / "laptop").exists()
