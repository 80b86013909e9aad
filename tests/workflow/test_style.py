"""Texts are read in two minutes: short sentences, few numbers, no private words."""

import json
import re

import pytest

import prose_style
from beyond_outliers import paths

DOCUMENTS = [
    *(paths.ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((paths.ROOT / "docs").glob("*.md")),
]
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))


def markdown(file):
    if file.suffix == ".md":
        return file.read_text()
    cells = json.loads(file.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("file", [*DOCUMENTS, *NOTEBOOKS], ids=lambda file: file.name)
def test_sentences_are_short_and_plain(file):
    assert prose_style.wrong(markdown(file)) == []


def test_the_newest_changes_and_the_help_of_make_have_plain_words():
    newest = (paths.ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    for text in (newest, (paths.ROOT / "Makefile").read_text()):
        assert not re.search("|".join(prose_style.FORBIDDEN), prose_style.plain(text), re.I)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (" ".join(["word"] * 26) + ".", "26 words"),
        ("A rise of 1, 2 and 3 nats.", "3 numbers"),
        ("One (of two) is (almost) there.", "2 brackets"),
        ("It costs 0.1 nats a token.", "'per', not 'a'"),
        ("The loss stands beside it.", "a private word"),
        ("A room of its own.", "'own'"),
        (f"{'word ' * 20}. {'Word ' * 20}.", "20 words on average"),
    ],
)
def test_what_is_hard_to_read_is_found(text, why):
    assert any(line.startswith(why) for line in prose_style.wrong(text))


def test_what_is_not_prose_is_left_out():
    text = "# A title of 1, 2 and 3\n\n| 1 | 2 | 3 |\n\n```\n1 2 3 4\n```\n\nA rise of 0.03 nats [0.01, 0.05]."
    assert prose_style.wrong(text) == []


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_commands_fit_a_terminal_of_80_columns(file):
    blocks = re.findall(r"```\w*\n(.*?)```", file.read_text(), re.S)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 80] == []


def test_the_readme_is_small():
    assert len((paths.ROOT / "README.md").read_bytes()) <= 10_000
