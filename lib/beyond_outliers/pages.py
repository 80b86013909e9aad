"""Executed notebooks as Markdown pages that code hosts render, beside the figures they show: figures/SCALE/NAME.md, or
data/runs/SCALE/figures/NAME.md where the tables are a reader's own (`paths.figures`).

nbconvert does the work. Before it, every output is rewritten: a figure becomes a link to the file that `plots.save`
wrote, an HTML table becomes a Markdown table, code is left out. What changes from run to run without a change of
substance (commit, versions, object addresses) does not enter, so the same tables give the same bytes. The first line
is a fingerprint of the notebook's source and of the scale's tables, by which a stale page is recognised.

beyond-outliers pages index --scale laptop     figures/laptop/README.md, a row a page
beyond-outliers pages check --scale laptop     whether every page is there and of these tables
beyond-outliers pages readme --scale laptop    the decision table in README.md
"""

import hashlib
import json
import os
import re
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from beyond_outliers import checksums, paths
from beyond_outliers.config.outside import parted
from beyond_outliers.config.protocol import Protocol
from beyond_outliers.markdown import markdown_table
from beyond_outliers.terms import explained

FIGURE = re.compile(r"^figure ([\w.+-]+)$")  # what a saved figure says of itself as plain text
SHOWN = re.compile(r"!\[[^\]]*\]\(([^)]+)\.png\)")  # how a page shows it
LARGEST = 150_000  # bytes a page
BEGIN, END = "<!-- decisions of scale {scale}: beyond-outliers pages readme -->", "<!-- end of decisions -->"


CAPTION = """*Loss on held-out text in scale [{scale}](figures/{scale}/README.md): means over sizes and seeds, with 95 %
intervals. In parentheses: not told apart from the first. "Llama": the best of the three optimizers tried on another
architecture. "Found rates": the best at 0.08M with rates from a wider search.*"""
CAVEAT = """Since 2026-12-01 we know one caveat: `confirm`'s SOAP, PSGD and Shampoo precondition the vocabulary side of
the embedding, and the paper's [do not](docs/differences.md)."""


class StalePage(RuntimeError):
    """A page was made from other tables or another notebook than those that are there now."""


class ThisPython(AsyncKernelManager):
    """Starts kernels of the Python that runs this, whichever `python3` comes first on JUPYTER_PATH."""

    def _kernel_spec_manager_default(self):
        return KernelSpecManager(kernel_dirs=[])


# --------------------------------------------------------------------------------------------------------- one output


def markdown_output(output: dict) -> dict | None:
    """The output of a cell as it stands on a page; None for what a page leaves out (warnings, progress bars)."""
    if output["output_type"] == "stream":
        return output if output["name"] == "stdout" else None
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return None
    plain = data.get("text/plain", "")
    if found := FIGURE.match(plain.strip()):
        text = f"![{found[1]}]({found[1]}.png)\n"
    elif "text/markdown" in data:
        text = data["text/markdown"]
    elif "<table" in data.get("text/html", ""):
        text = markdown_table(data["text/html"])
    elif "image/png" in data:
        raise ValueError("a figure was shown without plots.save: a page can only link to a saved one")
    else:
        text = f"```\n{plain}\n```\n"
    return {"output_type": "display_data", "data": {"text/markdown": text}, "metadata": {}}


# ------------------------------------------------------------------------------------------------------------ a page


def fingerprint(scale: str, name: str) -> str:
    """16 hex digits of the notebook's source and of every table of the scale."""
    digest = hashlib.sha256()
    cells = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    digest.update(json.dumps([[cell["cell_type"], "".join(cell["source"])] for cell in cells]).encode())
    for folder in dict.fromkeys([scale, parted(scale)[0]]):  # of an optimizer from outside: the scale's, too
        for file in sorted(paths.results(folder).glob("*.csv")):
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def relinked(text: str, scale: str, folder: Path, kind: str) -> str:
    """Links of a notebook as a page in `folder` needs them: other notebooks as pages of that `kind` (md, html)."""
    text = re.sub(r"""(\]\(|href=")(\d\d_\w+)\.ipynb""", rf"\1\2.{kind}", text)
    text = re.sub(rf"""(\]\(|href=")\.\./figures/{re.escape(scale)}/""", r"\1", text)
    return re.sub(r"""(\]\(|href=")\.\./(?!\.\./)""", rf"\1{paths.way_up(folder)}/", text)


def _need_figures(page: Path, text: str, scale: str) -> None:
    """ValueError, with the command that makes it, for a figure that a page shows and that does not lie beside it."""
    for figure in SHOWN.findall(text):
        if not (page.parent / f"{figure}.png").exists():
            raise ValueError(
                f"{page} shows the figure {figure}.png, which is not there: run `make figures SCALE={scale}`"
            )


def executed_notebook(scale: str, name: str) -> Path:
    """Where a notebook lies once it was executed, outputs included."""
    return paths.RUNS / scale / "notebooks" / f"{name}.ipynb"


