"""README.md and data/README.md against what is there: columns, links, figures, targets, notebooks."""

import re

import pandas as pd
import pytest

import benchmarking
from beyond_outliers import pages, paths
from beyond_outliers.notebook import notebooks
from beyond_outliers.study import TABLES as STUDY_TABLES

README, DATA = paths.ROOT / "README.md", paths.DATA / "README.md"
CONTRIBUTING = paths.ROOT / "CONTRIBUTING.md"
TABLES = [t for t in sorted(paths.RESULTS.rglob("*.csv")) if t.parent.name != "smoke"]  # smoke is never committed


def explained() -> dict[str, list[str]]:
    """Table -> the columns that data/README.md explains: its rows "| table | `column`, ... | meaning |"."""
    columns = {}
    for table, names, meaning in re.findall(
        r"^\| ([^|`]+) \| (`[^|]+`) \| ([^|]+) \|$", DATA.read_text(), re.MULTILINE
    ):
        assert meaning.strip(), (table, names)
        columns.setdefault(table, []).extend(re.findall(r"`([^`]+)`", names))
    return columns


# "have the columns of runs.csv"
LIKE_RUNS = {"auxiliary_learning_rates.csv", "sgd_baseline.csv"}
LIKE_RUNS |= {f"confirm_{name}.csv" for name in ("adamw_rates", "wider_rates", "low_rates")}


@pytest.mark.parametrize("file", TABLES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_column_of_every_committed_table_is_explained(file):
    known = explained()
    valid = (
        known["*every table of a run*"]
        + known.get(file.name, [])
        + (known["runs.csv"] if file.name in LIKE_RUNS else [])
    )
    assert [column for column in pd.read_csv(file, nrows=1).columns if column not in valid] == []
    assert len(re.findall(rf"^\| {re.escape(file.name)} \| [^`|]", DATA.read_text(), re.MULTILINE)) == 1, (
        "one row: what?"
    )


def test_every_column_that_is_explained_is_there_and_explained_once():
    committed = {}
    for file in TABLES:
        committed.setdefault(file.name, set()).update(pd.read_csv(file, nrows=1).columns)
    committed["*every table of a run*"] = set().union(*committed.values())
    committed["ptq.csv"].add("method")  # in tables from now on
    committed["learning_rates.csv"] |= {"auxiliary", "auxiliary_grid"}  # of tuned scales; none is committed yet
    for table, columns in explained().items():
        assert len(set(columns)) == len(columns), table
        if table in committed:
            assert set(columns) <= committed[table], table
        else:  # no scale that has it is committed yet
            assert table.removesuffix(".csv") in STUDY_TABLES, table


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
    makefile = (paths.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for document, least in ((README, {"reproduce", "test", "figures", "plan"}), (CONTRIBUTING, {"test", "test-fast"})):
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE))
        assert least <= named <= targets, document.name
    helped = set(
        re.findall(r"\bmake ([a-z-]+)", "".join(line for line in makefile.splitlines() if line.startswith("#   ")))
    )
    assert helped == targets - {"help"}, "make help says what every target does"


def test_every_path_that_contributing_names_is_there():
    named = re.findall(r"^- `([^`]+)`: ", CONTRIBUTING.read_text(), re.MULTILINE)
    assert len(named) > 20
    assert [path for path in named if not (paths.ROOT / path).exists()] == []


def test_the_speed_table_is_made_of_the_committed_benchmarks():
    table = benchmarking.read()
    assert table.processor.notna().all() and set(table.columns) == set(benchmarking.COLUMNS)
    assert benchmarking.rendered(table) in README.read_text()
    table.value *= 1.5
    assert benchmarking.rendered(table) not in README.read_text(), "it shows what was measured"


def test_every_target_was_measured_and_every_miss_has_its_reason():
    wanted, table = benchmarking.targets(), benchmarking.read().fillna({"beside": ""})
    rows: dict[tuple, list] = {}  # of every processor
    for row in table.itertuples():
        rows.setdefault((row.benchmark, row.size, row.what, row.beside), []).append(row)
    assert set(wanted) <= set(rows)
    assert {row.target for key in wanted for row in rows[key]} == set(table.target.dropna())
    missed = [key for key in wanted if not all(map(benchmarking.met, rows[key]))]
    assert [key for key in missed if not wanted[key].get("reason")] == []
    assert [key for key in wanted if "reason" in wanted[key] and key not in missed] == [], "reasons of what is met"


