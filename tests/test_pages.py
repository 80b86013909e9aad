"""Executed notebooks as Markdown pages: outputs rewritten, deterministic bytes, stale pages named."""

import itertools
import json
import sys

import nbformat
import pandas as pd
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbformat.v4 import new_code_cell

import faults
from beyond_outliers import checksums, pages, paths
from beyond_outliers.checksums import DamagedFile
from beyond_outliers.cli import main
from beyond_outliers.notebook import table as notebook_table
from beyond_outliers.study.verify import committed

TEXT = "# 1. Title\n\n**Question.** Who | what?\n\nsee [four](04_error_propagation.ipynb)"


def executed(*outputs, more=()):
    """Writes a notebook that put these out."""
    cells = [new_code_cell("secret = 1", outputs=[nbformat.from_dict(output)]) for output in outputs]
    path = pages.executed_notebook("smoke", "01_full_precision")
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(TEXT), *cells, *more]), path)


def shown(**data):
    return {"output_type": "display_data", "data": {k.replace("_", "/"): v for k, v in data.items()}, "metadata": {}}


def figure(name, caption="What to see."):
    output = shown(image_png="AAAA", text_plain=f"figure {name}")
    return {
        **output,
        "metadata": {"image/png": {"figure": name, "caption": caption, "alt": "What it shows.", "width": 700}},
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of the pages of committed tables; what notebooks drew lies in `paths.figures`."""
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    paths.figures("smoke").mkdir(parents=True)
    (tmp_path / "smoke").mkdir()
    return tmp_path / "smoke"


def drawn(name):
    for kind in ("png", "pdf"):
        (paths.figures("smoke") / f"{name}.{kind}").write_bytes(kind.encode())


def written(folder):
    return pages.write_page("smoke", "01_full_precision", folder)


def test_a_page_links_to_saved_figures_and_shows_no_code(folder):
    drawn("01_loss")
    noise = {"output_type": "stream", "name": "stderr", "text": "UserWarning"}
    executed(figure("01_loss"), noise)
    page = written(folder).read_text()
    assert (folder / "01_loss.pdf").read_bytes() == b"pdf" and (folder / "01_full_precision.html").exists()
    shown_so = '<img src="01_loss.png" width="700" alt="What it shows.">\n\n*What to see.*\n'
    assert shown_so in page and "AAAA" not in page
    assert "secret" not in page and "UserWarning" not in page
    assert "(04_error_propagation.md)" in page


@pytest.mark.parametrize(("output", "error", "message"), [
    (shown(image_png="AAAA", text_plain="<Figure>"), ValueError, r"without plots\.save"),
    (figure("01_gone"), FileNotFoundError, r"01_gone\.png"),
    (shown(text_markdown="\u03c1" * 400, text_plain=""), ValueError, r"has \d+ bytes, more than 800"),  # two bytes each
])  # fmt: skip
def test_unsaved_and_missing_figures_and_large_pages_are_refused(folder, monkeypatch, output, error, message):
    monkeypatch.setattr(pages, "LARGEST", 800)
    executed(output)
    with pytest.raises(error, match=message):
        written(folder)


def test_stale_missing_and_unknown_pages_are_named(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    (tmp_path / "results" / "smoke").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="make figures SCALE=smoke"):
        pages.check_pages("smoke", ["01_full_precision"])
    executed()
    written(folder)
    pages.check_pages("smoke", ["01_full_precision"])
    (tmp_path / "results" / "smoke" / "runs.csv").write_text("run\n")
    with pytest.raises(pages.StalePage, match="01_full_precision"):
        pages.check_pages("smoke", ["01_full_precision"])
    with pytest.raises(ValueError, match="unknown scale 'huge'"):
        pages.names_of("huge")


@pytest.mark.slow
@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_page_is_whole_or_old_after_a_fault(folder, kind):
    """At some changes of the disk; a torn file does not count as done."""
    drawn("01_loss")
    executed(figure("01_loss"))
    written(folder)
    whole = {file: file.read_bytes() for file in folder.iterdir() if file.suffix != ".html"}  # HTML has random ids
    for number in itertools.count(1 + faults.KINDS.index(kind), 3):
        for file in whole:
            file.write_bytes(b"old")
        code = faults.in_child(lambda: written(folder), faults.at_change(kind, number, folder))
        after = {file: file.read_bytes() for file in whole}
        torn = "tears" in kind and code == faults.DIED
        assert torn or all(content in (b"old", whole[file]) for file, content in after.items()), number
        assert code not in (0, faults.PASSED_BY) or after == whole, "silent"
        if code == 0:
            break
    assert number > 2 * len(whole)  # each is opened, then renamed


def test_damaged_and_unlisted_pages_are_named_with_their_remedy(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "none")
    drawn("01_loss")
    executed(figure("01_loss"))
    page = written(folder)
    checksums.seal(folder, checksums.PAGES)
    (folder / "01_full_precision.html").unlink()
    assert committed("smoke") == []
    for file in (page, folder / "01_loss.png"):
        whole = file.read_bytes()
        file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(DamagedFile, match=rf"{file.name} is damaged.*make figures SCALE=smoke"):
            pages.check_pages("smoke", ["01_full_precision"])
        (line,) = committed("smoke")
        assert f"{file.name} is damaged" in line and "make figures SCALE=smoke" in line
        file.write_bytes(whole)
    (folder / "02_mmr.png").write_bytes(b"png")
    (line,) = committed("smoke")
    assert "02_mmr.png is in no SHA256SUMS" in line


@pytest.mark.parametrize("scale", sorted(path.name for path in (paths.ROOT / "data" / "results").glob("[!.]*/")))
def test_every_committed_table_page_and_figure_is_what_was_written(scale):
    assert committed(scale) == []
    measured = (paths.RESULTS / scale / "ptq.csv").exists()  # a study that only tunes so far has no pages
    assert measured == (paths.ROOT / "figures" / scale / "SHA256SUMS").exists()


def test_committed_pages_are_small_and_lie_beside_what_they_show():
    committed = sorted((paths.ROOT / "figures").glob("[!.]*/*.md"))
    assert len(committed) > 20
    for page in committed:
        assert len(page.read_bytes()) <= pages.LARGEST, page
        figures = pages.SHOWN.findall(page.read_text())
        assert [figure for figure in figures if not (page.parent / f"{figure}.png").exists()] == [], page


def test_links_of_a_notebook_lead_somewhere_from_its_page():
    text = '[a](03_ptq.ipynb) [b](../data/README.md#terms) ![c](../figures/smoke/03_x.png) <a href="07_claims.ipynb">'
    expected = '[a](03_ptq.md) [b](../../data/README.md#terms) ![c](03_x.png) <a href="07_claims.md">'
    folder = paths.FIGURES / "smoke"
    assert pages.relinked(text, "smoke", folder, "md") == expected
    assert pages.relinked(expected, "smoke", folder, "md") == expected  # a link of a page is left alone
    assert pages.relinked('<a href="07_claims.ipynb">', "smoke", folder, "html") == '<a href="07_claims.html">'


def test_a_page_shows_code_of_worked_examples_alone_and_no_bar(folder):
    bar = shown(**{"application_vnd.jupyter.widget-view+json": {"model_id": "x"}, "text_plain": "50%"})
    text = nbformat.v4.new_output("stream", text="the versions")
    by_hand = new_code_cell("step = 1.9 / 7", metadata={"tags": ["by-hand"]})
    executed(bar, more=[by_hand, new_code_cell("begin()", metadata={"tags": ["setup"]}, outputs=[text])])
    page = written(folder)
    for shown_text in (page.read_text(), page.with_suffix(".html").read_text()):
        assert "the versions" not in shown_text and "secret" not in shown_text
    assert "50%" not in page.read_text() and "step = 1.9 / 7" in page.read_text()


def test_a_table_says_what_pandas_has():
    frame = pd.DataFrame({"size": ["a|b", "c"], "loss": [0.12345, float("nan")], "n": [3, 4]})
    lines = notebook_table(frame, 2, caption="losses").data.splitlines()
    cells = [[cell.strip(" |") for cell in line.split(" | ")] for line in lines]
    assert lines[0] == "*losses*" and cells[2] == ["size", "loss", "n"]
    assert cells[4:] == [["a\\|b", "0.12", "3"], ["c", "-", "4"]]
    wide = pd.DataFrame({("x", 0): [0.5], ("x", 1): [1.5]}, index=pd.Index(["k"], name="kind"))
    wide.columns.names = [None, "seed"]
    lines = notebook_table(wide, formats={"x seed 1": "{:.0%}"}, folded="all").data.splitlines()
    assert lines[0].startswith("<details><summary>all</summary>") and "x seed 0" in lines[2] and "150%" in lines[4]
    assert "nothing of this has been measured" in notebook_table(frame.iloc[:0]).data


@pytest.fixture
def one_page(folder, monkeypatch):
    monkeypatch.setattr(pages, "names_of", lambda scale: ["01_full_precision"])
    found = shown(text_markdown="**Finding.** Muon, 1.0 [0.9, 1.1] under W4A4 | n 3. More (n 2).", text_plain="")
    executed(found)
    return written(folder)


def test_the_index_has_a_row_per_page_with_the_first_sentence_of_its_finding(one_page):
    index = pages.write_index("smoke").read_text()
    row = "| [1. Title](01_full_precision.md) | Muon, 1.0 [0.9, 1.1] under W4A4 \\| n 3. |"
    assert row in index.splitlines()
    assert "[W4A4](../../docs/terms.md#w4a4): weights and activations" in index
    assert pages.write_index("smoke").read_text() == index


def test_an_index_of_missing_or_mute_pages_is_refused(one_page):
    one_page.write_text(one_page.read_text().replace("**Finding.**", ""))
    with pytest.raises(ValueError, match=r"01_full_precision\.md has no paragraph that begins with \*\*Finding"):
        pages.write_index("smoke")
    one_page.unlink()
    with pytest.raises(FileNotFoundError, match="make figures SCALE=smoke"):
        pages.write_index("smoke")


def test_pages_are_checked_from_the_shell(one_page, capsys):
    assert main(["pages", "check", "--scale", "smoke"]) == 0
    assert "1 pages of scale smoke are up to date" in capsys.readouterr().out
    one_page.write_text(one_page.read_text().replace("made from ", "made from 0"))
    with pytest.raises(SystemExit) as left:
        main(["pages", "check", "--scale", "smoke"])
    assert left.value.code == 1 and "make figures SCALE=smoke" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["pages", "check", "--scale", "huge"])
    assert "huge" in capsys.readouterr().err


def test_decisions_are_put_between_their_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "decisions", lambda scale: f"{pages.BEGIN.format(scale=scale)}\n- new\n{pages.END}")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{pages.BEGIN.format(scale='laptop')}\n- old\n{pages.END}\nafter\n")
    pages.write_decisions(readme, "laptop")
    assert readme.read_text() == f"before\n{pages.BEGIN.format(scale='laptop')}\n- new\n{pages.END}\nafter\n"
    with pytest.raises(ValueError, match="lacks the lines"):
        pages.write_decisions(readme, "pocket")


def test_kernels_are_of_this_python_whatever_jupyter_finds_first(tmp_path, monkeypatch):
    """A cluster's JUPYTER_PATH often has a python3 of another environment."""
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {"argv": ["/usr/bin/false", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert AsyncKernelManager(kernel_name="python3").kernel_spec.argv[0] == "/usr/bin/false"
    assert pages.ThisPython(kernel_name="python3").format_kernel_cmd()[0] == sys.executable
