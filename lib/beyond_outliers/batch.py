"""Notebooks in batch: executed by papermill, turned into HTML by nbconvert."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from beyond_outliers import paths
from beyond_outliers.study import Study


def notebooks() -> list[str]:
    """Names of the study's notebooks, in reading order."""
    return sorted(file.stem for file in paths.NOTEBOOKS.glob("0*.ipynb"))


def run_notebook(name: str, scale: str, **parameters) -> Path:
    """Executes a notebook by papermill, returns its HTML in figures/SCALE; parameters it does not have are refused."""
    import nbconvert
    import papermill

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
    return target


def render(scale: str, jobs: int) -> None:
    """Every notebook from the tables alone, `jobs` at a time, each in a process of its own.

    MissingResults when the scale has no tables yet; SystemExit with the end of their messages when notebooks fail.
    """
    Study(scale).table("runs")  # fail early, with the remedy
    command = [sys.executable, "-m", "beyond_outliers.study", "notebook", "--scale", scale, "--tables-only", "--name"]
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(
            tqdm(
                pool.map(lambda name: subprocess.run([*command, name], capture_output=True, text=True), notebooks()),
                total=len(notebooks()),
                desc="notebooks",
            )
        )
    failed = [name for name, outcome in zip(notebooks(), outcomes, strict=True) if outcome.returncode]
    if failed:
        raise SystemExit(
            f"failed: {', '.join(failed)}\n" + "\n".join(o.stderr[-2000:] for o in outcomes if o.returncode)
        )
