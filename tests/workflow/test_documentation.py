"""README.md and data/README.md against what is there: columns, links, figures, targets, notebooks."""

import re

import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.notebook import notebooks

README, DATA = paths.ROOT / "README.md", paths.DATA / "README.md"
TABLES = [t for t in sorted(paths.RESULTS.rglob("*.csv")) if t.parent.name != "smoke"]  # smoke is never committed


def paragraph(table: str) -> str:
    """What data/README.md says of a table: from its bold name to the next blank line."""
    found = re.search(rf"^\*\*{re.escape(table)}\*\*.*?(?=\n\n|\Z)", DATA.read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"data/README.md has no paragraph on {table}"
    return found[0]


@pytest.mark.parametrize("file", TABLES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_column_of_every_committed_table_is_explained(file):
    everywhere = DATA.read_text().split("**runs.csv**")[0]  # what all tables have
    like_runs = paragraph("runs.csv") if "columns of runs.csv" in paragraph(file.name) else ""
    text = everywhere + paragraph(file.name) + like_runs
    assert [column for column in pd.read_csv(file, nrows=1).columns if f"`{column}`" not in text] == []


@pytest.mark.parametrize("document", [README, DATA], ids=["README.md", "data/README.md"])
def test_links_and_figures_exist(document):
    text = document.read_text()
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target for target in targets if "://" not in target]
    assert len(local) > 10 or document == DATA
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_every_notebook_has_a_line_and_a_thumbnail():
    lines = README.read_text().splitlines()
    for name in notebooks():
        rows = [line for line in lines if f"(notebooks/{name}.ipynb)" in line and "<img src=" in line]
        assert len(rows) == 1, name


def test_every_make_target_named_is_there():
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README.read_text(), re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", (paths.ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"reproduce", "test", "figures", "plan"} <= named <= targets


def test_the_optimizer_table_shows_the_measured_milliseconds():
    """The README's table is typed from data/results/benchmarks.csv; measuring again must not leave it behind."""
    table = pd.read_csv(paths.RESULTS / "benchmarks.csv").query("benchmark == 'optimizer step' and size == '6x256'")
    ours = table[table.implementation == "ours"].set_index("optimizer")["mean"]
    shown = dict(
        re.findall(r"^\| (AdamW|Muon|PSGD|Scion|Shampoo|SOAP) \| ([\d.]+) \|", README.read_text(), re.MULTILINE)
    )
    assert {name.lower(): float(value) for name, value in shown.items()} == pytest.approx(dict(ours), rel=0.01)


def test_the_readme_counts_the_verdicts_of_the_study_proper():
    verdicts = pd.read_csv(paths.RESULTS / "laptop" / "claims.csv").verdict.value_counts()
    said = re.search(r"(\d+) reproduced,\s(\d+)\snot\sreproduced,\s(\d+)\sundecided", README.read_text())
    assert dict(zip(["reproduced", "not reproduced", "undecided"], map(int, said.groups()), strict=True)) == dict(
        verdicts
    )
