"""Executed notebooks as pages, in Markdown and HTML, with the figures they show: in data/runs/SCALE/figures, and of
committed tables in figures/SCALE.

nbconvert writes them. What changes from run to run without a change of substance (commit, versions) is left out, so the
same tables give the same bytes. The first line is a fingerprint of the notebook's source and of the scale's tables, by
which a stale page is recognised.

beyond-outliers pages index --scale laptop     figures/laptop/README.md, a row per page
beyond-outliers pages check --scale laptop     whether every page is there and of these tables
beyond-outliers pages readme --scale confirm   the decision table in README.md, and docs/rules.md
"""

import hashlib
import json
import os
import re
from pathlib import Path

import pandas as pd
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from beyond_outliers import checksums, paths
from beyond_outliers.config.outside import parted
from beyond_outliers.config.protocol import Protocol
from beyond_outliers.terms import explained

# code by hand in full, other code of several lines folded; a figure as a link to the file that `plots.save` wrote;
# no warnings, no bars
TEMPLATE = """{%- extends 'markdown/index.md.j2' -%}
{%- block input -%}{%- if 'by-hand' in cell.metadata.tags -%}{{ super() }}
{%- elif cell.metadata.tags | length == 0 and 'notebook.finding(' not in cell.source and '\n' in cell.source %}
<details><summary>code</summary>
{{ super() }}
</details>
{% endif -%}{%- endblock input -%}
{%- block stream -%}{%- if output.name == 'stdout' -%}{{ super() }}{%- endif -%}{%- endblock stream -%}
{%- block data_png -%}
{%- set image = output.metadata.get('image/png', {}) -%}
<img src="{{ image.figure }}.png" width="{{ image.width }}" alt="{{ image.alt or image.figure }}">
{%- if image.caption %}

*{{ image.caption }}*{%- endif %}
{% endblock data_png -%}
{%- block data_text -%}
{%- if 'application/vnd.jupyter.widget-view+json' not in output.data -%}{{ super() }}{%- endif -%}
{%- endblock data_text -%}"""
SETTINGS = {  # of nbconvert; figures are files already
    "TagRemovePreprocessor": {"enabled": True, "remove_all_outputs_tags": {"setup"}},
    "ExtractOutputPreprocessor": {"enabled": False},
}
SHOWN = re.compile(r'<img src="([^"]*)\.png"')  # a figure on a page
LARGEST = 150_000  # bytes per page
BEGIN, END = "<!-- decisions of scale {scale}: beyond-outliers pages readme -->", "<!-- end of decisions -->"
CAPTION = """*Lowest loss on held-out text in scale [{scale}](figures/{scale}/README.md): three sizes of at most 0.26M
parameters, `runs` per optimizer. Brackets: 95 % interval of the gap. In parentheses: not told apart from the best.
W4A4: weights and activations in 4 bits. RTN rounds to nearest. QAT trains in 4 bits. The output head is rounded,
unless it is kept. Llama: whether the best of AdamW, Muon and Shampoo, the three tried there, is the same. Better
rates: the best at 0.08M after a wider search for AdamW and PSGD. A dash: not measured. The same table at equal
schedules awaits scale `confirm2`.*"""
CAVEAT = """Since 2026-12-01 we know one caveat: `confirm`'s SOAP, PSGD and Shampoo precondition the vocabulary side of
the embedding, and the paper's [do not](docs/differences.md)."""


class StalePage(RuntimeError):
    """A page was made from other tables or another notebook than those that are there now."""


class ThisPython(AsyncKernelManager):
    """Starts kernels of the Python that runs this, whichever `python3` comes first on JUPYTER_PATH."""

    def _kernel_spec_manager_default(self):
        return KernelSpecManager(kernel_dirs=[])


