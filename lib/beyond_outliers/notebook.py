"""What every notebook calls: check its parameters, say what it runs with and what it found, show tables."""

import importlib.metadata
import json
import numbers
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pandas.api.types import is_numeric_dtype
from tqdm.auto import tqdm

from beyond_outliers import paths
from beyond_outliers.config.outside import parted
from beyond_outliers.config.parsing import choose
from beyond_outliers.config.protocol import Protocol
from beyond_outliers.config.registry import OPTIMIZER_NAMES, entry
from beyond_outliers.config.scale import scales
from beyond_outliers.paths import git_commit
from beyond_outliers.study import workflow
from beyond_outliers.study.study import Study
from beyond_outliers.study.tables import MissingResults

if TYPE_CHECKING:
    from IPython.display import Markdown


def begin(namespace: dict, study: bool = True):
    """Call as `study = begin(globals())` right after the parameters cell.

    Parameters are checked as in `check_parameters`. Shows a table of them, versions and commit, and returns the `Study`
    of the parameter `scale` (None: study=False), trained and measured first where the parameter `build` asks for it.
    MissingResults where it does not and there is nothing to read.
    """
    parameters = check_parameters(namespace)
    _show(parameters)
    return opened(Study(parameters["scale"]), parameters.get("build", False)) if study else None


def opened(study: Study, build: bool) -> Study:
    """The study with everything that it plans (build), or as far as its tables go; MissingResults without tables."""
    if build:
        return workflow.build(study)
    if not (study.results / "runs.csv").exists():
        raise MissingResults(
            f"Scale {study.scale} has no tables to read in {study.results}. To build them, which takes "
            f"{time_to_build(study)}: run `make reproduce SCALE={study.scale}`, or this notebook with the parameter "
            "build=True."
        )
    return study


LARGEST_TIMED = 10_000_000  # parameters of a model that a few steps are timed of, to say how long a study takes


def time_to_build(study: Study) -> str:
    """How long training takes, from a few steps timed here; the command that says so where models are large."""
    from beyond_outliers.study.plan import plan_table

    if max(study.protocol.model(size).n_parameters for size in study.protocol.sizes) > LARGEST_TIMED:
        return f"as long as `make plan SCALE={study.scale}` says"
    hours = float(plan_table(study).hours.sum())
    shown = f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:.0f} hours"
    return f"about {shown} of training on one core, one run after the other, and measurements on top"


NOTE = (
    "*Intervals are 95 %: of means and differences by t over seeds within sizes, of correlations by bootstrap over "
    "runs. Who is lowest or highest was read off the same runs.*"
)


def finding(name: str, of: Any) -> "Markdown":
    """What a notebook found, and the terms that it uses, as its second cell shows them.

    of: the study (notebook 08: what `probe` found). ValueError for a notebook that has no finding.
    """
    from IPython.display import Markdown

    from beyond_outliers.claims.findings import FINDINGS
    from beyond_outliers.terms import explained

    choose("notebook", name, FINDINGS)
    text = FINDINGS[name](of)
    cells = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    parts = [
        f"**Finding.** {text}",
        NOTE if "[" in text and hasattr(of, "scale") else "",
        explained(f"{text}\n{prose}"),
    ]
    return Markdown("\n\n".join(filter(None, parts)))


def verdicts_here(name: str, study: Study) -> "Markdown":
    """The verdicts on the claims of a notebook, each with its estimate, n, reason and a link to its rule."""
    from IPython.display import Markdown

    from beyond_outliers.claims.findings import verdict_lines

    return Markdown(verdict_lines(study, name))


def check_parameters(namespace: dict) -> dict:
    """The notebook's parameters, name -> value.

    They are the annotated names of the parameters cell, the last cell that was run with `build: bool`. ValueError for a
    value of another type, and for a name that papermill put in (its cell follows at once) and that is not among them.
    Whatever else the namespace has is the user's own: startup files, cells that were run before.
    """
    kinds = namespace.get("__annotations__", {})
    cells = list(namespace.get("In", ()))  # of IPython: the sources of the cells that were run
    place = max((n for n, cell in enumerate(cells) if _assigned(cell).get("build") is True), default=None)
    declared, injected = list(kinds), []
    if place is not None:
        declared = [name for name, typed in _assigned(cells[place]).items() if typed]
        after = "".join(cells[place + 1 : place + 2])
        injected = list(_assigned(after)) if after.startswith("# Parameters\n") else []
    if unknown := sorted(set(injected) - set(declared)):
        valid = ", ".join(f"{name} ({kinds[name].__name__})" for name in declared)
        raise ValueError(f"unknown notebook parameters: {', '.join(unknown)}; valid: {valid}")
    for name in declared:
        kind, value = kinds[name], namespace[name]
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool) if kind is float else type(value) is kind
        if not fits:
            raise ValueError(f"notebook parameter {name} must be {kind.__name__}, not {value!r}")
    return {name: namespace[name] for name in declared}


