"""What opens or publishes the notebooks elsewhere: containers, Binder, GitHub workflows. Parsed here, run there."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
import yaml

from beyond_outliers import paths

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


class Links(HTMLParser):
    def __init__(self, file):
        super().__init__()
        self.targets, self.anchors = set(), set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        self.targets |= {value for name, value in attributes if name in ("href", "src") and value}
        self.anchors |= {value for name, value in attributes if name == "id"}


def broken(site):
    """(page, target) of every link that leads nowhere within the site."""
    pages = {file: Links(file) for file in site.rglob("*.html") if "_static" not in file.parts}
    lost = []
    for file, links in pages.items():
        for target in links.targets:
            path, _, anchor = unquote(target).partition("#")
            there = (file.parent / path.partition("?")[0]).resolve() if path else file
            known = pages[there].anchors if there in pages else {anchor}
            if not re.match(r"\w+:", target) and (not there.is_file() or (anchor and anchor not in known)):
                lost.append((file.relative_to(site).as_posix(), target))
    return lost


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_no_link_of_it_is_broken(tmp_path):
    """The command of `make site`."""
    site = (tmp_path / "site").resolve()
    options = re.search(r"-m sphinx (.+) \. site", (ROOT / "Makefile").read_text())[1].split()
    command = [sys.executable, "-m", "sphinx", *options, "-d", tmp_path / "doctrees", ".", site]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = [f"figures/{scale}/README.html" for scale in ("confirm", "pocket")]
    assert [page for page in ("index.html", "docs/rules.html", *pages) if not (site / page).exists()] == []
    assert broken(site) == []
    (site / "docs" / "terms.html").write_text("no heading here")
    assert ("data/README.html", "../docs/terms.html") not in broken(site)
    (site / "docs" / "terms.html").unlink()
    assert ("data/README.html", "../docs/terms.html") in broken(site)
