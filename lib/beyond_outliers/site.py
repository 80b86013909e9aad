"""The executed notebooks as a web site: their HTML and what it links to, laid out as in the repository, and an index.

beyond-outliers site FOLDER SCALE ...    after `make figures` of each scale
"""

import html
import re
import shutil
from pathlib import Path

from beyond_outliers import paths
from beyond_outliers.pages import names_of, page_of

LINKED = (
    "data/*.md",
    "data/*.toml",
    "data/scales/*.toml",
    "data/results/*/*.csv",
    "notebooks/*.ipynb",
    "README.md",
    "docs/*.md",
)


def build(folder: Path, names: list[str]) -> Path:
    """Copies pages (HTML) and what they link to into `folder`; returns its index.

    ValueError for an unknown scale, FileNotFoundError, with the command that makes it, for a page that is not there.
    """
    sections = []
    for scale in names:
        target = folder / "figures" / scale
        target.mkdir(parents=True, exist_ok=True)
        items = []
        for name in names_of(scale):
            source = page_of(scale, name).with_suffix(".html")
            if not source.exists():
                raise FileNotFoundError(f"{source} is not there: run `make figures SCALE={scale}`")
            shutil.copyfile(source, target / source.name)
            title = re.search(r"^# (.+)$", page_of(scale, name).read_text(), re.MULTILINE)
            words = html.escape(title[1] if title else name)
            items.append(f'<li><a href="figures/{scale}/{source.name}">{words}</a></li>')
        for figure in paths.pages(scale).glob("*.png"):
            shutil.copyfile(figure, target / figure.name)
        sections.append(f"<h2>Scale {scale}</h2>\n<ul>\n" + "\n".join(items) + "\n</ul>")
    for source in (file for pattern in LINKED for file in paths.ROOT.glob(pattern)):
        target = folder / source.relative_to(paths.ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    index = folder / "index.html"
    head = '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Beyond outliers</title>'
    head += "\n<h1>Beyond outliers: the notebooks, executed</h1>"
    index.write_text("\n".join([head, *sections, "</html>", ""]))
    return index
