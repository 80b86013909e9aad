# The study as a graph, size by size: corpus -> sweep -> learning rates -> runs -> measurements -> tables; then verdicts, notebooks.
#
# Every file that decides what is done lies in data/runs/SCALE (git-ignored); committed tables and figures are written
# beside. So a fresh clone computes everything, a second call nothing, and Ctrl-C costs at most the minutes since the
# last evaluation of a run. Priorities finish a size, tables included, before the next one starts, so that a study
# which was stopped early is a smaller study.
import sys

from beyond_outliers import paths
from beyond_outliers.notebook import notebooks
from beyond_outliers.config import read_learning_rates
from beyond_outliers.study import Study

SCALE = config.get("scale", "pocket")
STUDY = Study(SCALE)
SIZES = STUDY.protocol.sizes
SWEPT = [size for size in SIZES if "sweep" in STUDY.protocol.purposes(size)]
WORK = paths.RUNS / SCALE
FIGURES = paths.FIGURES / SCALE
COMMAND = f"{sys.executable} -m beyond_outliers.study"


def result(planned):
    return f"{WORK}/{planned.config.name}/result.json"


def main_runs(size, purpose=None):
    """Results of a size's main runs, known only when the sweep has chosen their learning rates."""
    checkpoints.choose.get(size=STUDY.protocol.tuning_size(size))
    runs = STUDY.protocol.runs(read_learning_rates(SCALE), size)
    return [result(p) for p in runs if purpose in (None, p.purpose)]


def to_measure(wildcards):
    if wildcards.purpose == "sweep":
        checkpoints.choose.get(size=wildcards.size)  # a sweep run that serves as a main run is measured there
        return [result(p) for p in STUDY.protocol.sweep_runs(wildcards.size)]
    return main_runs(wildcards.size, wildcards.purpose)


def before(size, sizes, pattern):
    """The file of the size before this one, if there is one: tables that all sizes share are written in turn."""
    position = sizes.index(size)
    return [pattern.format(size=sizes[position - 1])] if position else []


def priority(size, run=None, purpose=None):
    """Sizes in turn, smallest first; within one, the runs in the protocol's order, each purpose's measured at its end."""
    planned = STUDY.planned(size)
    places = [(p, 2 * (len(planned) - place)) for place, p in enumerate(planned)]
    left = {p.config.name: place for p, place in reversed(places)}  # a sweep run that is a main run, too: its first place
    last = {p.purpose: place - 1 for p, place in places}
    return 1000 * (len(SIZES) - SIZES.index(size)) + left.get(run, last.get(purpose, 0))


rule all:
    input:
        expand(f"{FIGURES}/{{notebook}}.html", notebook=notebooks()),
        # asked for by name, so that a run whose folder was deleted is made again, and all that hangs on it
        [result(planned) for planned in STUDY.protocol.sweep_runs()],
        lambda _: [run for size in SIZES for run in main_runs(size)],


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
    priority: lambda wildcards: priority(wildcards.run.split("-")[0], wildcards.run)
    shell:
        "{COMMAND} train --scale {SCALE} --run {wildcards.run} --quiet"


checkpoint choose:
    input:
        lambda wildcards: [result(p) for p in STUDY.protocol.sweep_runs(wildcards.size)],
        lambda wildcards: before(wildcards.size, SWEPT, f"{WORK}/chosen-{{size}}.txt"),
    output:
        f"{WORK}/chosen-{{size}}.txt",
    priority: lambda wildcards: priority(wildcards.size)
    shell:
        "{COMMAND} choose --scale {SCALE} --size {wildcards.size} > {output}"


rule measure:
    input:
        to_measure,
    output:
        touch(f"{WORK}/measured-{{purpose}}-{{size}}"),
    threads: STUDY.protocol.threads
    priority: lambda wildcards: priority(wildcards.size, purpose=wildcards.purpose)
    shell:
        "{COMMAND} measure --scale {SCALE} --purpose {wildcards.purpose} --size {wildcards.size}"


rule collect:
    input:
        lambda wildcards: main_runs(wildcards.size),
        lambda wildcards: expand(
            f"{WORK}/measured-{{purpose}}-{{size}}",
            purpose=STUDY.protocol.purposes(wildcards.size),
            size=wildcards.size,
        ),
        lambda wildcards: before(wildcards.size, SIZES, f"{WORK}/collected-{{size}}"),
    output:
        touch(f"{WORK}/collected-{{size}}"),
    priority: lambda wildcards: priority(wildcards.size)
    shell:
        "{COMMAND} collect --scale {SCALE}"


rule claims:
    input:
        f"{WORK}/collected-{SIZES[-1]}",
    output:
        touch(f"{WORK}/claims.done"),
    shell:
        "{sys.executable} -m beyond_outliers.claims --scale {SCALE}"


rule notebook:
    input:
        f"{WORK}/collected-{SIZES[-1]}",
        f"{paths.NOTEBOOKS}/{{notebook}}.ipynb",
        lambda wildcards: rules.claims.output if wildcards.notebook == "07_claims" else [],
    output:
        f"{FIGURES}/{{notebook}}.html",
        touch(f"{WORK}/notebooks/{{notebook}}.done"),
    shell:
        "{COMMAND} notebook --scale {SCALE} --name {wildcards.notebook} --tables-only"