def test_the_readme_says_what_the_tables_of_the_confirmatory_study_say():
    """Its findings, word for word; `beyond-outliers pages readme --scale confirm` writes them."""
    block = pages.headlines("confirm")
    assert block in README.read_text()
    rows = pd.read_csv(paths.RESULTS / "confirm" / "verdicts.csv")
    judged = rows[(rows.spec == "W4A4+head") & (rows.optimizers == "six") & (rows.part == "whole")]
    verdicts = judged.verdict.value_counts()
    assert len(judged) == 14
    assert [f"{verdicts[name]} {name}" in block for name in verdicts.index] == [True] * len(verdicts)


def test_the_readme_counts_the_verdicts_of_the_exploratory_study():
    verdicts = pd.read_csv(paths.RESULTS / "laptop" / "claims.csv").verdict.value_counts()
    counts = verdicts["reproduced"], verdicts["not reproduced"], verdicts["undecided"]
    assert "{} claims reproduced, {} not, {} undecided".format(*counts) in README.read_text()


def test_a_changed_table_leaves_the_readme_behind(monkeypatch, tmp_path):
    """The test above can fail: one more nat of damage in every run of Muon."""
    for file in (paths.RESULTS / "confirm").glob("*.csv"):
        (tmp_path / "confirm").mkdir(exist_ok=True)
        (tmp_path / "confirm" / file.name).write_bytes(file.read_bytes())
    before = pages.headlines("confirm")
    table = pd.read_csv(tmp_path / "confirm" / "ptq.csv")
    table.loc[table.run.str.contains("-muon-"), "increase"] += 1
    table.to_csv(tmp_path / "confirm" / "ptq.csv", index=False)
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    cost = r"costs Muon ([\d.]+)"
    after = pages.headlines("confirm")
    assert float(re.search(cost, after)[1]) == pytest.approx(1 + float(re.search(cost, before)[1]))
    assert after not in README.read_text()


def test_the_readme_names_every_wing_and_module_as_it_is():
    library = paths.ROOT / "lib" / "beyond_outliers"
    wings = {folder.parent.name for folder in library.glob("*/__init__.py")}
    text = README.read_text()
    assert set(re.findall(r"^\| \.\.\. `(\w+)/` \|", text, re.MULTILINE)) == wings
    row = re.search(r"^\| `lib/beyond_outliers/` \| (.+) \|$", text, re.MULTILINE)[1]
    assert set(re.findall(r"`(\w+)`", row)) <= {file.stem for file in library.glob("*.py")}


def test_the_executed_page_comes_before_the_source():
    for name in notebooks():
        line = next(line for line in README.read_text().splitlines() if f"(notebooks/{name}.ipynb)" in line)
        executed = re.search(rf"\(figures/[\w+-]+/{name}\.md\)", line)
        assert executed.start() < line.index(f"(notebooks/{name}.ipynb)")


def test_the_citation_says_version_and_date_and_what_of_the_papers_code_is_public():
    citation = (paths.ROOT / "CITATION.cff").read_text()
    version = re.search(r'^version = "(.+)"', (paths.ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in citation and re.search(r'^date-released: "20\d\d-\d\d-\d\d"$', citation, re.M)
    for text in (citation, README.read_text()):
        assert "alexa" in text and "shipped no code" not in text


@pytest.mark.parametrize("folder", sorted(paths.FIGURES.glob("*/")), ids=lambda folder: folder.name)
def test_every_committed_figure_is_on_a_page(folder):
    """Figures of sizes or names that are gone would stay for good: nothing draws them again."""
    shown = "".join(page.read_text() for page in folder.glob("*.md"))
    assert [file.name for file in folder.glob("*.p[nd][gf]") if f"{file.stem}.png" not in shown] == []