def _assigned(cell: str) -> dict[str, bool]:
    """Name -> whether it is annotated, of what a cell assigns line by line."""
    lines = re.findall(r"^(\w+)(:[^=\n]+)? *= ", cell, re.MULTILINE)
    return {name: bool(annotation) for name, annotation in lines}


def _show(parameters: dict) -> None:
    from IPython.display import display

    versions = {"python": platform.python_version(), "torch": importlib.metadata.version("torch")}
    rows = [("parameter", name, repr(value)) for name, value in parameters.items()]
    rows += [("version", name, version) for name, version in versions.items()]
    rows.append(("version", "commit of this checkout", git_commit()))
    display(table(pd.DataFrame(rows, columns=["what", "name", "value"])))


def setting(study: Study) -> "Markdown":
    """What a page needs to know of its scale, from the scale's file: format, head, how rates are chosen."""
    from IPython.display import Markdown

    protocol = study.protocol
    head = {True: "rounded", False: "not rounded"}
    source = protocol.settings.rates_from
    scaled = "max_preconditioned_size" in protocol.settings.hyper.get("soap", {})
    papers_sides = scaled or protocol.corpus.vocab_size > 12_288  # Shampoo's block, the papers' largest threshold
    carried = f", or from scale `{source}` where a size has none" if source else ""
    parts = [
        f"**This scale.** The primary format is `{protocol.measure.primary}`: the tied head is "
        f"{head['+head' in protocol.measure.primary]}.",
        f"In QAT the head is {head[qat.head]}." if (qat := protocol.settings.plan.get("qat")) else "",
        f"Learning rates come from {'a search at every size' if protocol.tuned else 'a grid'}{carried}.",
        ""
        if papers_sides
        else "Unlike in the paper's runs, SOAP, PSGD and Shampoo precondition "
        "[the vocabulary side](../../docs/shrinking.md#the-vocabulary-side) of the embedding (noted on 2026-12-01).",
    ]
    return Markdown(" ".join(filter(None, parts)))


def table(
    frame: pd.DataFrame | pd.Series,
    digits: int | str = 3,
    formats: dict[str, str] | None = None,
    caption: str = "",
    folded: str = "",
) -> "Markdown":
    """A table as notebooks and pages show it.

    digits: of numbers with a fraction, or a format for them ("{:.0%}"). formats: column -> format. A column whose name
    is a number keeps its level's name ("seed 0"). folded: the line that opens a long table.
    """
    from IPython.display import Markdown

    frame = frame.to_frame() if isinstance(frame, pd.Series) else frame
    levels = frame.columns.names
    columns = [column if isinstance(column, tuple) else (column,) for column in frame.columns]
    heads = [" ".join(_head(*pair) for pair in zip(levels, column, strict=True)).strip() for column in columns]
    frame = frame.set_axis(heads, axis=1)
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index(names=[name or "" for name in frame.index.names])
    if frame.empty:
        return Markdown(f"*No rows yet ({', '.join(frame.columns)}): nothing of this has been measured.*")
    usual, formats = digits if isinstance(digits, str) else f"{{:.{digits}f}}", formats or {}
    texts = {head: [_cell(value, formats.get(head), usual) for value in frame[head]] for head in frame.columns}
    align = ["right" if is_numeric_dtype(frame[head]) else "left" for head in frame.columns]
    body = pd.DataFrame(texts).to_markdown(index=False, disable_numparse=True, colalign=align)
    body = f"*{caption}*\n\n{body}" if caption else body
    return Markdown(f"<details><summary>{folded}</summary>\n\n{body}\n\n</details>" if folded else body)


