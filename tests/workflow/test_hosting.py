"""What opens or publishes the notebooks elsewhere: containers, Binder, GitHub workflows. Parsed here, run there."""

import json
import re
import subprocess

import pytest
import yaml

from beyond_outliers import pages, paths, site
from beyond_outliers.cli import main

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


def test_the_site_is_published_from_the_studies_that_are_committed():
    text = (ROOT / ".github" / "workflows" / "pages.yml").read_text()
    drawn, laid_out = re.search(r"for scale in (.+?);", text)[1], re.search(r"site site (.+)", text)[1]
    assert drawn == laid_out
    assert set(drawn.split()) == {folder.name for folder in paths.RESULTS.iterdir() if folder.is_dir()}


def test_a_site_has_an_index_and_what_its_pages_link_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(site, "names_of", lambda scale: ["03_ptq"])
    (tmp_path / "figures" / "pocket").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="make figures SCALE=pocket"):
        site.build(tmp_path / "site", ["pocket"])
    (tmp_path / "figures" / "pocket" / "03_ptq.md").write_text("# 3. Rounding & co\n")
    with pytest.raises(SystemExit):
        main(["site", str(tmp_path / "site"), "pocket"])
    assert "03_ptq.html is not there: run `make figures SCALE=pocket`" in capsys.readouterr().err
    (tmp_path / "figures" / "pocket" / "03_ptq.html").write_text("page")
    index = site.build(tmp_path / "site", ["pocket"]).read_text()
    assert '<li><a href="figures/pocket/03_ptq.html">3. Rounding &amp; co</a></li>' in index
    for target in ("figures/pocket/03_ptq.html", "data/claims.toml", "data/README.md", "notebooks/03_ptq.ipynb"):
        assert (tmp_path / "site" / target).exists()
    links = re.findall(r"\]\(\.\./\.\./([^)#]+)", (ROOT / "figures" / "laptop" / "07_claims.md").read_text())
    assert links and [link for link in links if not (tmp_path / "site" / link).exists()] == []


def test_an_optimizer_from_outside_has_one_page_and_no_index():
    assert pages.names_of("pocket+lion") == ["10_your_optimizer"]
    pages.check_pages("pocket+lion", pages.names_of("pocket+lion"))
    with pytest.raises(ValueError, match="no index"):
        pages.write_index("pocket+lion")


def test_pages_and_site_name_the_same_pages():
    assert pages.names_of("pocket") == [file.stem for file in sorted((ROOT / "figures" / "pocket").glob("0*.md"))]
