# The study as a graph, size by size: corpus -> sweep -> learning rates -> runs -> measurements -> tables; then verdicts, notebooks.
#
# All that is made, and every file that decides what is done, lies in data/runs/SCALE (git-ignored); committed tables and
# pages stay as they are. So a fresh clone computes everything, a second call nothing, and Ctrl-C costs at most the
# minutes since the last evaluation of a run. Priorities finish a size, tables included, before the next one starts, so that a study
# which was stopped early is a smaller study.
import re
import sys

from beyond_outliers import paths
from beyond_outliers.config import PURPOSES
from beyond_outliers.notebook import notebooks
from beyond_outliers.study import Study
from beyond_outliers.study.steps import OUTPUTS, Step, choices, main_runs, needs, sweep
from beyond_outliers.train.forecast import memory as training_memory

SCALE = str(config.get("scale", "pocket"))  # a number on the command line arrives as one
STUDY = Study(SCALE)
PROTOCOL = STUDY.protocol
SIZES = PROTOCOL.sizes
SWEPT = [size for size in SIZES if "sweep" in PROTOCOL.purposes(size)]
WORK = paths.RUNS / SCALE
DRAWN = f"{WORK}/notebooks/{{notebook}}.done"  # figures and pages lie where `paths.figures` says
PYTHON = sys.executable


wildcard_constraints:
    run="[^/]+",
    size="|".join(map(re.escape, SIZES)),
    optimizer="|".join(PROTOCOL.optimizers),
    purpose="|".join(PURPOSES),


def output(kind):
    """The file that says that a step of a kind is done, with its wildcards."""
    return f"{WORK}/{OUTPUTS[kind]}"


def outputs(steps):
    return [f"{WORK}/{step.output}" for step in steps]


def inputs(kind):
    """What the steps of a kind need, as an input function; study/steps.py has the order."""

    def of(wildcards):
        step = Step(kind, **dict(wildcards.items()))
        for choice in choices(PROTOCOL, step):
            checkpoints.choose.get(size=choice.size)  # waits: only with its rates can main runs be named
        return outputs(needs(PROTOCOL, step))

    return of


def all_main_runs(_):
    for size in SWEPT:
        checkpoints.choose.get(size=size)
    return [file for size in SIZES for file in outputs(main_runs(PROTOCOL, size))]


def priority(size, run=None, purpose=None):
    """Sizes in turn, smallest first; within one, the runs in the protocol's order, each purpose's measured at its end."""
    planned = STUDY.planned(size)
    places = [(p, 2 * (len(planned) - place)) for place, p in enumerate(planned)]
    left = {p.config.name: place for p, place in reversed(places)}  # a sweep run that is a main run, too: its first place
    last = {p.purpose: place - 1 for p, place in places}
    return 1000 * (len(SIZES) - SIZES.index(size)) + left.get(run, last.get(purpose, 0))


def size_of(run):
    return max((size for size in SIZES if run.startswith(f"{size}-")), key=len)


# What a cluster is asked for, on the safe side; a run that its time cuts off is saved and goes on (retries).
GPUS = int(config.get("gpus", 0))  # of one run in training; all else takes one
ON_GPUS = {"gpu": 1} if GPUS else {}
LIGHT = {"mem_mb": 4000, "runtime": 120}  # of jobs that read and write tables and pages


def memory(model):
    """Megabytes: Python with torch, and the run."""
    training = PROTOCOL.settings.training
    scheme = "none" if {"qat", "schemes"}.isdisjoint(PROTOCOL.purposes()) else "lsq"  # the one that keeps most
    return 1500 + round(1.5 * training_memory(model, training.micro_batch, training.context, scheme)["peak"] / 1e6)


def minutes(model):
    """At 3 GFLOP/s a CPU thread, a tenth of what idle cores do here, or 50 TFLOP/s a GPU; half an hour to three days."""
    operations = 6 * PROTOCOL.settings.training.tokens_per_parameter * model.n_parameters**2
    return min(3 * 1440, 30 + round(operations / (5e13 * GPUS or 3e9 * PROTOCOL.threads) / 60))


