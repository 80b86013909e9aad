"""What Snakemake plans to do, from nothing and from a complete study."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from beyond_outliers import checksums, paths
from beyond_outliers.config import OPTIMIZER_NAMES
from beyond_outliers.notebook import notebooks
from beyond_outliers.study import Study
from beyond_outliers.study.tables import read_table

pytestmark = pytest.mark.slow


def dry_run(scale, folder, *settings, target="all"):
    """What Snakemake would do for a scale whose results, runs and figures lie in `folder`."""
    command = [sys.executable, "-m", "snakemake", target, "--cores", "2", "--config", f"scale={scale}", *settings]
    command += ["--dry-run", "--rerun-triggers", "mtime"]
    command += ["--directory", str(folder), "--snakefile", str(paths.ROOT / "Snakefile")]
    environment = {**os.environ, "BEYOND_OUTLIERS_OUTPUT": str(folder)}
    plan = subprocess.run(command, capture_output=True, text=True, cwd=paths.ROOT, env=environment)
    assert plan.returncode == 0, plan.stderr[-2000:]
    return plan.stdout + plan.stderr


def jobs_of(text):
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", text, re.M)}


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
    found = re.findall(
        r"^rule train:\n(?:    .*\n)*?    wildcards: run=(\S+), level=light\n    priority: (\d+)", text, re.M
    )
    planned = [p.config.name for p in Study("laptop").protocol.sweep_runs()]
    assert [run for run, _ in sorted(found, key=lambda job: -int(job[1]))] == planned
    assert len({priority for _, priority in found}) == len(planned) > 0


def trained(text):
    """(run, priority) of the jobs that train, highest priority first."""
    found = re.findall(
        r"^rule train:\n(?:    .*\n)*?    wildcards: run=(\S+), level=full\n    priority: (\d+)", text, re.M
    )
    return [run for run, _ in sorted(found, key=lambda job: -int(job[1]))]


def with_tables(folder, scale, *names):
    """The committed tables of these names as the study's own."""
    results = folder / "data" / "runs" / scale / "results"
    results.mkdir(parents=True)
    for name in names:
        (results / f"{name}.csv").write_bytes((paths.RESULTS / scale / f"{name}.csv").read_bytes())
    return results


def test_parts_of_a_plan_are_disjoint_complete_and_keep_blocks_together(tmp_path):
    with_tables(tmp_path, "llama", "learning_rates")
    study = Study("llama", paths.RESULTS / "llama")
    planned = {p.config.name: p for p in study.planned() if p.purpose != "sweep"}
    parts = [trained(dry_run("llama", tmp_path, "rows=1", f"shard={i}/2", target="tables")) for i in (1, 2)]
    assert sorted(parts[0] + parts[1]) == sorted(planned) and all(parts)
    for part in parts:
        blocks = [planned[name].config.seed for name in part if planned[name].purpose == "full_precision"]
        assert all(blocks.count(seed) == len(study.protocol.optimizers) for seed in blocks)
        quantized = [planned[name].purpose == "qat" for name in part]
        assert quantized == sorted(quantized), "with rows that count, quantized runs come last"


def test_rows_that_are_committed_count_as_done_and_lost_ones_are_made_again(tmp_path):
    results = with_tables(tmp_path, "llama", *(f.stem for f in (paths.RESULTS / "llama").glob("*.csv")))
    jobs = jobs_of(dry_run("llama", tmp_path, "rows=1", target="tables"))
    assert not {"train", "tune", "choose", "common"} & set(jobs)
    assert jobs_of(dry_run("llama", tmp_path, target="tables"))["tune"] > 0, "make reproduce computes everything"
    table = read_table(results / "ptq.csv")
    lost = next(p.config.name for p in Study("llama").planned() if p.purpose == "full_precision")
    checksums.write_text(
        results / "ptq.csv", table[(table.run != lost) | (table.checkpoint == "final")].to_csv(index=False)
    )
    text = dry_run("llama", tmp_path, "rows=1", target="tables")
    assert trained(text) == [lost] and jobs_of(text)["common"] == 1, "it lacks its row at the Common Loss"


def test_the_workflow_does_a_deleted_run_again(tmp_path):
    """With everything there nothing is done; without one run's folder that run, and all that hangs on it."""
    study, work = Study("pocket", paths.RESULTS / "pocket"), tmp_path / "data" / "runs" / "pocket"
    with_tables(tmp_path, "pocket", "learning_rates")
    sweep = {p.config.name for p in study.planned() if p.purpose == "sweep"}
    main = [p.config.name for p in study.planned() if p.purpose != "sweep"]
    swept = [size for size in study.protocol.sizes if "sweep" in study.protocol.purposes(size)]
    for number, files in enumerate(
        [  # from what is needed to what needs it
            ["corpus.done"],
            [f"{name}/light.done" for name in sweep],
            [f"chosen-{size}" for size in swept],
            [f"{name}/full.done" for name in main],
            [f"common-{size}-all.done" for size in study.sizes_of("full_precision")],
            [f"collected-{size}" for size in study.protocol.sizes],
            ["claims.done", *(f"notebooks/{name}.done" for name in notebooks(study.protocol))],
            ["index.done"],
        ]
    ):
        for file in files:
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            (work / file).touch()
            os.utime(work / file, (2e9 + number, 2e9 + number))
    assert "Nothing to be done" in dry_run("pocket", tmp_path)
    lost = next(p.config.name for p in study.planned(study.protocol.sizes[-1]) if p.purpose == "full_precision")
    shutil.rmtree(work / lost)
    text = dry_run("pocket", tmp_path)
    jobs = jobs_of(text)
    assert trained(text) == [lost] and jobs["train"] == jobs["common"] == jobs["collect"] == jobs["claims"] == 1
    assert "choose" not in jobs and jobs["notebook"] == len(notebooks(study.protocol)) and jobs["index"] == 1


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
    assert "tokens" in (folder / "data" / "runs" / "smoke" / "logs" / "corpus.log").read_text()
    assert not list(paths.ROOT.glob("**/PWNED")) and not list(folder.glob("**/PWNED"))
