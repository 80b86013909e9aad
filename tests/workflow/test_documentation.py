"""README.md, docs and data/README.md against what is there: columns, links, figures, targets, notebooks."""

import re

import pandas as pd
import pytest

import benchmarking
from beyond_outliers import pages, paths
from beyond_outliers.claims import decisions
from beyond_outliers.claims.estimates import label
from beyond_outliers.notebook import notebooks
from beyond_outliers.study import TABLES as STUDY_TABLES

README, DATA = paths.ROOT / "README.md", paths.DATA / "README.md"
CONTRIBUTING = paths.ROOT / "CONTRIBUTING.md"
SPEED = paths.ROOT / "docs" / "speed.md"
DOCS = sorted((paths.ROOT / "docs").glob("*.md"))
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


@pytest.mark.parametrize("document", [README, DATA, *DOCS], ids=lambda file: f"{file.parent.name}/{file.name}")
def test_links_and_figures_exist(document):
    text = document.read_text()
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target for target in targets if "://" not in target]
    assert len(local) > 10 or document != README
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_the_index_names_every_document():
    index = (paths.ROOT / "docs" / "README.md").read_text()
    assert [file.name for file in DOCS if f"]({file.name})" not in index and file.name != "README.md"] == []


def test_every_notebook_has_a_line_and_a_thumbnail():
    lines = README.read_text().splitlines()
    for name in notebooks():
        (row,) = [line for line in lines if f"(notebooks/{name}.ipynb)" in line and "<img src=" in line]
        assert re.search(rf"\(figures/[\w+-]+/{name}\.md\).*\(notebooks/", row)  # the executed page, then the source


def test_every_make_target_named_is_there():
    makefile = (paths.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    expected = {README: {"reproduce", "lab", "verify"}, CONTRIBUTING: {"test", "test-fast"}}
    for document in (*expected, *DOCS):
        least = expected.get(document, set())
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
    assert benchmarking.rendered(table) in SPEED.read_text()
    table.value *= 1.5
    assert benchmarking.rendered(table) not in SPEED.read_text(), "it shows what was measured"


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
    """Its decisions, word for word; `beyond-outliers pages readme --scale confirm` writes them."""
    block = pages.decisions("confirm")
    assert block in README.read_text()
    assert pages.model_card("confirm") == (paths.CHECKPOINTS / "confirm" / "README.md").read_text()
    assert pages.rules() == (paths.ROOT / "docs" / "rules.md").read_text()
    rows = pd.read_csv(paths.RESULTS / "confirm" / "verdicts.csv")
    judged = rows[(rows.spec == "W4A4+head") & (rows.optimizers == "six") & (rows.part == "whole")]
    verdicts = judged.verdict.value_counts()
    assert len(judged) == 14
    assert [f"{verdicts[name]} {name}" in block for name in verdicts.index] == [True] * len(verdicts)


def test_decisions_name_who_ends_lowest_under_each_quantizer():
    """Against means of the tables by plain pandas: over seeds, then over sizes at which all six were measured."""
    table = pd.read_csv(paths.RESULTS / "confirm" / "ptq.csv", dtype={"size": str})
    runs = pd.read_csv(paths.RESULTS / "confirm" / "runs.csv", dtype={"size": str})
    main = runs[runs.purpose.str.contains("full_precision") & (runs.seed >= 200)][["run", "size", "optimizer"]]
    table = table[table.checkpoint == "final"][["run", "spec", "val_loss"]].merge(main, on="run")
    shown = decisions.of_confirm().set_index("you deploy with")
    for intention, spec in decisions.INTENTIONS.items():
        if spec not in (None, "QAT"):
            means = table[table.spec == spec].groupby(["size", "optimizer"]).val_loss.mean().unstack().dropna().mean()
            best, second = means.sort_values().index[:2]
            row = shown.loc[intention]
            assert row["train with"].startswith(f"**{label(best)}"), intention
            gap = means[second] - means[best]
            assert row["runner-up, nats above"].startswith(f"{label(second)} +{gap:.3f}"), intention


def test_the_history_counts_runs_and_hours():
    text = (paths.ROOT / "docs" / "history.md").read_text()
    for scale in ("laptop", "confirm", "llama", "pocket"):
        runs = pd.read_csv(paths.RESULTS / scale / "runs.csv")
        row = re.search(rf"^\| `{scale}` \| [^|]+ \| (\d+) \| ([\d.]+) \|", text, re.MULTILINE)
        assert int(row[1]) == len(runs) and float(row[2]) == round(runs.seconds.sum() / 3600, 1)


def test_the_citation_says_version_and_date_and_what_of_the_papers_code_is_public():
    citation = (paths.ROOT / "CITATION.cff").read_text()
    version = re.search(r'^version = "(.+)"', (paths.ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in citation and re.search(r'^date-released: "20\d\d-\d\d-\d\d"$', citation, re.M)
    for text in (citation, (paths.ROOT / "docs" / "differences.md").read_text()):
        assert "alexa" in text and "shipped no code" not in text


@pytest.mark.parametrize("folder", sorted(paths.FIGURES.glob("[!.]*/")), ids=lambda folder: folder.name)
def test_every_committed_figure_is_on_a_page(folder):
    """Figures of sizes or names that are gone would stay for good: nothing draws them again."""
    shown = "".join(page.read_text() for page in folder.glob("*.md"))
    assert [file.name for file in folder.glob("*.p[nd][gf]") if f"{file.stem}.png" not in shown] == []
