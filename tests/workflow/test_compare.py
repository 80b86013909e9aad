"""A whole comparison at scale smoke, from the command to the page; the scale's own tables stay as they are."""

import pytest

from beyond_outliers import paths
from beyond_outliers.cli import main
from beyond_outliers.study import Study
from beyond_outliers.study.compare import Beside

pytestmark = pytest.mark.slow
COMMAND = ["compare", "--scale", "smoke", "--optimizer", "torch.optim.SGD", "--hyper", "momentum = 0.9"]


@pytest.fixture(scope="module")
def compared(study):
    before = {file.name: file.read_bytes() for file in study.results.iterdir()}
    assert main([*COMMAND, "--name", "floor", "--rates", "0.03", "0.1"]) == 0
    return before


def test_the_tables_of_the_six_do_not_change(study, compared):
    assert {file.name: file.read_bytes() for file in study.results.iterdir()} == compared


def test_yours_is_trained_and_measured_like_the_six(study, compared):
    yours, both = Study("smoke+floor"), Beside("smoke+floor")
    for purpose in ("full_precision", "qat"):
        wanted = {(row.size, row.seed) for row in study.runs(purpose).itertuples()}
        assert {(row.size, row.seed) for row in yours.runs(purpose).itertuples()} == wanted
        assert set(both.runs(purpose).optimizer) == {*study.runs(purpose).optimizer, "torch.optim:SGD"}
    for table in ("ptq", "zero_shot", "outliers", "propagation"):
        mine, theirs = yours.measured(table), study.measured(table)
        assert list(mine.columns) == list(theirs.columns)
        assert set(mine[mine.checkpoint == "final"].get("spec", [])) == set(
            theirs[theirs.checkpoint == "final"].get("spec", [])
        )
        assert len(both.table(table)) == len(study.table(table)) + len(yours.table(table))
    assert set(yours.runs("sweep").lr) == {0.03, 0.1}


def test_the_page_says_where_it_stands(compared):
    folder = paths.figures("smoke+floor")
    page = (folder / "10_your_optimizer.md").read_text()
    assert "**Finding.** SGD next to the six." in page and " of 7, from the lowest. Minus " in page
    assert "../../smoke/figures/README.md" in page and (folder / "10_your_optimizer.html").exists()
    for figure in ("10_final_loss", "10_damage", "10_error", "10_gain", "10_mmr"):
        assert (folder / f"{figure}.png").stat().st_size > 5000 and f'src="{figure}.png"' in page


def test_a_second_call_trains_nothing_and_tells_the_finding(compared, monkeypatch, capsys):
    monkeypatch.setattr(Study, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr("beyond_outliers.notebook.run_notebook", lambda *_: "page")
    assert main([*COMMAND, "--name", "floor"]) == 0  # with the rates that it has
    said = capsys.readouterr().out
    assert (
        said.index("What is left takes about 0 minutes")
        < said.index("\nSGD next to the six.")
        < said.index("\n| quantity")
    )


def test_other_hyperparameters_under_the_same_name_are_refused(compared, capsys):
    with pytest.raises(SystemExit):
        main([*COMMAND[:-1], "momentum = 0.5", "--name", "floor"])
    assert "another name for this one" in capsys.readouterr().err
