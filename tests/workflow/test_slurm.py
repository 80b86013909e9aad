"""The workflow on a Slurm of one node, this one; skipped, with the reason, where Debian's packages are missing."""

import re
import subprocess
from pathlib import Path

import pytest

from beyond_outliers.study import workflow
from checkouts import Checkout, tables, tiny_study

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "support" / "one_node_slurm.sh"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Its configuration; jobs run in the repository's own environment, as niced as the tests are."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True)
    if started.returncode == 77:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    yield f"{folder}/slurm.conf"
    subprocess.run([SCRIPT, "stop", folder], check=True)


def test_a_study_is_made_by_slurm(slurm, text_file, tmp_path, monkeypatch):
    checkout = Checkout(tmp_path, tiny_study(text_file, full_precision=[1]))
    target = checkout.results.parent / "collected-tiny"
    words = ["--executor", "slurm", "--jobs", "2", "--target", str(target)]
    words += ["--options", "--slurm-init-seconds-before-status-checks 3"]
    process = checkout.start("reproduce", *words, SLURM_CONF=slurm)
    said, log = process.communicate()[0], (target.parent / "reproduce.log").read_text()
    assert process.returncode == 0, said + log[-3000:]
    assert len(tables(checkout.results)["runs.csv"]) == 3
    submitted = re.findall(r"has been submitted with SLURM jobid (\d+)", log)
    assert len(submitted) == 7  # corpus, two of the sweep, choose, a main run, its Common Loss, collect
    assert "No wall time information" not in log and "No job memory information" not in log
    monkeypatch.setenv("SLURM_CONF", slurm)
    asked = subprocess.run(["scontrol", "show", "jobs"], capture_output=True, text=True)
    assert asked.stdout.count("JobState=COMPLETED") == len(submitted)
    assert "TimeLimit=UNLIMITED" not in asked.stdout


def test_where_slurm_keeps_no_accounts_the_queue_is_asked(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm)
    assert workflow.executed("slurm")[-2:] == ["--slurm-status-command", "squeue"]
    monkeypatch.setenv("PATH", "")
    assert "squeue" not in workflow.executed("slurm")
