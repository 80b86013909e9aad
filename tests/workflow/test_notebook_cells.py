"""Cells as people run them: twice, out of order, with another parameter, behind a startup file of their own."""

import json
import random

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from beyond_outliers import paths

READ_TABLES = ["01_full_precision", "02_outlier_metrics", "03_ptq", "04_error_propagation", "05_qat"]
READ_TABLES += ["06_scaling_laws", "07_claims", "09_real_quantizers"]
PARAMETERS = {"10_your_optimizer": "pocket+lion"}
MINE = "PROJECT: str = None\nscales = limit = 3\nkeep: list[int] = []\n"  # of a user's startup file


def sources(name):
    cells = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """An IPython of nobody's, which has run a startup file; figures go to a temporary folder."""
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    shell = InteractiveShell.instance()
    shell.reset()
    shell.run_cell(MINE)  # like a startup file, not stored
    yield shell
    shell.reset()


def run(shell, source):
    with capture_output() as shown:
        shell.run_cell(source, store_history=True).raise_error()
    return shown


@pytest.mark.parametrize("name", [*READ_TABLES, "10_your_optimizer"])
def test_cells_run_twice_and_in_any_order(shell, name):
    cells = sources(name)
    for source in cells:
        run(shell, source)
    run(shell, "mine = 1\nhere: int = None")
    again = random.Random(name).sample(cells, len(cells))
    for source in again:
        run(shell, source)
