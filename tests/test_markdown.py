"""Tables of pandas in Markdown: cells, spans, captions, links."""

import pandas as pd
import pytest

from beyond_outliers.markdown import markdown_table


def html(table: pd.DataFrame) -> str:
    return table.style.to_html()


def test_a_table_keeps_its_cells_headings_and_caption():
    table = pd.DataFrame({"loss": [1.5, 2.0], "a|b": ["x", "y"]}, index=pd.Index(["p", "q"], name="size"))
    lines = markdown_table(table.style.set_caption("two runs").format(precision=2).to_html()).splitlines()
    assert lines[0] == "*two runs*"
    assert lines[2:] == ["| size | loss | a\\|b |", "| --- | --- | --- |", "| p | 1.50 | x |", "| q | 2.00 | y |"]


def test_a_number_that_is_not_there_is_a_dash():
    table = pd.DataFrame({"low": [0.5, float("nan")], "banana": ["nan", "nana"]})
    lines = markdown_table(table.style.hide(axis="index").format(precision=1).to_html()).splitlines()
    assert lines == ["| low | banana |", "| --- | --- |", "| 0.5 | - |", "| - | nana |"]


def test_spans_of_index_and_columns_come_out_in_their_own_columns():
    index = pd.MultiIndex.from_product([["0.1M", "0.2M"], ["muon", "soap"]], names=["size", "optimizer"])
    columns = pd.MultiIndex.from_product([["gain", "R"], ["mean", "std"]])
    table = pd.DataFrame([[i + 10 * j for j in range(4)] for i in range(4)], index=index, columns=columns)
    lines = markdown_table(html(table)).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["size", "optimizer", "gain mean", "gain std", "R mean", "R std"]
    assert rows[3] == ["", "soap", "1", "11", "21", "31"]
    assert rows[4] == ["0.2M", "muon", "2", "12", "22", "32"]


def test_a_pivoted_table_is_headed_by_its_index_and_labels():
    long = pd.DataFrame({"optimizer": ["muon"] * 2, "size": ["0.1M"] * 2, "seed": [200, 201], "loss": [3.0, 3.5]})
    table = long.pivot_table(index="optimizer", columns=["size", "seed"], values="loss")
    assert markdown_table(html(table)).splitlines()[0] == "| optimizer | 0.1M seed 200 | 0.1M seed 201 |"
    table = long.pivot_table(index=["seed", "size"], columns="optimizer", values="loss")
    assert markdown_table(html(table)).splitlines()[0] == "| seed | size | muon |"
    table = long.pivot_table(index="optimizer", columns=["size", "seed"], values="loss")
    hidden = markdown_table(table.style.hide(axis="index").to_html())
    assert hidden.splitlines()[0].count("0.1M") == 2 and "201" in hidden


def test_html_without_a_table_is_refused():
    with pytest.raises(ValueError, match="no table"):
        markdown_table("<p>none</p>")


def test_links_and_code_in_a_table_are_kept():
    table = pd.DataFrame({"a": ['<a href="../data/claims.toml#L3">rule</a>'], "b": ["<code>make test</code>"]})
    lines = markdown_table(table.style.hide(axis="index").to_html()).splitlines()
    assert lines[-1] == "| [rule](../data/claims.toml#L3) | `make test` |"


def test_a_table_without_rows_says_so():
    empty = pd.DataFrame(columns=["size", "optimizer"]).style.hide(axis="index").to_html()
    assert markdown_table(empty) == "*No rows yet (size, optimizer): nothing of this has been measured.*\n"
    nothing = pd.DataFrame({"size": [], "scheme": [], "x": []}).pivot_table(index="size", columns="scheme", values="x")
    assert "No rows yet" in markdown_table(nothing.style.to_html())