def tokenizing(_):
    """Minutes: an hour, and one more for every 100 MB of text."""
    return 60 + round((PROTOCOL.corpus.limit_mb or 0) / 100)


def asked(of):
    """A resource of a job: of its size's model, of the run's, or of the largest."""

    def resource(wildcards):
        size = wildcards.get("size") or (size_of(wildcards.run) if "run" in wildcards.keys() else SIZES[-1])
        return of(PROTOCOL.model(size))

    return resource


rule all:
    input:
        f"{WORK}/index.done",
        # asked for by name, so that a run whose folder was deleted is made again, and all that hangs on it
        [file for size in SWEPT for file in outputs(sweep(PROTOCOL, size))],
        all_main_runs,


rule corpus:
    output:
        output("corpus"),
    threads: 2 # beside it nothing runs: everything needs it
    resources:
        mem_mb=8000,
        runtime=tokenizing,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback corpus --scale {SCALE:q} > {output:q}"


rule train:
    input:
        inputs("train"),
    output:
        output("train"),
    threads: PROTOCOL.threads
    priority: lambda wildcards: priority(size_of(wildcards.run), wildcards.run)
    retries: 2
    resources:
        mem_mb=asked(memory),
        runtime=asked(minutes),
        **{"gpu": GPUS} if GPUS else {},
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback run --scale {SCALE:q} --run {wildcards.run:q} --quiet --processes {GPUS:q}"


# of scales whose learning rates are searched for: all runs of a search, which decides from run to run
rule tune:
    input:
        inputs("tune"),
    output:
        output("tune"),
    threads: PROTOCOL.threads
    priority: lambda wildcards: priority(wildcards.size, purpose="sweep")
    retries: 2
    resources:
        mem_mb=asked(memory),
        runtime=3 * 1440,
        **ON_GPUS,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback tune --scale {SCALE:q} --size {wildcards.size:q} "
        "--optimizer {wildcards.optimizer:q} --quiet > {output:q}"


checkpoint choose:
    input:
        inputs("choose"),
    output:
        output("choose"),
    priority: lambda wildcards: priority(wildcards.size)
    resources:
        **LIGHT,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback choose --scale {SCALE:q} --size {wildcards.size:q} > {output:q}"


rule measure:
    input:
        inputs("measure"),
    output:
        touch(output("measure")),
    threads: PROTOCOL.threads
    priority: lambda wildcards: priority(wildcards.size, purpose=wildcards.purpose)
    resources:
        mem_mb=asked(memory),
        runtime=1440,
        **ON_GPUS,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback measure --scale {SCALE:q} --purpose {wildcards.purpose:q} "
        "--size {wildcards.size:q}"


rule collect:
    input:
        inputs("collect"),
    output:
        touch(output("collect")),
    priority: lambda wildcards: priority(wildcards.size)
    resources:
        **LIGHT,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback collect --scale {SCALE:q}"


rule claims:
    input:
        f"{WORK}/collected-{SIZES[-1]}",
    output:
        touch(f"{WORK}/claims.done"),
    resources:
        **LIGHT,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback claims --scale {SCALE:q} --checked"


rule notebook:
    input:
        outputs([Step("collect", size=SIZES[-1])]),
        f"{paths.NOTEBOOKS}/{{notebook}}.ipynb",
        lambda wildcards: rules.claims.output if wildcards.notebook == "07_claims" else [],
    output:
        touch(DRAWN),
    resources:
        **LIGHT,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback notebook --scale {SCALE:q} --name {wildcards.notebook:q} --tables-only"


rule index:
    input:
        expand(DRAWN, notebook=notebooks(PROTOCOL)),
    output:
        touch(f"{WORK}/index.done"),
    resources:
        **LIGHT,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback pages index --scale {SCALE:q}"
