"""Drawing from the committed tables: the same bytes twice, and what cannot be drawn is named."""

import pytest

from beyond_outliers import pages, paths
from beyond_outliers.cli import main
from beyond_outliers.notebook import run_notebook


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a notebook of scale pocket into a folder of its own, and returns name -> bytes of what that gave."""

    monkeypatch.setattr(pages, "write_index", lambda scale: None)  # of pages that are not drawn here

    def draw(name, folder):
        output = tmp_path / folder
        monkeypatch.setenv("BEYOND_OUTLIERS_OUTPUT", str(output))  # of the notebook's kernel
        monkeypatch.setattr(paths, "FIGURES", output / "figures")
        monkeypatch.setattr(paths, "RUNS", output / "data" / "runs")
        run_notebook(name, "pocket", build=False)
        assert not paths.FIGURES.exists(), "only `make figures` draws there"
        pages.publish("pocket", [name])
        found = {file.name: file.read_bytes() for file in (output / "figures" / "pocket").iterdir()}
        return {name: of for name, of in found.items() if not name.endswith(".html")}

    return draw


@pytest.mark.slow
def test_pages_and_figures_come_out_the_same_byte_for_byte(drawn):
    first, second = drawn("05_qat", "first"), drawn("05_qat", "second")
    assert {"05_qat.md", "05_increase.png", "05_curves.pdf"} <= set(first)
    assert [name for name in first if first[name] != second[name]] == [] and set(first) == set(second)


def test_where_pages_cannot_be_written_it_is_said_at_once(tmp_path, monkeypatch, capsys):
    """The superuser may write everywhere, so the system's answer is made up."""
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(SystemExit) as stopped:
        main(["figures", "--scale", "pocket"])
    assert stopped.value.code == 1 and "set BEYOND_OUTLIERS_OUTPUT to a folder that can be" in capsys.readouterr().err


def test_a_scale_without_tables_is_named_with_the_command_that_makes_them(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["figures", "--scale", "gpu"])
    assert stopped.value.code == 1 and "make reproduce SCALE=gpu" in capsys.readouterr().err
