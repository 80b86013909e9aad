"""Every notebook at scale smoke: it runs, draws its figures and shows what the tables say."""

import html
import json
import re

import pandas as pd
import papermill
import pytest

from beyond_outliers import checksums, pages, paths
from beyond_outliers import notebook as notebook_module
from beyond_outliers.claims import CLAIMS, judged, read_rules
from beyond_outliers.claims.rules import VERDICTS
from beyond_outliers.claims.verdicts import write_verdicts
from beyond_outliers.notebook import notebooks, paper, render, run_notebook

pytestmark = pytest.mark.slow


def contents(folder) -> dict:
    """path -> (time of the last change, bytes) of every file below a folder."""
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def executed(study):
    """name -> (HTML path, executed notebook) of all notebooks, by papermill; none of them may touch a table."""
    found, before = {}, contents(study.results)
    for name in notebooks():
        page = run_notebook(name, "smoke", build=False)
        found[name] = page, json.loads((paths.RUNS / "smoke" / "notebooks" / f"{name}.ipynb").read_text())
        assert contents(study.results) == before, f"{name} wrote below {study.results}"
    return found


def outputs(notebook: dict) -> str:
    """All text that a notebook's cells put out, HTML tables included."""
    parts = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            parts += [*output.get("text", []), *data.get("text/plain", []), *data.get("text/html", [])]
            parts += data.get("text/markdown", [])
    return "".join(parts)


EXPECTED = {
    "01_full_precision": ["01_loss_curves", "01_final_loss", "01_learning_rates", "01_cloze_accuracy"],
    "02_outlier_metrics": ["02_mmr", "02_mmr_learning_rate", "02_outliers_against_damage"],
    "03_ptq": ["03_w4a4_increase", "03_forest", "03_before_and_after", "03_formats_tiny", "03_formats_small"],
    "04_error_propagation": [
        "04_parts",
        "04_depth",
        "04_abc",
        "04_gain",
        "04_figure1",
        "04_centred",
    ],
    "05_qat": ["05_before_after", "05_increase", "05_curves", "05_staircases"],
    "06_scaling_laws": ["06_fits", "06_rho"],
    "07_claims": ["07_claims", "07_effects"],
    "08_probe_your_model": ["08_layers_kl", "08_guides"],
    "09_real_quantizers": ["09_damage", "09_methods"],
}


def test_there_is_an_expectation_for_every_notebook():
    assert sorted(EXPECTED) == notebooks()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_notebook_runs_and_draws_its_figures(executed, name):
    page, notebook = executed[name]
    text = outputs(notebook)
    assert not [o for c in notebook["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    for figure in EXPECTED[name]:
        for kind in ("png", "pdf"):
            assert (page.parent / f"{figure}.{kind}").stat().st_size > 2000, figure
    for said in ("'smoke'", "torch", "commit"):  # parameters, versions and commit are shown
        assert said in text
    assert "Traceback" not in text
    assert page.stat().st_size > 50_000


def test_notebook_01_shows_the_losses_of_the_tables(executed, study):
    text = outputs(executed["01_full_precision"][1])
    for loss in study.runs("full_precision").val_loss:
        assert f"{loss:.4f}" in text


def test_notebook_03_shows_increases_and_the_papers_table(executed, study):
    text = outputs(executed["03_ptq"][1])
    w4a4 = study.measured("ptq").query("spec == 'W4A4'")
    for increase in w4a4.increase:
        assert f"{increase:.3f}" in text
    for accuracy in paper("table3_ptq_w4a4").accuracy:
        assert f"{accuracy:.2f}".rstrip("0").rstrip(".") in text


def test_notebook_04_finds_the_identity(executed):
    residual = re.search(r"largest \|R - \(A \+ B \+ C\)\| .*: (\S+)", outputs(executed["04_error_propagation"][1]))
    assert float(residual[1]) < 1e-9


def test_notebook_07_judges_every_claim(executed, study):
    table, text = judged(study), html.unescape(outputs(executed["07_claims"][1]))
    assert list(table.id) == list(CLAIMS) == list(read_rules()) == list(paper("claims").id)
    assert set(table.verdict) <= set(VERDICTS) and table.comment.str.len().min() > 20
    assert set(table.notebook) <= set(notebooks())
    for row in table.itertuples():
        assert row.claim in text and row.verdict in text


def test_rendering_reads_the_verdicts_and_writes_no_table(executed, study, monkeypatch):
    """`make figures` where judged.csv is there: notebook 07 shows what it says, and nothing below data changes."""
    write_verdicts(study)
    file = study.results / "judged.csv"
    table = pd.read_csv(file)
    table.loc[0, "comment"] = "A sentence that no rule would say."
    checksums.write_text(file, table.to_csv(index=False))
    before = contents(study.results)
    monkeypatch.setattr(notebook_module, "notebooks", lambda protocol=None: ["07_claims"])
    render("smoke", 1)
    assert contents(study.results) == before
    shown = outputs(json.loads((paths.RUNS / "smoke" / "notebooks" / "07_claims.ipynb").read_text()))
    assert "A sentence that no rule would say." in shown
    file.unlink()
    run_notebook("07_claims", "smoke", build=False)  # its page is of the tables that are there again


@pytest.mark.parametrize("name", EXPECTED)
def test_a_page_begins_with_what_was_found(executed, study, name):
    """The index quotes every page, and the pages are of these tables."""
    page = executed[name][0].with_suffix(".md").read_text()
    places = [page.index(text) for text in ("\n# ", "\n**Finding.** ", "\n**Question.** ")]
    assert places == sorted(places) and page[places[0] : places[1]].strip().count("\n") == 0  # then the finding
    index = pages.write_index("smoke").read_text()
    found = pages.first_finding(executed[name][0].with_suffix(".md"))
    assert f"({name}.md)" in index and found.replace("|", "\\|") in index
    pages.check_pages("smoke", [name])


def test_notebooks_refuse_unknown_parameters(study):
    with pytest.raises(ValueError, match=r"no parameter scael; valid: scale, build"):
        run_notebook("01_full_precision", "smoke", scael="pocket")
    with pytest.raises(ValueError, match="02_outlier_metrics"):
        run_notebook("01_full_prescision", "smoke")


def test_papermill_by_hand_refuses_unknown_parameters(study, tmp_path):
    """papermill itself only warns; the notebook's first cell does not go on."""
    source = paths.NOTEBOOKS / "01_full_precision.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match=r"unknown notebook parameters: scael; valid: scale"):
        papermill.execute_notebook(source, tmp_path / "out.ipynb", {"scael": "smoke"}, progress_bar=False)
