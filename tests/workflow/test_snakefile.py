"""What Snakemake plans to do, from nothing and from a complete study."""

import os
import re
import subprocess
import sys

import pytest

from beyond_outliers import paths
from beyond_outliers.config import OPTIMIZER_NAMES
from beyond_outliers.notebook import notebooks
from beyond_outliers.study import Study

pytestmark = pytest.mark.slow


def dry_run(scale, folder):
    """What Snakemake would do for a scale whose results, runs and figures lie in `folder`."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", f"scale={scale}", "--dry-run"]
    command += ["--directory", str(folder), "--snakefile", str(paths.ROOT / "Snakefile")]
    environment = {**os.environ, "BEYOND_OUTLIERS_OUTPUT": str(folder)}
    plan = subprocess.run(command, capture_output=True, text=True, cwd=paths.ROOT, env=environment)
    assert plan.returncode == 0, plan.stderr[-2000:]
    return plan.stdout + plan.stderr


def jobs_of(text):
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", text, re.M)}


def test_the_workflow_plans_one_job_a_run(tmp_path):
    """From nothing, Snakemake sees the sweep's runs; the main runs follow when the learning rates are known."""
    jobs = jobs_of(dry_run("smoke", tmp_path))
    assert (jobs["corpus"], jobs["train"], jobs["choose"], jobs["claims"], jobs["notebook"], jobs["index"]) == (
        1,
        12,
        1,
        1,
        len(notebooks()),
        1,
    )


def test_the_workflow_plans_one_job_a_search_of_a_tuned_scale(tmp_path):
    """Which runs a search asks for is known only run by run: one job a size and optimizer."""
    text = dry_run("confirm", tmp_path)
    jobs = jobs_of(text)
    assert (jobs["corpus"], jobs["tune"], jobs["choose"], jobs["notebook"]) == (
        1,
        18,
        3,
        len(notebooks()),
    ) and "train" not in jobs
    found = re.findall(r"^rule tune:\n(?:    .*\n)*?    wildcards: optimizer=(\S+), size=(\S+)\n", text, re.M)
    assert set(found) == {(name, size) for size in ("0.08M", "0.16M", "0.26M") for name in OPTIMIZER_NAMES}


def test_the_workflow_prefers_the_order_of_the_protocol(tmp_path):
    """Snakemake starts the job of highest priority first: sizes in turn, their runs as the protocol lists them."""
    text = dry_run("laptop", tmp_path)
    found = re.findall(r"^rule train:\n(?:    .*\n)*?    wildcards: run=(\S+)\n    priority: (\d+)", text, re.M)
    planned = [p.config.name for p in Study("laptop").protocol.sweep_runs()]
    assert [run for run, _ in sorted(found, key=lambda job: -int(job[1]))] == planned
    assert len({priority for _, priority in found}) == len(planned) > 0


def test_the_workflow_does_a_deleted_run_again(study, tmp_path):
    """With everything there nothing is done; without one run's folder that run, and all that hangs on it."""
    rates = tmp_path / "data" / "runs" / "smoke" / "results" / "learning_rates.csv"
    rates.parent.mkdir(parents=True)
    rates.write_bytes((study.results / "learning_rates.csv").read_bytes())
    work, sizes = tmp_path / "data" / "runs" / "smoke", study.protocol.sizes
    purposes = [f"measured-{purpose}-{size}" for size in sizes for purpose in study.protocol.purposes(size)]
    for files in (  # from what is needed to what needs it
        [work / "corpus.json"],
        [work / p.config.name / "result.json" for p in study.protocol.sweep_runs()],
        [work / f"chosen-{size}.txt" for size in sizes if "sweep" in study.protocol.purposes(size)],
        [work / p.config.name / "result.json" for p in study.planned() if p.purpose != "sweep"],
        [work / name for name in purposes],
        [work / f"collected-{size}" for size in sizes],
        [work / "claims.done"],
        [work / "notebooks" / f"{name}.done" for name in notebooks()],
        [work / "index.done"],
    ):
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.touch()
    assert "Nothing to be done" in dry_run("smoke", tmp_path)
    lost = next(p.config.name for p in study.planned("small") if p.purpose == "full_precision")
    (work / lost / "result.json").unlink()
    text = dry_run("smoke", tmp_path)
    jobs = jobs_of(text)
    assert f"run={lost}" in text and jobs["train"] == jobs["index"] == 1 and jobs["notebook"] == len(notebooks())
    assert "choose" not in jobs and jobs["measure"] == jobs["claims"] == 1


def test_every_word_that_goes_to_the_shell_is_quoted():
    commands = re.findall(r'^    shell:\n((?:        ".*"\n)+)', (paths.ROOT / "Snakefile").read_text(), re.M)
    words = [word for command in commands for word in re.findall(r"\{[^}]*\}", command)]
    assert len(commands) == 9 and len(words) > 20
    assert [word for word in words if not word.endswith(":q}")] == []


def test_a_folder_with_spaces_quotes_and_umlauts_will_do(tmp_path):
    folder = tmp_path / """ö b'c "d" $(touch PWNED)"""
    folder.mkdir()
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--config", "scale=smoke", "--until", "corpus"]
    command += ["--directory", str(folder), "--snakefile", str(paths.ROOT / "Snakefile")]
    environment = {**os.environ, "BEYOND_OUTLIERS_OUTPUT": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=paths.ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tokens" in (folder / "data" / "runs" / "smoke" / "corpus.json").read_text()
    assert not list(paths.ROOT.glob("**/PWNED")) and not list(folder.glob("**/PWNED"))
