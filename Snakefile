# The study as a graph, size by size: corpus -> sweep -> learning rates -> runs -> Common Loss -> tables; verdicts, notebooks.
#
# One job a run: it trains and measures. All that is made, and every file that says what is done, lies in data/runs/SCALE
# (git-ignored); committed tables and pages stay as they are. So a fresh clone computes everything, a second call nothing,
# and Ctrl-C costs at most the minutes since the last evaluation of a run. Priorities finish a size, tables included, before
# the next one starts, so that a study which was stopped early is a smaller study.
#
# --config scale=SCALE  rows=1: runs that the tables have are done (make continue)  shard=1/3: a part of the runs  gpus=N: of a run
import re
import sys

from beyond_outliers import paths
from beyond_outliers.config import Planned
from beyond_outliers.notebook import notebooks
from beyond_outliers.study.collect import adopted
from beyond_outliers.study.study import Study
from beyond_outliers.train.forecast import memory as training_memory

SCALE = str(config.get("scale", "pocket"))  # a number on the command line arrives as one
ROWS = bool(config.get("rows"))
PART, PARTS = map(int, str(config.get("shard", "1/1")).split("/"))
GPUS = int(config.get("gpus", 0))  # of one run in training; all else takes one
STUDY = Study(SCALE)
PROTOCOL = STUDY.protocol
SIZES = PROTOCOL.sizes
SWEPT = STUDY.sizes_of("sweep")
WORK = paths.RUNS / SCALE
PYTHON = sys.executable
ADOPTED = adopted(STUDY) if ROWS else {}
TAKEN = ["--rows"] if ROWS else []  # by the searches


wildcard_constraints:
    run="[^/]+",
    level="light|common|full",
    size="|".join(map(re.escape, SIZES)),
    seed="all|[0-9]+",
    optimizer="|".join(map(re.escape, PROTOCOL.optimizers)),


def known(size):
    """Whether the learning rates of a size are in the tables."""
    rates = STUDY.rates
    return all((size, name) in rates for name in PROTOCOL.optimizers)


def chosen(size):
    """Waits for the learning rates of a size, where this part of the study chooses them; else whether they are known."""
    at = PROTOCOL.tuning_size(size)
    if at not in SWEPT or (ROWS and known(at)):
        return True
    return PART == 1 and bool(checkpoints.choose.get(size=at))


def here(planned):
    """Whether a run is made here: it is of this part, which has a size and seed whole, and no row of it counts as done."""
    part = 1 if planned.purpose == "sweep" else 1 + (SIZES.index(planned.config.size) + planned.config.seed) % PARTS
    return part == PART and planned.config.name not in ADOPTED.get(planned.purpose, ())


def done(runs):
    """The files that say that runs are trained and measured."""
    ends = {(p.config.name, p.level) for p in runs if here(p)}
    return [f"{WORK}/{run}/{level}.done" for run, level in sorted(ends)]


def trunk(wildcards):
    """What a branch starts from: the run that it leaves, where that is made here; without it a branch is a run."""
    found = STUDY.find(wildcards.run).trunk if wildcards.level == "common" else None
    return done([Planned("full_precision", found)]) if found else []


def sweep(size):
    """What the learning rates of a size are chosen from: runs, or, of a tuned scale, searches of an optimizer each."""
    if not PROTOCOL.tuned:
        return done(PROTOCOL.sweep_runs(size))
    return [f"{WORK}/tuned-{name}-{size}" for name in PROTOCOL.optimizers if PART == 1 and not (ROWS and known(size))]


def main_runs(size):
    """The main runs of a size, as soon as its learning rates are known."""
    return PROTOCOL.runs(STUDY.rates, size) if chosen(size) else []


def group(size, seed):
    """The runs that a Common Loss is taken over."""
    runs = [p for p in main_runs(size) if p.purpose == "full_precision"]
    return runs if seed == "all" else [p for p in runs if p.config.seed == int(seed)]