def fingerprint(scale: str, name: str) -> str:
    """16 hex digits of the notebook's source and of every table of the scale."""
    cells = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    digest = hashlib.sha256(json.dumps([[cell["cell_type"], "".join(cell["source"])] for cell in cells]).encode())
    for folder in dict.fromkeys([scale, parted(scale)[0]]):  # of an optimizer from outside: the scale's, too
        for file in sorted(paths.results(folder).glob("*.csv")):
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def relinked(text: str, scale: str, folder: Path, kind: str) -> str:
    """Links of a notebook as a page in `folder` needs them: other notebooks as pages of that `kind` (md, html)."""
    text = re.sub(r"""(\]\(|href=")(\d\d_\w+)\.ipynb""", rf"\1\2.{kind}", text)
    text = re.sub(rf"""(\]\(|href=")\.\./figures/{re.escape(scale)}/""", r"\1", text)
    return re.sub(r"""(\]\(|href=")\.\./(?!\.\./)""", rf"\1{paths.way_up(folder)}/", text)


def executed_notebook(scale: str, name: str) -> Path:
    """Where a notebook lies once it was executed, outputs included."""
    return paths.RUNS / scale / "notebooks" / f"{name}.ipynb"


def write_page(scale: str, name: str, folder: Path) -> Path:
    """The executed notebook as NAME.md and NAME.html in `folder`, figures included; returns the former.

    ValueError where the page is too large, or a figure was shown without `plots.save`.
    """
    import nbconvert
    from traitlets.config import Config

    folder.mkdir(parents=True, exist_ok=True)
    source = str(executed_notebook(scale, name))
    html, _ = nbconvert.HTMLExporter(exclude_input=True, config=Config(SETTINGS)).from_filename(source)
    paths.write_whole(folder / f"{name}.html", relinked(html, scale, folder, "html"))
    body, _ = nbconvert.MarkdownExporter(raw_template=TEMPLATE, config=Config(SETTINGS)).from_filename(source)
    body = relinked(re.sub(r"\n{3,}", "\n\n", body).strip() + "\n", scale, folder, "md")
    for figure in SHOWN.findall(body):
        if not figure:
            raise ValueError(f"{name} shows a figure without plots.save: a page can only link to a saved one")
        for kind in ("png", "pdf"):
            drawn = paths.figures(scale) / f"{figure}.{kind}"
            if drawn.parent != folder:
                paths.write_whole(folder / drawn.name, drawn.read_bytes())
    index = Path(os.path.relpath(paths.pages(parted(scale)[0]), folder), "README.md").as_posix()
    where = f"[source]({paths.way_up(folder)}/notebooks/{name}.ipynb) · [all pages]({index})"
    scope = "" if name.startswith("08_") else f"Scale `{scale}` · "  # a checkpoint of yours is of no scale
    text = f"<!-- made from {fingerprint(scale, name)} -->\n\n{scope}{where}\n\n{body}"
    if (size := len(text.encode())) > LARGEST:
        raise ValueError(f"the page {name} of {scale} has {size} bytes, more than {LARGEST}")
    paths.write_whole(folder / f"{name}.md", text)
    return folder / f"{name}.md"


def publish(scale: str, names: list[str]) -> None:
    """Pages and figures of committed tables into figures/SCALE, their index and checksums; a study's own stay."""
    folder = paths.pages(scale)
    committed = folder != paths.figures(scale)
    for name in names if committed else ():
        write_page(scale, name, folder)
    if not parted(scale)[1]:
        write_index(scale)
    if committed:
        checksums.seal(folder, checksums.PAGES)


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


def first_finding(page: Path) -> str:
    """The first sentence of a page's finding, which is in plain words; ValueError where the page has none."""
    found = re.search(r"^\*\*Finding\.\*\* (.+?[.:])(?= |$)", page.read_text(), re.MULTILINE)
    if not found:
        raise ValueError(f"{page} has no paragraph that begins with **Finding.**: run `make figures` again")
    return found[1]


