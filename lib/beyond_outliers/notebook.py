"""What every notebook does first: check its parameters, say what it runs with, set the theme."""

import inspect
import json
import numbers
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from beyond_outliers import paths
from beyond_outliers.config.protocol import Protocol
from beyond_outliers.study.study import Study

# what IPython and papermill put into a fresh namespace themselves
_NOT_PARAMETERS = {"In", "Out", "exit", "quit", "get_ipython", "open"}


def begin(namespace: dict, study: bool = True):
    """Call as `study = begin(globals())` right after the parameters cell.

    The valid parameters are the annotated names of that cell (`scale: str = "pocket"`). Any other public name in the
    namespace came from outside, misspelt: ValueError with the valid ones, as for a value of the wrong type. Shows a
    table of the parameters, versions and commit, and returns the `Study` of the parameter `scale` (None: study=False).
    """
    from beyond_outliers.plots.theme import set_theme
    from beyond_outliers.study.study import Study

    parameters = check_parameters(namespace)
    set_theme()
    _show(parameters)
    return Study(parameters["scale"]) if study else None


def check_parameters(namespace: dict) -> dict:
    """The notebook's parameters, name -> value, after checking names and types."""
    declared = namespace.get("__annotations__", {})
    public = {n for n in namespace if not n.startswith("_")} - _NOT_PARAMETERS
    public = {n for n in public if not (inspect.ismodule(namespace[n]) or callable(namespace[n]))}  # earlier imports
    if unknown := sorted(public - set(declared)):
        valid = ", ".join(f"{name} ({kind.__name__})" for name, kind in declared.items())
        raise ValueError(f"unknown notebook parameters: {', '.join(unknown)}; valid: {valid}")
    for name, kind in declared.items():
        value = namespace[name]
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool) if kind is float else type(value) is kind
        if not fits:
            raise ValueError(f"notebook parameter {name} must be {kind.__name__}, not {value!r}")
    return {name: namespace[name] for name in declared}


def _show(parameters: dict) -> None:
    import platform

    import torch
    from IPython.display import display

    from beyond_outliers.train.machine import git_commit

    rows = [("parameter", name, repr(value)) for name, value in parameters.items()]
    rows += [("version", "python", platform.python_version()), ("version", "torch", torch.__version__)]
    rows += [("version", "commit of this checkout", git_commit())]
    table = pd.DataFrame(rows, columns=["", "name", "value"])
    display(table.style.hide(axis="index"))


def paper(name: str) -> pd.DataFrame:
    """A table of the paper, from data/paper: "table2_full_precision", "claims", ..."""
    file = paths.PAPER / f"{name}.csv"
    if not file.exists():
        raise ValueError(
            f"unknown table {name!r}; valid: {', '.join(sorted(f.stem for f in paths.PAPER.glob('*.csv')))}"
        )
    return pd.read_csv(file)


def parameters_of(notebook: str) -> dict[str, str]:
    """Name -> comment of a notebook's parameters, for documentation and tests."""
    cells = json.loads((paths.NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    tagged = next(c for c in cells if "parameters" in c["metadata"].get("tags", []))
    lines = "".join(tagged["source"]).splitlines()
    return {line.split(":")[0].strip(): line.partition("#")[2].strip() for line in lines if ":" in line.split("#")[0]}


# what a notebook has nothing to say without: a purpose of runs that a scale may leave out of its plan
ASKS_FOR = {"05_qat": "qat", "06_scaling_laws": "qat"}


def notebooks(protocol: Protocol | None = None) -> list[str]:
    """Names of the study's notebooks, in reading order: all, or those that a scale's plan of runs has enough for."""
    names = sorted(file.stem for file in paths.NOTEBOOKS.glob("0*.ipynb"))
    planned = protocol.purposes() if protocol else ASKS_FOR.values()
    return [name for name in names if name not in ASKS_FOR or ASKS_FOR[name] in planned]


def run_notebook(name: str, scale: str, **parameters) -> Path:
    """Executes a notebook by papermill and returns its HTML in figures/SCALE; its Markdown page is written beside.

    Parameters that it does not have are refused.
    """
    import nbconvert
    import papermill

    from beyond_outliers.pages import write_page

    source = paths.NOTEBOOKS / f"{name}.ipynb"
    if not source.exists():
        raise ValueError(f"unknown notebook {name!r}; valid: {', '.join(notebooks())}")
    parameters = {"scale": scale, **parameters}
    known = papermill.inspect_notebook(source)
    if unknown := set(parameters) - set(known):
        raise ValueError(f"{name} has no parameter {', '.join(sorted(unknown))}; valid: {', '.join(known)}")
    executed = paths.RUNS / scale / "notebooks" / f"{name}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        source, executed, parameters, cwd=paths.NOTEBOOKS, kernel_name="python3", progress_bar=False
    )
    html, _ = nbconvert.HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_filename(str(executed))
    target = paths.FIGURES / scale / f"{name}.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html)
    write_page(executed, scale, name)
    return target


def render(scale: str, jobs: int) -> None:
    """Every notebook from the tables alone, `jobs` at a time, each in a process of its own.

    MissingResults when the scale has no tables yet; SystemExit with the end of their messages when notebooks fail.
    """
    study = Study(scale)
    study.table("runs")  # fail early, with the remedy
    names = notebooks(study.protocol)
    if left_out := sorted(set(notebooks()) - set(names)):
        print(f"left out, because scale {scale} does not plan their runs: {', '.join(left_out)}")
    command = [sys.executable, "-m", "beyond_outliers.study", "notebook", "--scale", scale, "--tables-only", "--name"]
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(
            tqdm(
                pool.map(lambda name: subprocess.run([*command, name], capture_output=True, text=True), names),
                total=len(names),
                desc="notebooks",
            )
        )
    failed = [name for name, outcome in zip(names, outcomes, strict=True) if outcome.returncode]
    if failed:
        raise SystemExit(
            f"failed: {', '.join(failed)}\n" + "\n".join(o.stderr[-2000:] for o in outcomes if o.returncode)
        )