def common(size):
    """The measurements at the Common Loss of the groups of a size that have runs here."""
    groups = STUDY.groups() if chosen(size) else []
    seeds = ["all" if seed is None else seed for at, seed in groups if at == size]
    return [f"{WORK}/common-{size}-{seed}.done" for seed in seeds if any(map(here, group(size, seed)))]


def before(size, step):
    """The same step of the swept size before this one, whose rates are taken, and whose table is written, in turn."""
    earlier = SWEPT[: SWEPT.index(size)][-1:]
    return [f"{WORK}/{step}-{at}" for at in earlier if not (ROWS and known(at))]


def tables(size):
    """All that the tables of a size are made of."""
    return [*(sweep(size) if size in SWEPT else []), *done(main_runs(size)), *common(size)]


def everything(_):
    """Asked for by name, so that a run whose folder was deleted is made again, and all that hangs on it."""
    return [file for size in SIZES for file in tables(size)]


def priority(size, run=None):
    """Sizes in turn, smallest first; within one, the runs in the protocol's order. `make continue`: QAT behind all else."""
    planned = STUDY.planned(size)
    place = next((place for place, p in enumerate(planned) if p.config.name == run), len(planned))
    late = ROWS and any(p.config.name == run and p.purpose in ("qat", "schemes") for p in planned)
    return 10_000 * ((1 - late) * len(SIZES) + len(SIZES) - SIZES.index(size)) + 2 * (len(planned) - place)


def size_of(run):
    return max((size for size in SIZES if run.startswith(f"{size}-")), key=len)


# What a cluster is asked for, on the safe side; a run that its time cuts off is saved and goes on (retries).
LIGHT = {"mem_mb": 4000, "runtime": 120}  # of jobs that read and write tables and pages
ON_GPUS = {"gpu": 1} if GPUS else {}


def memory(model):
    """Megabytes: Python with torch, and the run: weights, gradients, optimizer, activations and logits of a micro-batch."""
    training = PROTOCOL.settings.training
    scheme = "none" if {"qat", "schemes"}.isdisjoint(PROTOCOL.purposes()) else "lsq"  # the one that keeps most
    return 1500 + round(1.5 * training_memory(model, training.micro_batch, training.context, scheme)["peak"] / 1e6)


def minutes(model):
    """At 3 GFLOP/s a CPU thread, a tenth of what idle cores do here, or 50 TFLOP/s a GPU; an hour and a half to three days."""
    operations = 6 * PROTOCOL.settings.training.tokens_per_parameter * model.n_parameters**2
    return min(3 * 1440, 90 + round(operations / (5e13 * GPUS or 3e9 * PROTOCOL.threads) / 60))


def asked(of):
    """A resource of a job: of its size's model, or of its run's."""
    return lambda wildcards: of(PROTOCOL.model(wildcards.get("size") or size_of(wildcards.run)))


rule all:
    input:
        f"{WORK}/index.done",
        [file for size in SWEPT for file in sweep(size)],
        everything,


rule tables:
    input:
        f"{WORK}/collected-{SIZES[-1]}",
        [file for size in SWEPT for file in sweep(size)],
        everything,


rule corpus:
    output:
        touch(f"{WORK}/corpus.done"),
    log:
        f"{WORK}/logs/corpus.log",
    threads: 2 # beside it nothing runs: everything needs it
    resources:
        mem_mb=8000,
        runtime=60 + round((PROTOCOL.corpus.limit_mb or 0) / 100),
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback corpus --scale {SCALE:q} > {log:q} 2>&1"


rule train:
    input:
        rules.corpus.output,
        trunk,
    output:
        touch(f"{WORK}/{{run}}/{{level}}.done"),
    log:
        f"{WORK}/logs/{{run}}-{{level}}.log",
    threads: PROTOCOL.threads
    priority: lambda wildcards: priority(size_of(wildcards.run), wildcards.run)
    retries: 2
    resources:
        mem_mb=asked(memory),
        runtime=asked(minutes),
        **{"gpu": GPUS} if GPUS else {},
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback run --scale {SCALE:q} --run {wildcards.run:q} --level {wildcards.level:q} --processes {GPUS:q} > {log:q} 2>&1"