def _row(cells: list[str]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_index(scale: str) -> Path:
    """README.md from the pages that lie there: a row per page with its question and the first sentence of its finding.

    ValueError for an unknown scale, FileNotFoundError for a page that is not there.
    """
    if parted(scale)[1]:
        raise ValueError(f"{scale} is an optimizer next to a study: it has one page and no index")
    rows = []
    for name in names_of(scale):
        page = page_of(scale, name)
        title = re.search(r"^# (.+)$", page.read_text(), re.MULTILINE)
        cells = [f"[{title[1] if title else name}]({name}.md)", first_finding(page)]
        rows.append(_row(cells))
    folder = paths.pages(scale)
    up, tables = paths.way_up(folder), "results" if folder == paths.FIGURES / scale else "runs"
    text = [
        f"# What scale `{scale}` found",
        f"The notebooks, executed on the [tables of this scale]({up}/data/{tables}/{scale}). Sizes, seeds and rates: "
        f"[{scale}.toml]({up}/data/scales/{scale}.toml). `make figures SCALE={scale}` makes the pages again.",
        "\n".join(["| page | finding |", "| --- | --- |", *rows]),
        relinked(explained("\n".join(rows)), scale, folder, "md"),
    ]
    paths.write_whole(folder / "README.md", "\n\n".join(filter(None, text)) + "\n")
    return folder / "README.md"


def check_pages(scale: str, names: list[str]) -> None:
    """StalePage, FileNotFoundError or DamagedFile, with the command that makes it, for pages that are old, missing, or
    (where they have checksums, which cover figures) not what was written."""
    checksums.check(paths.pages(scale), remedy=f"run `make figures SCALE={scale}`")
    for name in names:
        page = page_of(scale, name)
        if f"made from {fingerprint(scale, name)} -->" not in page.read_text():
            raise StalePage(f"{page} was made from other tables or another notebook: run `make figures SCALE={scale}`")


def decisions(scale: str) -> str:
    """The README's first screen: which optimizer for which quantizer, and the verdicts, from the committed tables."""
    from beyond_outliers.claims.decisions import of_confirm, verdicts_in_words

    parts = [of_confirm().to_markdown(index=False), CAPTION.format(scale=scale), CAVEAT, verdicts_in_words(scale)]
    return "\n\n".join([BEGIN.format(scale=scale), *parts, END])


def rules() -> str:
    """The rule of every claim at every scale, as docs/rules.md has it."""
    from beyond_outliers.claims.verdicts import FROZEN, read_rules, texts

    parts = ["# The rules\n\nHow each claim of the paper is judged. `beyond-outliers pages readme` writes this page."]
    files = {f"`{scale}`": FROZEN[scale][1] for scale in FROZEN} | {"all others": "claims.toml"}
    read = {f"[{scale}](../data/{name})": read_rules(name) for scale, name in files.items()}
    for claim, text in texts().items():
        parts.append(
            f"## {claim}\n\n{text}.\n\n| scale | statistic | unit | would change it |\n| --- | --- | --- | --- |"
        )
        for scale, rules in read.items():
            cells = [scale, *(rules[claim].get(column, "") for column in ("statistic", "unit", "changes"))]
            parts[-1] += f"\n{_row(cells)}"
    return "\n\n".join(parts) + "\n"


CARD = """---
license: apache-2.0
tags: [quantization, optimizers, small-language-model]
---
# Checkpoints of scale `{scale}`

Final weights in bfloat16: one seed per size, optimizer and kind of training. They are made for replay:
`beyond-outliers replay --scale {scale}` measures them again. Each file has its run's settings in its metadata.
`beyond_outliers.study.checkpoints.load_checkpoint` opens it.

- **Text.** API documentation (Apache-2.0). [docs/data.md](../../../docs/data.md) has sources and licences.
- **Limits.** The models know little else than that text, and no instruction. They are for measurements alone.
- **Loss.** Nats per token on held-out text, before rounding to bfloat16.

{table}
"""


def model_card(scale: str) -> str:
    """README.md of a scale's committed checkpoints, from their names and the table of runs."""
    names = sorted(file.stem for file in (paths.CHECKPOINTS / scale).glob("*.safetensors"))
    runs = pd.read_csv(paths.RESULTS / scale / "runs.csv").set_index("run").loc[names]
    columns = ["size", "optimizer", "scheme", "seed", "lr", "tokens", "val_loss"]
    return CARD.format(scale=scale, table=runs[columns].reset_index().to_markdown(index=False))


def write_decisions(readme: Path, scale: str) -> None:
    """Puts `decisions` between its marks in a file; ValueError where it does not have them."""
    text = readme.read_text()
    begin, end = text.find(BEGIN.format(scale=scale)), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"{readme} lacks the lines {BEGIN.format(scale=scale)!r} and {END!r}")
    paths.write_whole(readme, text[:begin] + decisions(scale) + text[end + len(END) :])