def _head(level: str | None, label: object) -> str:
    return f"{level} {label}" if level and isinstance(label, numbers.Number) else _named(str(label))


def _named(text: str) -> str:
    """Optimizers as they are written in text: AdamW for adamw; a run's name stays."""
    return re.sub(rf"(?<![-\w])({'|'.join(OPTIMIZER_NAMES)})(?![-\w])", lambda found: entry(found[1]).label, text)


def _cell(value: Any, form: str | None, usual: str) -> str:
    if isinstance(value, str):
        return _named(value.replace("|", "\\|"))
    if pd.isna(value):
        return "-"
    return (form or usual).format(value) if form or isinstance(value, float) else str(value)


def paper(name: str) -> pd.DataFrame:
    """A table of the paper, from data/paper: "table2_full_precision", "claims", ..."""
    choose("table", name, sorted(file.stem for file in paths.PAPER.glob("*.csv")))
    return pd.read_csv(paths.PAPER / f"{name}.csv")


YOURS = "10_your_optimizer"  # of `make compare`
# what a notebook has nothing to say without: a purpose of runs that a scale may leave out of its plan
ASKS_FOR = {"05_qat": "qat", "06_scaling_laws": "qat"}


def notebooks(protocol: Protocol | None = None) -> list[str]:
    """Names of the study's notebooks, in reading order: all, or those that a scale's plan of runs has enough for.

    An optimizer from outside ("pocket+lion") has the one that no study has.
    """
    if protocol and "+" in protocol.scale:  # an arm has none
        return [YOURS] if parted(protocol.scale)[1] else []
    names = sorted(file.stem for file in paths.NOTEBOOKS.glob("0*.ipynb"))
    planned = protocol.purposes() if protocol else ASKS_FOR.values()
    return [name for name in names if name not in ASKS_FOR or ASKS_FOR[name] in planned]


def run_notebook(name: str, scale: str, **parameters) -> Path:
    """Executes a notebook by papermill, in this Python, and returns its HTML in `paths.figures`.

    Parameters that it does not have are refused.
    """
    import papermill

    from beyond_outliers.pages import ThisPython, executed_notebook, write_page

    choose("notebook", name, sorted(file.stem for file in paths.NOTEBOOKS.glob("*.ipynb")))
    choose("scale", parted(scale)[0], scales())  # pocket+lion: an optimizer from outside beside pocket
    source = paths.NOTEBOOKS / f"{name}.ipynb"
    parameters = {"scale": scale, **parameters}
    known = papermill.inspect_notebook(source)
    if unknown := set(parameters) - set(known):
        raise ValueError(f"{name} has no parameter {', '.join(sorted(unknown))}; valid: {', '.join(known)}")
    executed = executed_notebook(scale, name)
    executed.parent.mkdir(parents=True, exist_ok=True)
    options = {"cwd": paths.NOTEBOOKS, "kernel_manager_class": ThisPython, "progress_bar": False}
    papermill.execute_notebook(source, executed, parameters, kernel_name="python3", **options)
    return write_page(scale, name, paths.figures(scale)).with_suffix(".html")


def render(scale: str, jobs: int) -> None:
    """Every notebook from the tables alone, `jobs` at a time, each in a process of its own, and pages and their index.

    MissingResults when the scale has no tables yet; SystemExit with the end of their messages when notebooks fail.
    """
    from beyond_outliers.pages import publish

    study = Study(scale)
    study.table("runs")  # fail early, with the remedy
    folder = paths.pages(scale)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written: set BEYOND_OUTLIERS_OUTPUT to a folder that can be")
    names = notebooks(study.protocol)
    if names != [YOURS] and (left_out := sorted(set(notebooks()) - set(names))):
        print(f"left out, because scale {scale} does not plan their runs: {', '.join(left_out)}")
    command = [sys.executable, "-m", "beyond_outliers", "notebook", "--scale", scale, "--tables-only", "--name"]
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = pool.map(lambda name: subprocess.run([*command, name], capture_output=True, text=True), names)
        ended = zip(names, tqdm(outcomes, total=len(names), desc="notebooks"), strict=True)
        failed = {name: outcome.stderr[-2000:] for name, outcome in ended if outcome.returncode}
    if failed:
        raise SystemExit("\n".join([f"failed: {', '.join(failed)}", *failed.values()]))
    publish(scale, names)