def write_page(scale: str, name: str, folder: Path) -> Path:
    """The executed notebook as NAME.md and NAME.html in `folder`; returns the former.

    ValueError where it is too large, or a figure is not in the folder.
    """
    import nbconvert
    import nbformat

    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(executed_notebook(scale, name), as_version=4)
    html, _ = nbconvert.HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(notebook)
    paths.write_whole(folder / f"{name}.html", relinked(html, scale, folder, "html"))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            hidden = "setup" in cell.metadata.get("tags", []) or "notebook.begin" in cell.source
            shown = [] if hidden else [markdown_output(output) for output in cell.outputs]
            cell.outputs = [nbformat.from_dict(output) for output in shown if output]
    body, _ = nbconvert.MarkdownExporter(exclude_input=True).from_notebook_node(notebook)
    body = relinked(re.sub(r"\n{3,}", "\n\n", body).strip() + "\n", scale, folder, "md")
    target = folder / f"{name}.md"
    if folder != (drawn := paths.figures(scale)):
        for figure in SHOWN.findall(body):
            for kind in ("png", "pdf"):
                paths.write_whole(folder / f"{figure}.{kind}", (drawn / f"{figure}.{kind}").read_bytes())
    _need_figures(target, body, scale)
    source = f"[source]({paths.way_up(folder)}/notebooks/{name}.ipynb)"
    index = Path(os.path.relpath(paths.pages(parted(scale)[0]), folder), "README.md").as_posix()
    head = f"<!-- made from {fingerprint(scale, name)} -->\n\nScale `{scale}` · {source} · [all pages]({index})\n\n"
    if (size := len((head + body).encode())) > LARGEST:
        raise ValueError(f"the page {name} of {scale} has {size} bytes, more than {LARGEST}")
    paths.write_whole(target, head + body)
    return target


def publish(scale: str, names: list[str]) -> None:
    """What notebooks drew of committed tables, into FIGURES: their figures and pages, the index, the checksums.

    A study's own pages stay where they were drawn.
    """
    drawn, folder = paths.figures(scale), paths.pages(scale)
    if folder != drawn:
        for name in names:
            write_page(scale, name, folder)
    if not parted(scale)[1]:
        write_index(scale)
    if folder != drawn:
        checksums.seal(folder, checksums.PAGES)


# ---------------------------------------------------------------------------------------------------- all of a scale


def page_of(scale: str, name: str) -> Path:
    """Where a page lies; FileNotFoundError, with the command that makes it, where it is not there."""
    page = paths.pages(scale) / f"{name}.md"
    if not page.exists():
        raise FileNotFoundError(f"{page} is not there: run `make figures SCALE={scale}`")
    return page


def names_of(scale: str) -> list[str]:
    """The notebooks of a scale, in reading order; ValueError for a scale that is not there."""
    from beyond_outliers.notebook import notebooks

    return notebooks(Protocol.load(scale))


def said(page: Path, what: str) -> str:
    """The paragraph of a page that begins with **what.**, with its list as running text; ValueError without one."""
    found = re.search(rf"^\*\*{re.escape(what)}\.\*\* (.+(?:\n\n(?:- .+\n)+)?)", page.read_text(), re.MULTILINE)
    if not found:
        raise ValueError(f"{page} has no paragraph that begins with **{what}.**: run `make figures` again")
    return re.sub(r"\s*\n(?:- )?", " ", found[1]).strip()


def write_index(scale: str) -> Path:
    """README.md from the pages that lie beside it: a row a page with its question and its finding.

    ValueError for an unknown scale, FileNotFoundError for a page that is not there.
    """
    if parted(scale)[1]:
        raise ValueError(f"{scale} is an optimizer beside a study: it has one page and no index")
    rows = []
    for name in names_of(scale):
        page = page_of(scale, name)
        title = re.search(r"^# (.+)$", page.read_text(), re.MULTILINE)
        cells = [f"[{title[1] if title else name}]({name}.md)", said(page, "Question"), said(page, "Finding")]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    folder = paths.pages(scale)
    up, tables = paths.way_up(folder), f"data/results/{scale}"
    if folder == paths.figures(scale):
        tables = f"data/runs/{scale}/results"
    head = ["| page | question | finding |", "| --- | --- | --- |"]
    text = [
        f"# What scale `{scale}` found",
        "",
        f"The notebooks, executed on the [tables of this scale]({up}/{tables}); sizes, seeds and rates: "
        f"[{scale}.toml]({up}/data/scales/{scale}.toml). Made again by `make figures SCALE={scale}`.",
        "",
        *head,
        *rows,
        "",
    ]
    explanation = relinked(explained("\n".join(rows)), scale, folder, "md")
    target = folder / "README.md"
    paths.write_whole(target, "\n".join([*text, *([explanation, ""] if explanation else [])]))
    return target


def check_pages(scale: str, names: list[str]) -> None:
    """StalePage, FileNotFoundError, DamagedFile or ValueError, with the command that makes it, for pages that are old
    or missing, lack a figure, or (where they have checksums) are not what was written."""
    checksums.check(paths.pages(scale), remedy=f"run `make figures SCALE={scale}`")
    for name in names:
        page = page_of(scale, name)
        text = page.read_text()
        made_from = text.split(" -->")[0].rpartition(" ")[2]
        if made_from != fingerprint(scale, name):
            raise StalePage(f"{page} was made from other tables or another notebook: run `make figures SCALE={scale}`")
        _need_figures(page, text, scale)


def decisions(scale: str) -> str:
    """The README's first screen: which optimizer for which quantizer, and the verdicts, from the committed tables."""
    from beyond_outliers.claims.decisions import of_confirm, verdicts_in_words

    lines = [
        of_confirm().to_markdown(index=False),
        CAPTION.format(scale=scale),
        CAVEAT,
        verdicts_in_words(scale),
    ]
    return "\n\n".join([BEGIN.format(scale=scale), *lines, END])


def write_decisions(readme: Path, scale: str) -> None:
    """Puts `decisions` between its marks in a file; ValueError where it does not have them."""
    text = readme.read_text()
    begin, end = text.find(BEGIN.format(scale=scale)), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"{readme} lacks the lines {BEGIN.format(scale=scale)!r} and {END!r}")
    paths.write_whole(readme, text[:begin] + decisions(scale) + text[end + len(END) :])
