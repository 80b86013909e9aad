"""What every notebook does first: check its parameters, say what it runs with, set the theme."""

import inspect
import json
import numbers

import pandas as pd

from beyond_outliers import paths

# what IPython and papermill put into a fresh namespace themselves
_NOT_PARAMETERS = {"In", "Out", "exit", "quit", "get_ipython", "open"}


def begin(namespace: dict, study: bool = True):
    """Call as `study = begin(globals())` right after the parameters cell.

    The valid parameters are the annotated names of that cell (`scale: str = "pocket"`). Any other public name in the
    namespace came from outside, misspelt: ValueError with the valid ones, as for a value of the wrong type. Shows a
    table of the parameters, versions and commit, and returns the `Study` of the parameter `scale` (None: study=False).
    """
    from beyond_outliers.plots import set_theme
    from beyond_outliers.study import Study

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

    from beyond_outliers.records import git_commit

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
