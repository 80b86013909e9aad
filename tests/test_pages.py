"""Executed notebooks as Markdown pages: outputs rewritten, deterministic bytes, stale pages named."""

import nbformat
import pandas as pd
import pytest

from beyond_outliers import pages, paths


def html(table: pd.DataFrame) -> str:
    return table.style.to_html()


def test_a_table_keeps_its_cells_headings_and_caption():
    table = pd.DataFrame({"loss": [1.5, 2.0], "a|b": ["x", "y"]}, index=pd.Index(["p", "q"], name="size"))
    lines = pages.markdown_table(table.style.set_caption("two runs").format(precision=2).to_html()).splitlines()
    assert lines[0] == "*two runs*"
    assert lines[2:] == ["| size | loss | a\\|b |", "| --- | --- | --- |", "| p | 1.50 | x |", "| q | 2.00 | y |"]


def test_spans_of_index_and_columns_come_out_in_their_own_columns():
    index = pd.MultiIndex.from_product([["0.1M", "0.2M"], ["muon", "soap"]], names=["size", "optimizer"])
    columns = pd.MultiIndex.from_product([["gain", "R"], ["mean", "std"]])
    table = pd.DataFrame([[i + 10 * j for j in range(4)] for i in range(4)], index=index, columns=columns)
    lines = pages.markdown_table(html(table)).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["size", "optimizer", "gain mean", "gain std", "R mean", "R std"]
    assert rows[3] == ["", "soap", "1", "11", "21", "31"]
    assert rows[4] == ["0.2M", "muon", "2", "12", "22", "32"]


def test_html_without_a_table_is_refused():
    with pytest.raises(ValueError, match="no table"):
        pages.markdown_table("<p>none</p>")


def executed(tmp_path, *outputs):
    cells = [nbformat.v4.new_markdown_cell("# 1. Title\n\nsee [four](04_error_propagation.ipynb)")]
    cells += [nbformat.v4.new_code_cell("secret = 1", outputs=[nbformat.from_dict(output)]) for output in outputs]
    path = tmp_path / "executed.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def shown(**data):
    return {"output_type": "display_data", "data": {k.replace("_", "/"): v for k, v in data.items()}, "metadata": {}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    (tmp_path / "smoke").mkdir()
    return tmp_path / "smoke"


def test_a_page_links_to_saved_figures_and_shows_no_code(tmp_path, folder):
    (folder / "01_loss.png").write_bytes(b"png")
    noise = {"output_type": "stream", "name": "stderr", "text": "UserWarning"}
    source = executed(tmp_path, shown(image_png="AAAA", text_plain="figure 01_loss"), noise)
    page = pages.write_page(source, "smoke", "01_full_precision").read_text()
    assert "![01_loss](01_loss.png)" in page and "AAAA" not in page
    assert "secret" not in page and "UserWarning" not in page
    assert "(04_error_propagation.md)" in page


def test_the_same_notebook_gives_the_same_bytes(tmp_path, folder):
    source = executed(tmp_path, shown(text_html=html(pd.DataFrame({"x": [1]})), text_plain="x"))
    first = pages.write_page(source, "smoke", "01_full_precision").read_bytes()
    again = executed(tmp_path, shown(text_html=html(pd.DataFrame({"x": [1]})), text_plain="x"))  # another Styler id
    assert pages.write_page(again, "smoke", "01_full_precision").read_bytes() == first


def test_unsaved_and_missing_figures_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"without plots\.save"):
        pages.write_page(
            executed(tmp_path, shown(image_png="AAAA", text_plain="<Figure>")), "smoke", "01_full_precision"
        )
    with pytest.raises(ValueError, match=r"01_gone\.png"):
        pages.write_page(executed(tmp_path, shown(text_plain="figure 01_gone")), "smoke", "01_full_precision")


def test_stale_missing_and_unknown_pages_are_named(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    (tmp_path / "results" / "smoke").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="make figures SCALE=smoke"):
        pages.check_pages("smoke", ["01_full_precision"])
    pages.write_page(executed(tmp_path), "smoke", "01_full_precision")
    pages.check_pages("smoke", ["01_full_precision"])
    (tmp_path / "results" / "smoke" / "runs.csv").write_text("run\n")
    with pytest.raises(pages.StalePage, match="01_full_precision"):
        pages.check_pages("smoke", ["01_full_precision"])
    with pytest.raises(ValueError, match="unknown scale 'huge'"):
        pages.check_pages("huge", [])
