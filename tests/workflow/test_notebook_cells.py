"""Cells as people run them: twice, out of order, with another parameter, behind a startup file of their own."""

import random
import subprocess
import sys

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from beyond_outliers import paths

pytestmark = pytest.mark.slow
READ_TABLES = ["01_full_precision", "02_outlier_metrics", "03_ptq", "04_error_propagation", "05_qat"]
READ_TABLES += ["06_scaling_laws", "07_claims", "09_real_quantizers"]
MINE = "PROJECT: str = None\nscales = limit = 3\nkeep: list[int] = []\n"  # of a user's startup file


def sources(name):
    cells = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", 4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


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


def test_another_parameter_and_all_cells_again(shell):
    """What a cell kept of the first scale must not reach the second."""
    cells = sources("05_qat")
    shown = []
    for scale in ("pocket", "laptop"):
        for source in cells:
            run(shell, source.replace('"pocket"', f'"{scale}"'))
        shown.append(set(shell.user_ns["losses"]["size"]))
        assert shell.user_ns["study"].scale == scale
    assert shown == [{"0.03M", "0.08M"}, {"0.08M", "0.16M"}]
    assert {folder.name for folder in paths.RUNS.iterdir()} == {"pocket", "laptop"}


def test_a_figure_at_the_end_of_a_cell_is_shown_once(shell):
    """Figures that pyplot knows are shown by the inline backend again when a cell ends."""
    run(shell, "import matplotlib.pyplot as plt\nfrom beyond_outliers.plots.theme import panels")
    run(shell, "panels(['one', 'two'])[0]")
    run(shell, "from beyond_outliers.plots import staircases")
    run(
        shell, "import pandas as pd\nstaircases(pd.DataFrame(columns=['scheme', 'x', 'y', 'gradient']), {'ste': 'STE'})"
    )
    assert shell.user_ns["plt"].get_fignums() == []


def test_the_study_appears_before_torch_and_what_draws_are_loaded():
    """A notebook that reads tables answers in a second and a half; the rest is loaded by the cells that need it."""
    code = """
import resource, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
shell.run_cell('scale: str = "pocket"\\nbuild: bool = False', store_history=True)
shell.run_cell('from beyond_outliers import notebook\\nstudy = notebook.begin(globals())').raise_error()
ours = [name for name in sys.modules if name.startswith("beyond_outliers")]
print(len(ours), "torch" in sys.modules, resource.getrusage(resource.RUSAGE_SELF).ru_utime - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, torch, seconds = done.stdout.split()[-3:]
    assert int(modules) <= 40 and torch == "False" and float(seconds) < 1.5
