"""The command line of the claims: what it writes, what it shows, what it refuses."""

import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.claims import judge, read_rules
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
    read = pd.read_csv(results / "judged.csv", dtype={"runs": str}, keep_default_na=False, na_values={"value": ""})
    for column in ("optimizers", "id", "condition", "part", "verdict", "runs", "comment"):
        assert read[column].tolist() == table[column].tolist()
    assert read.value.tolist() == pytest.approx(table.value.tolist(), nan_ok=True)


def test_a_claim_is_shown_with_its_rule_and_rows_and_nothing_is_written(results, capsys):
    assert main(["claims", "C4", "--scale", "pocket"]) == 0
    said = capsys.readouterr().out
    row, rule = judge(Study("pocket"), ("C4",)).iloc[0], read_rules()["C4"]
    for text in (
        rule["statistic"],
        rule["paper"],
        row.verdict,
        row.comment,
        "03_ptq",
        f"n {row.runs}",
        rule["changes"],
    ):
        assert text in said
    for text in ("docs/rules.md#c", "pocket/03_w4a4_increase.png", "changes    "):
        assert text in said
    rows = Study("pocket").measured("ptq").query("checkpoint == 'common' and spec == 'W4A4+head'")
    assert all(f"{increase:.4g}" in said for increase in rows.increase) and len(rows) == 24
    assert {file.stem for file in results.iterdir()} <= set(TABLES)


def test_a_frozen_verdict_stands_below_the_one_of_today(capsys):
    assert main(["claims", "C1", "--scale", "laptop", "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert "rule       docs/rules.md#c" in said
    assert "then       undecided, 0.8333 [0.4365, 0.9699], n 6" in said


def test_rows_are_cut_and_it_says_so(results, capsys):
    main(["claims", "C4", "--scale", "pocket", "--rows", "5"])
    assert "... and 43 rows more" in capsys.readouterr().out
    main(["claims", "C4", "--scale", "pocket", "--rows", "0"])
    assert "rows more" not in capsys.readouterr().out


def test_every_claim_can_be_shown(results, capsys):
    for number in range(1, 15):
        assert main(["claims", f"C{number}", "--scale", "pocket", "--rows", "2"]) == 0
        assert "optimizer" in capsys.readouterr().out


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
