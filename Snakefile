# The study as a graph: corpus -> sweep -> learning rates -> runs -> measurements -> tables -> notebooks.
#
# Every file that decides what is done lies in data/runs/SCALE (git-ignored); committed tables and figures are written
# beside. So a fresh clone computes everything, a second call nothing, and Ctrl-C costs at most the minutes since the
# last evaluation of a run.
import sys

from beyond_outliers import paths
from beyond_outliers.protocol import Protocol, read_learning_rates
from beyond_outliers.study import Study, notebooks

SCALE = config.get("scale", "pocket")
STUDY = Study(SCALE)
WORK = paths.RUNS / SCALE
FIGURES = paths.FIGURES / SCALE
COMMAND = f"{sys.executable} -m beyond_outliers.study"


def result(planned):
    return f"{WORK}/{planned.config.name}/result.json"


def main_runs(purpose=None, size=None):
    """Results of the main runs, known only when the sweep has chosen the learning rates."""
    checkpoints.choose.get()
    runs = STUDY.protocol.runs(read_learning_rates(SCALE))
    return [result(p) for p in runs if purpose in (None, p.purpose) and size in (None, p.config.size)]


def to_measure(wildcards):
    if wildcards.purpose == "sweep":
        checkpoints.choose.get()  # a sweep run that serves as a main run is measured there
        return [result(p) for p in STUDY.protocol.sweep_runs() if p.config.size == wildcards.size]
    return main_runs(wildcards.purpose, wildcards.size)


rule all:
    input:
        expand(f"{FIGURES}/{{notebook}}.html", notebook=notebooks()),


rule corpus:
    output:
        f"{WORK}/corpus.json",
    threads: workflow.cores
    shell:
        "{COMMAND} corpus --scale {SCALE} > {output}"


rule train:
    input:
        rules.corpus.output,
    output:
        f"{WORK}/{{run}}/result.json",
    threads: STUDY.protocol.threads
    shell:
        "{COMMAND} train --scale {SCALE} --run {wildcards.run} --quiet"


checkpoint choose:
    input:
        [result(p) for p in STUDY.protocol.sweep_runs()],
    output:
        f"{WORK}/chosen.txt",
    shell:
        "{COMMAND} choose --scale {SCALE} > {output}"


rule measure:
    input:
        to_measure,
    output:
        touch(f"{WORK}/measured-{{purpose}}-{{size}}"),
    threads: STUDY.protocol.threads
    shell:
        "{COMMAND} measure --scale {SCALE} --purpose {wildcards.purpose} --size {wildcards.size}"


rule collect:
    input:
        lambda _: main_runs(),
        [f"{WORK}/measured-{purpose}-{size}" for purpose, size in STUDY.measurements()],
    output:
        touch(f"{WORK}/collected"),
    shell:
        "{COMMAND} collect --scale {SCALE}"


rule notebook:
    input:
        rules.collect.output,
        f"{paths.NOTEBOOKS}/{{notebook}}.ipynb",
    output:
        f"{FIGURES}/{{notebook}}.html",
        touch(f"{WORK}/notebooks/{{notebook}}.done"),
    shell:
        "{COMMAND} notebook --scale {SCALE} --name {wildcards.notebook} --tables-only"
