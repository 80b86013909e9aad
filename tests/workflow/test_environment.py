"""environment.yml, pyproject.toml and the Makefile describe one environment."""

import re
import tomllib
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement

from beyond_outliers import paths

PINS = {}
for line in (paths.ROOT / "environment.yml").read_text().splitlines():
    if found := re.fullmatch(r"      - ([\w.-]+)==(\S+)", line):
        PINS[found[1].replace("_", "-").lower()] = found[2]

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
RANGES = [Requirement(r) for r in PROJECT["dependencies"]]
RANGES += [Requirement(r) for group in PROJECT["optional-dependencies"].values() for r in group]


@pytest.mark.parametrize("requirement", RANGES, ids=lambda r: r.name)
def test_every_range_of_pyproject_is_pinned_within_it(requirement):
    name = requirement.name.replace("_", "-").lower()
    assert name in PINS, f"environment.yml does not pin {name}"
    assert requirement.specifier.contains(PINS[name])


def test_every_pin_has_a_range():
    assert set(PINS) <= {r.name.replace("_", "-").lower() for r in RANGES}


@pytest.mark.parametrize("name", PINS)
def test_the_installed_version_is_the_pinned_one(name):
    assert version(name).split("+")[0] == PINS[name]


def test_the_makefile_reads_the_pins_of_environment_yml():
    """The sed line of the Makefile yields every pin and the editable install, and nothing else."""
    import subprocess

    recipe = (paths.ROOT / "Makefile").read_text()
    script = re.search(r"sed -n '(.*?)' environment.yml", recipe)[1]
    printed = subprocess.run(["sed", "-n", script, "environment.yml"], cwd=paths.ROOT, capture_output=True, text=True)
    lines = printed.stdout.split("\n")[:-1]
    assert lines[-1] == "-e ." and len(lines) == len(PINS) + 1
    assert all("==" in line for line in lines[:-1])


@pytest.mark.slow
def test_lib_imports_without_what_only_notebooks_need():
    """A training node may have little more than torch, numpy, pandas, scipy, safetensors, tokenizers and tqdm."""
    import subprocess
    import sys

    code = """
import sys
for name in ("datasets", "matplotlib", "seaborn", "papermill", "nbconvert", "snakemake", "transformers", "pyarrow"):
    sys.modules[name] = None
import beyond_outliers.train, beyond_outliers.study, beyond_outliers.study.measure
import beyond_outliers.probe, beyond_outliers.claims, beyond_outliers.scaling
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LOCK = (paths.ROOT / "environment.lock").read_text()


def test_the_lock_has_every_pin_with_hashes_and_names_no_host():
    locked = {}
    for entry in re.split(r"\n(?=\S)", LOCK.strip()):
        name, _, rest = entry.partition("==")
        locked.setdefault(name.split("[")[0].replace("_", "-").lower(), []).append(rest)
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", rest), f"environment.lock has no hash of {name}"
    for name, pin in PINS.items():
        assert any(re.match(rf"{re.escape(pin)}\s", rest) for rest in locked.get(name, [])), f"{name}: run `make lock`"
    assert "://" not in LOCK and "index" not in LOCK


@pytest.mark.parametrize(
    ("there", "named", "used"), [("3.11", "3.13", ".venv-3.13"), ("3.11", "3.11", ".venv"), ("", "3.12", ".venv")]
)
def test_a_python_that_is_named_has_an_environment_of_its_own(tmp_path, there, named, used):
    """Interpreters that do nothing but say their version; make only says what it would do."""
    import subprocess

    def interpreter(file, version):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\necho {version}\n")
        file.chmod(0o755)

    if there:
        interpreter(tmp_path / ".venv" / "bin" / "python", there)
    interpreter(tmp_path / "another", named)
    for name in ("environment.yml", "pyproject.toml", "Makefile"):
        (tmp_path / name).write_text((paths.ROOT / name).read_text())
    command = ["make", "--dry-run", "test", f"PYTHON={tmp_path / 'another'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert f"\n{used}/bin/python -m pytest " in done.stdout, done
