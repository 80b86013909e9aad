"""The site: README, docs and committed pages, by Sphinx and without a network. `make site` builds it in site/."""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
project = html_title = "Beyond outliers"
author = "the contributors of beyond-outliers"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "data/README.md", "data/checkpoints/*/README.md", "figures/**.md"]
exclude_patterns = [".*", "lib", "tests", "site", "data/cache", "data/runs", "data/results"]
myst_heading_anchors = 3
myst_enable_extensions = ["html_image"]
suppress_warnings = ["myst.header"]  # a page that begins with ## after a folded table
html_theme = "furo"
html_static_path = html_css_files = ["site.css"]
html_copy_source = False


OTHERS = ["data/README", "data/checkpoints/confirm/README", "CONTRIBUTING", "CHANGELOG"]


def contents(caption: str, documents: list[str]) -> str:
    """A hidden table of contents: the sidebar, and the next and previous page."""
    return "\n".join(["", "", "```{toctree}", ":hidden:", f":caption: {caption}", "", *documents, "```"])


def pages(folder: Path) -> list[str]:
    """Documents of a folder, its README first, as Sphinx names them from there."""
    return sorted((file.stem for file in folder.glob("*.md")), key=lambda name: (name != "README", name))


def arrange(app, docname: str, source: list[str]) -> None:
    """Adds what a code host has for nothing: the tree of documents; and takes away links to folders."""
    file = ROOT / f"{docname}.md"
    if docname == "README":
        studies = [folder for folder in sorted((ROOT / "figures").glob("[!.]*/")) if folder.name != "confirm"]
        first = [f"figures/confirm/{name}" for name in pages(ROOT / "figures/confirm")]
        others = [f"{folder.name} <figures/{folder.name}/{pages(folder)[0]}>" for folder in studies]
        documents = [f"docs/{name}" for name in pages(ROOT / "docs")]
        source[0] += contents("Findings", first) + contents("Other studies", others)
        source[0] += contents("Documentation", [*documents, *OTHERS])
    elif re.fullmatch("figures/(?!confirm).*/README", docname):
        source[0] += contents("Pages", pages(file.parent)[1:])
    source[0] = re.sub(
        r"\[([^\]]+)\]\(([^)#:]+)\)",
        lambda link: link[1] if (file.parent / link[2]).is_dir() else link[0],
        source[0],
    )


def finish(app, exception) -> None:
    """The README is the index."""
    if exception is None and app.builder.name == "html":
        shutil.copy(app.outdir / "README.html", app.outdir / "index.html")


def setup(app) -> None:
    app.connect("source-read", arrange)
    app.connect("build-finished", finish)