# of scales whose learning rates are searched for: all runs of a search, which decides from run to run
rule tune:
    input:
        rules.corpus.output,
        lambda wildcards: before(wildcards.size, f"tuned-{wildcards.optimizer}"),
    output:
        touch(f"{WORK}/tuned-{{optimizer}}-{{size}}"),
    log:
        f"{WORK}/logs/tuned-{{optimizer}}-{{size}}.log",
    threads: PROTOCOL.threads
    priority: lambda wildcards: priority(wildcards.size)
    retries: 2
    resources:
        mem_mb=asked(memory),
        runtime=3 * 1440,
        **ON_GPUS,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback tune --scale {SCALE:q} --size {wildcards.size:q} --optimizer {wildcards.optimizer:q} {TAKEN:q} > {log:q} 2>&1"


checkpoint choose:
    input:
        lambda wildcards: sweep(wildcards.size) + before(wildcards.size, "chosen"),
    output:
        touch(f"{WORK}/chosen-{{size}}"),
    log:
        f"{WORK}/logs/chosen-{{size}}.log",
    priority: lambda wildcards: priority(wildcards.size)
    resources:
        **LIGHT,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback choose --scale {SCALE:q} --size {wildcards.size:q} > {log:q} 2>&1"


rule common:
    input:
        lambda wildcards: done(group(wildcards.size, wildcards.seed)),
    output:
        touch(f"{WORK}/common-{{size}}-{{seed}}.done"),
    log:
        f"{WORK}/logs/common-{{size}}-{{seed}}.log",
    threads: PROTOCOL.threads
    priority: lambda wildcards: priority(wildcards.size)
    resources:
        mem_mb=asked(memory),
        runtime=1440,
        **ON_GPUS,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback common --scale {SCALE:q} --size {wildcards.size:q} --seed {wildcards.seed:q} > {log:q} 2>&1"


rule collect:
    input:
        lambda wildcards: tables(wildcards.size),
        lambda wildcards: [f"{WORK}/collected-{at}" for at in SIZES[: SIZES.index(wildcards.size)][-1:]],
    output:
        touch(f"{WORK}/collected-{{size}}"),
    log:
        f"{WORK}/logs/collected-{{size}}.log",
    priority: lambda wildcards: priority(wildcards.size)
    resources:
        **LIGHT,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback collect --scale {SCALE:q} > {log:q} 2>&1"


rule claims:
    input:
        f"{WORK}/collected-{SIZES[-1]}",
    output:
        touch(f"{WORK}/claims.done"),
    log:
        f"{WORK}/logs/claims.log",
    resources:
        **LIGHT,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback claims --scale {SCALE:q} --checked > {log:q} 2>&1"


rule notebook:
    input:
        f"{WORK}/collected-{SIZES[-1]}",
        f"{paths.NOTEBOOKS}/{{notebook}}.ipynb",
        lambda wildcards: rules.claims.output if wildcards.notebook == "07_claims" else [],
    output:
        touch(f"{WORK}/notebooks/{{notebook}}.done"),
    log:
        f"{WORK}/logs/{{notebook}}.log",
    resources:
        **LIGHT,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback notebook --scale {SCALE:q} --name {wildcards.notebook:q} --tables-only > {log:q} 2>&1"


rule index:
    input:
        expand(f"{WORK}/notebooks/{{notebook}}.done", notebook=notebooks(PROTOCOL)),
    output:
        touch(f"{WORK}/index.done"),
    log:
        f"{WORK}/logs/index.log",
    resources:
        **LIGHT,
    shell:
        "{PYTHON:q} -m beyond_outliers --traceback pages index --scale {SCALE:q} > {log:q} 2>&1"
