"""Tables come back from their files as they were written: texts that look like numbers, and all committed ones."""

import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.study import Study, collect
from beyond_outliers.study.tables import TABLES, TEXT, read_table

LOOK_LIKE_NUMBERS = ("3e99999999", "0007", "1_000", "+5", "0.10", "inf", "True", "0x1f", "2026-12-01")


@pytest.mark.parametrize("text", LOOK_LIKE_NUMBERS)
def test_a_text_stays_the_text_that_it_was(tmp_path, text):
    file = tmp_path / "table.csv"
    file.write_text(f"{','.join([*TEXT, 'val_loss'])}\n{','.join([text] * len(TEXT))},0.1\n")
    (row,) = read_table(file).to_dict("records")
    assert row == {**dict.fromkeys(TEXT, text), "val_loss": 0.1}


def test_a_table_that_is_written_again_keeps_its_texts(tmp_path):
    for run in ("first", "second"):  # the second call takes over the row of the first
        row = {"run": run, "run_id": "00e1", "size": "1.10", "commit": "7e7777777", "python": "3.10", "val_loss": 0.5}
        collect._write(Study("smoke", tmp_path), "runs", [pd.DataFrame([row])], {"first", "second"})
    rows = [line.split(",") for line in (tmp_path / "runs.csv").read_text().splitlines()]
    assert (
        rows[0][1:] == list(row)[1:] and [r[1:] for r in rows[1:]] == [["00e1", "1.10", "7e7777777", "3.10", "0.5"]] * 2
    )


@pytest.mark.parametrize(
    "file", sorted(paths.RESULTS.glob("[!.]*/*.csv")), ids=lambda file: f"{file.parent.name}-{file.stem}"
)
def test_every_committed_table_comes_back_byte_by_byte(file):
    if file.stem not in TABLES:
        pytest.skip("a table of verdicts")
    if file.stat().st_size > 4e6:
        pytest.skip("large; its columns are those of smaller scales")
    assert read_table(file).to_csv(index=False).encode() == file.read_bytes()
