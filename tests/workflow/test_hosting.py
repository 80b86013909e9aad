"""What opens or publishes the notebooks elsewhere: containers, Binder, GitHub workflows. Parsed here, run there."""

import json
import re
import subprocess

import pytest
import yaml

from beyond_outliers import pages, paths

ROOT = paths.ROOT
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PYTHON = re.search(r"- python=([\d.]+)", (ROOT / "environment.yml").read_text())[1]


def test_the_container_makes_the_environment_and_opens_it():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert container["image"].endswith(f":{PYTHON}")
    assert container["postCreateCommand"].removeprefix("make ") in TARGETS
    interpreter = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert interpreter.startswith(re.search(r"^VENV +:= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1])


def test_binder_reads_the_pins_as_the_makefile_does():
    script = ROOT / ".binder" / "postBuild"
    assert script.stat().st_mode & 0o100 and subprocess.run(["bash", "-n", script]).returncode == 0
    expression = re.search(r"sed -n '(.*?)' environment.yml", script.read_text())[1]
    assert f"sed -n '{expression}' environment.yml" in (ROOT / "Makefile").read_text()
    assert (ROOT / ".binder" / "runtime.txt").read_text() == f"python-{PYTHON}\n"


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_calls_what_is_there(file):
    workflow = yaml.safe_load(file.read_text())
    assert workflow["permissions"]["contents"] == "read" and True in workflow  # YAML takes the key `on` for true
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
            script = step.get("run", "")
            assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
            assert set(re.findall(r"make ([a-z-]+)", script)) <= TARGETS
            for module in re.findall(r"-m ([\w.]+)", script):
                assert (ROOT / "lib" / (module.replace(".", "/") + ".py")).exists(), module


def test_the_site_leaves_out_nothing_that_its_pages_link_to():
    """Jekyll turns the committed Markdown into pages; what it excludes, no page may link to."""
    excluded = yaml.safe_load((ROOT / "_config.yml").read_text())["exclude"]
    assert "jekyll-build-pages" in (ROOT / ".github" / "workflows" / "pages.yml").read_text()
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "figures").glob("[!.]*/*.md")]
    links = [(page, link) for page in documents for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert len(links) > 100
    targets = {(page.parent / link).resolve().relative_to(ROOT).as_posix() for page, link in links}
    allowed = {"tests/benchmarks", "tests/workflow/test_slurm.py"}  # sources, for readers of the repository
    assert [t for t in targets - allowed if any(t == e or t.startswith(f"{e}/") for e in excluded)] == []


def test_an_optimizer_from_outside_has_one_page_and_no_index():
    assert pages.names_of("pocket+lion") == ["10_your_optimizer"]
    pages.check_pages("pocket+lion", pages.names_of("pocket+lion"))
    with pytest.raises(ValueError, match="no index"):
        pages.write_index("pocket+lion")
