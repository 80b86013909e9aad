"""A page under faults: what is there is whole, old or new, and the same command draws it again."""

import importlib
import itertools
import random
import time

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbformat.v4 import new_code_cell, new_notebook, new_output
from papermill.engines import Engine, papermill_engines

import checkouts
import faults
from beyond_outliers import paths
from beyond_outliers.notebook import run_notebook

NOTEBOOK, SCALE = "05_qat", "pocket"
pytestmark = pytest.mark.slow


class Here(Engine):
    """Executes cells in this process, where faults are injected, instead of in a kernel of their own."""

    @classmethod
    def execute_managed_notebook(cls, manager, kernel_name, **_):
        shell = InteractiveShell.instance()
        shell.reset()
        for cell in manager.nb.cells:
            manager.cell_start(cell)
            if cell.cell_type == "code":
                with capture_output() as captured:
                    shell.run_cell(cell.source).raise_error()
                cell.outputs = [new_output("display_data", o.data, metadata=o.metadata) for o in captured.outputs]
            manager.cell_complete(cell)


CELLS = """
scale: str = "pocket"
build: bool = False
---
from beyond_outliers import notebook
from beyond_outliers.plots.theme import panels, save
study = notebook.begin(globals())
---
figure, axes = panels(study.protocol.sizes)
save(figure, scale, "05_sizes")
---
figure, axes = panels(study.protocol.optimizers)
save(figure, scale, "05_optimizers")
---
study.runs("qat")[["size", "optimizer", "val_loss"]]
"""


@pytest.fixture
def drawing(tmp_path, monkeypatch):
    """Where pages go, and what draws a small notebook of two figures and a table there, from committed tables."""
    (tmp_path / "notebooks").mkdir()
    notebook = new_notebook(cells=[new_code_cell(cell.strip()) for cell in CELLS.split("---")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path / "notebooks" / f"{NOTEBOOK}.ipynb")
    monkeypatch.setenv("BEYOND_OUTLIERS_OUTPUT", str(tmp_path))  # of kernels
    for name, folder in (("NOTEBOOKS", "notebooks"), ("FIGURES", "figures"), ("RUNS", "data/runs")):
        monkeypatch.setattr(paths, name, tmp_path / folder)
    return paths.figures(SCALE), lambda: run_notebook(NOTEBOOK, SCALE, build=False)


@pytest.fixture
def here(monkeypatch):
    """The kernel is this process, which imports once what every child needs."""
    for module in ("nbconvert", "beyond_outliers.pages", "beyond_outliers.plots.theme"):
        importlib.import_module(module)
    monkeypatch.setitem(papermill_engines._engines, None, Here)


def drawn(folder):
    """name -> bytes of what one sees; HTML has random ids."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix != ".html"}


def check(folder, draw, whole, code, fault):
    """Nothing is torn (or, on a disk that tears, does not count as done); drawing again makes it whole."""
    after, torn = drawn(folder), "tears" in fault and code == faults.DIED
    for name, content in after.items():
        assert torn or name.endswith(".tmp") or content in (b"old", whole.get(name)), (fault, name)
    assert code not in (0, faults.PASSED_BY) or after == whole, f"{fault} was silent"
    assert faults.in_child(draw) == 0 and drawn(folder) == whole, fault
    faults.TALLY[f"notebook: {fault}", "not done; then the same page"] += 1


def aged(folder, names):
    for name in names:
        (folder / name).write_bytes(b"old")


@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_page_survives_a_fault_at_some_changes_of_the_disk(here, drawing, tmp_path, kind, every=29):
    folder, draw = drawing
    assert faults.in_child(draw) == 0
    whole = drawn(folder)
    assert set(whole) == {
        f"{NOTEBOOK}.md",
        *(f"05_{name}.{of}" for name in ("sizes", "optimizers") for of in ("pdf", "png")),
    }
    for number in itertools.count(1 + faults.KINDS.index(kind), every):
        aged(folder, whole)
        code = faults.in_child(draw, faults.at_change(kind, number, tmp_path))
        check(folder, draw, whole, code, f"change {kind}")
        if code == 0:
            break
    assert number > every


@pytest.mark.parametrize("size", [10, 5_000, 20_000])
def test_a_page_survives_a_full_disk(here, drawing, size):
    folder, draw = drawing
    assert faults.in_child(draw) == 0
    whole = drawn(folder)
    aged(folder, whole)
    code = faults.in_child(draw, faults.smallest_file_that_does_not_fit(size))
    assert code == 1, "the disk was not full"
    check(folder, draw, whole, code, "disk full")


def test_a_page_survives_that_it_and_its_kernel_are_killed(drawing, tries=2):
    folder, draw = drawing
    started = time.perf_counter()
    assert faults.in_child(draw) == 0
    taken, whole, rng = time.perf_counter() - started, drawn(folder), random.Random(tries)
    for _ in range(tries):
        aged(folder, whole)
        child = faults.start(draw)
        time.sleep(rng.uniform(0.3, 1) * taken)
        checkouts.kill_all(child)
        check(folder, draw, whole, faults.ended(child), "SIGKILL, kernel included")
