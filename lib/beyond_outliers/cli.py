"""The one command, `beyond-outliers`: every use of the project is a subcommand of it.

A subcommand is a function below: its parameters are the options (`study` is the one of --scale), its docstring is the
help, with an example in its last line. Names and numbers are checked before torch is imported. What cannot be done is
an error of one line; --traceback says where.

Exit codes: 1 it failed, 2 it was asked for in a way that cannot be, 65 a file is damaged, 75 it was stopped and saved
(the same command goes on), 130 Ctrl-C.
"""

import argparse
import contextlib
import errno
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from beyond_outliers import paths
from beyond_outliers.checksums import DamagedFile
from beyond_outliers.config.parsing import Limit, between, choose, matching, parse

DAMAGED = 65  # EX_DATAERR
COMMANDS: dict[str, Callable[..., int | None]] = {}


def command(function: Callable[..., int | None]) -> Callable:
    """Makes a function a subcommand: what stands before "/" are its arguments, behind "*" its options."""
    COMMANDS[function.__name__.strip("_")] = function
    return function


def read(kind: Any, text: str) -> Any:
    """An argument as an annotation of `config.parsing`; what does not fit is refused in its words."""
    value: Any = text
    with contextlib.suppress(ValueError):
        value = get_args(kind)[0](text)
    try:
        return parse(value, kind, "it")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


Positive = Annotated[int, between(1, 2**31)]
Whole = Annotated[int, between(0, 2**31)]
Rate = Annotated[float, Limit("above 0", lambda value: value > 0)]
Shard = Annotated[
    str,
    matching(r"[1-9]\d*/\d+", "like 2/5"),
    Limit("(a part of a plan)", lambda text: int(text.split("/")[0]) <= int(text.split("/")[1])),
]


# ------------------------------------------------------------------------------------------------------------ training


@command
def train(
    *,
    study: Any,
    size: str,
    optimizer: str,
    lr: Rate | None = None,
    seed: Whole = 0,
    scheme: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compile: Literal["auto", "yes", "no"] = "auto",
    threads: Positive | None = None,
    recompute: bool = False,
    dry_run: bool = False,
) -> None:
    """Train one run, under torchrun with data parallelism; a run that was stopped goes on.

    optimizer: one of the scale's, or module:Class
    lr: default: the chosen one, or the middle of the grid
    scheme: quantization-aware training by this scheme, for instance quest
    recompute: activation checkpointing: less memory, more operations
    dry_run: print parameters, memory and time, and train nothing

    beyond-outliers train --scale pocket --size 0.08M --optimizer muon --lr 0.01
    """
    config = study.protocol.config(size, optimizer, lr=lr, seed=seed, scheme=scheme)
    if dry_run:
        import torch

        from beyond_outliers.train.forecast import forecast
        from beyond_outliers.train.workers import place

        workers, rank = place()
        if rank == 0:
            torch.set_num_threads(threads or torch.get_num_threads())
            print(forecast(config, device, workers, recompute))
        return
    from beyond_outliers.train.folder import check
    from beyond_outliers.train.loop import train as train_run

    compiled = compile if compile == "auto" else compile == "yes"
    result = train_run(config, device=device, compile=compiled, threads=threads, recompute=recompute)
    if result.row:  # of the worker that writes
        print(f"{result.row['status']}: {config.name}, validation loss {result.row['val_loss']:.4f} -> {result.folder}")
        check(result.folder)  # an earlier checkpoint may have been damaged meanwhile


@command
def export(
    run: str,
    /,
    *,
    to: Path,
    spec: str | None = None,
    format: Literal["transformers", "compressed-tensors"] = "transformers",
) -> None:
    """Write a run's model as a folder that `transformers` loads, or any model as compressed-tensors.

    run: a run's folder or name, or a .safetensors file of data/checkpoints; of compressed-tensors any model of probe
    to: a new folder
    spec: round it first, for instance W4A4 or W4g32+gptq
    format: compressed-tensors: packed weights, for vLLM too

    beyond-outliers export RUN --to FOLDER --spec W4A4
    """
    from beyond_outliers.quantizers.spec import QuantSpec

    if format == "compressed-tensors":
        from beyond_outliers.export.compressed import export_compressed

        print(export_compressed(run, to, QuantSpec.named(spec or "W4g128")))
        return
    from beyond_outliers.export.folder import export as export_run

    folder = export_run(run, to, QuantSpec.named(spec) if spec else None)
    print(f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)")


@command
def probe(
    model: str,
    /,
    *,
    text: Path | None = None,
    spec: str = "W4A4",
    budget: Rate = 4.5,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Say what quantization does to any checkpoint, which layers cost most, and what to do.

    model: a folder or name of transformers, a .gguf file, or an example: SmolLM2, MiniLM
    text: a file of text to run it on; default: data/held_out.txt
    spec: the format, for instance W8A8
    budget: bits per weight, of 4 and 8, to be shared out among the layers
    tokenizer: a folder or name to take it from, where the model has none
    trust_remote_code: run code that comes with the checkpoint

    beyond-outliers probe HuggingFaceTB/SmolLM2-135M --text sample.txt --spec W4A4
    """
    if text is not None and not text.is_file():
        raise ValueError(f"no file {str(text)!r}; valid: a file of text")
    from beyond_outliers.anymodel.sensitivity import bits_of, recommend
    from beyond_outliers.probe import probe as probe_model
    from beyond_outliers.quantizers.spec import QuantSpec

    settings = {"tokenizer": tokenizer, "trust_remote_code": trust_remote_code}
    found = probe_model(model, text, QuantSpec.named(spec), **settings)
    if bits_of(found.spec) == 4:
        bits = recommend(found.layers, budget)
        print(f"\n8 bits, within {budget:g} on average: {', '.join(bits.index[bits == 8]) or 'none'}")


# ------------------------------------------------------------------------------------------------------------- a study


@command
def reproduce(
    *,
    study: Any,
    jobs: Positive | None = None,
    executor: Literal["local", "slurm"] = "local",
    gpus: Positive | None = None,
    options: str = "",
    target: str = "all",
) -> int:
    """Train, quantize, measure, run the notebooks and compare; what is done already is left alone.

    jobs: side by side; default: the processors that may be used
    gpus: of one run in training, for clusters; default: none
    options: more options of Snakemake, as one text
    target: a rule or a file of the Snakefile; tables: without verdicts and pages

    beyond-outliers reproduce --scale pocket
    """
    from beyond_outliers.study.workflow import reproduce as run_workflow

    status = run_workflow(study, jobs, executor, shlex.split(options), target, gpus=gpus or 0)
    if not status and target == "all":
        say_where(study)
    return status


@command
def continue_(*, study: Any, jobs: Positive | None = None, hours: Rate | None = None, shard: Shard = "1/1") -> int:
    """Train and measure as far as the time reaches; rows that are committed count as done.

    jobs: side by side; default: the processors that may be used
    hours: default: until all is done
    shard: I/N, part I of N, for N machines

    beyond-outliers continue --scale confirm --hours 8
    """
    from beyond_outliers.study.collect import merge, take_up
    from beyond_outliers.study.tables import MissingResults
    from beyond_outliers.study.workflow import reproduce as run_workflow

    take_up(study)
    if ((committed := paths.RESULTS / study.scale) / "runs.csv").exists():
        merge(study, committed)  # what others have committed since
    before = len(study.table("runs")) if study.has("runs") else 0
    status = run_workflow(study, jobs, options=["--keep-going"], target="tables", hours=hours, rows=1, shard=shard)
    with contextlib.suppress(MissingResults):  # nothing has ended
        study.collect()
        print(f"{len(study.table('runs')) - before} runs finished; all tables are in {study.results}")
    return status


@command
def plan(*, study: Any, cores: Positive | None = None) -> None:
    """Say what a scale runs, how much is done, and how long the rest takes.

    cores: default: the processors that may be used

    beyond-outliers plan --scale laptop
    """
    study.check()
    from beyond_outliers.study.plan import print_plan

    print_plan(study, cores)


@command
def collect(*, study: Any) -> None:
    """Write the tables of the runs that have ended so far.

    beyond-outliers collect --scale laptop
    """
    study.collect()


@command
def claims(claim: str | None = None, /, *, study: Any, rows: Whole = 60, checked: bool = False) -> None:
    """Judge the claims by their rules, or show one with the rows behind it.

    claim: one to show; without: judge all and write judged.csv
    rows: how many to show, 0: all
    checked: refuse tables that are not what was written

    beyond-outliers claims C4 --scale confirm
    """
    from beyond_outliers.study.tables import read_table

    choose("claim", claim, [None, *read_table(paths.PAPER / "claims.csv").id])
    from beyond_outliers.claims.verdicts import show, write_verdicts

    print(show(study, claim, rows or None) if claim else write_verdicts(study, checked))


@command
def verify(*, study: Any = None, runs: Whole = 2) -> int:
    """Check every file against its checksum, and train runs again.

    study: also train runs of this one again; default: the tables and pages of all studies
    runs: how many, of the smallest size

    beyond-outliers verify --scale pocket --runs 2
    """
    from beyond_outliers.study.verify import verify as verify_study

    return verify_study(study, runs)


@command
def replay(*, study: Any) -> None:
    """Measure the committed checkpoints again, untrained, and compare with their rows.

    beyond-outliers replay --scale confirm
    """
    from beyond_outliers.study.checkpoints import replay as replay_checkpoints

    print(replay_checkpoints(study).to_string(index=False))


@command
def keep(*, study: Any) -> None:
    """Write the final weights of one seed to data/checkpoints, to be committed.

    beyond-outliers keep --scale confirm
    """
    from beyond_outliers.study.checkpoints import keep as keep_checkpoints

    print(*keep_checkpoints(study), sep="\n")


@command
def merge(folder: Path, /, *, study: Any) -> None:
    """Take over the rows of another machine's tables.

    folder: its data/results/SCALE, or data/runs/SCALE/results

    beyond-outliers merge OTHER/data/results/confirm --scale confirm
    """
    from beyond_outliers.study import collect

    collect.take_up(study)
    both = collect.merge(study, folder)
    print(f"runs in both, kept as they are here: {len(both)}\n{both.to_string(index=False) if len(both) else ''}")


@command
def publish(*, study: Any, partial: bool = False) -> None:
    """Move the tables of your runs over the committed ones.

    partial: although runs of the plan are missing

    beyond-outliers publish --scale laptop
    """
    from beyond_outliers.study.publish import publish as publish_tables

    print(publish_tables(study, partial))


@command
def compare(
    *,
    study: Any,
    optimizer: str,
    name: str | None = None,
    label: str | None = None,
    hyper: str = "",
    rates: list[Rate] | None = None,
) -> None:
    """Train and measure your optimizer as the scale trains the six, and draw its page.

    optimizer: module:Class of an installed package or a file of yours
    name: of its folders: SCALE+NAME; default: from the class
    label: in figures; default: the class
    hyper: TOML: "momentum = 0.9, roles = ['matrix'], rest_lr = 3e-3"
    rates: default: searched

    beyond-outliers compare --scale pocket --optimizer pytorch_optimizer:Lion
    """
    try:
        given = tomllib.loads(f"hyper = {{ {hyper} }}")["hyper"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--hyper {hyper!r} is not TOML: {error}") from None
    from beyond_outliers.claims.decisions import standing
    from beyond_outliers.claims.findings import FINDINGS
    from beyond_outliers.notebook import YOURS, run_notebook, time_to_build
    from beyond_outliers.optimizers.trial import trial
    from beyond_outliers.study import compare

    beside, outside = compare.define(study, optimizer, name, label, given, tuple(rates or ()))
    for line in trial(outside.source, outside.learning_rates[0], **outside.hyper):
        print(f"NOT guaranteed by {outside.source}: {line}", flush=True)
    compared = compare.begin(study, beside, outside)
    print(f"What is left takes {time_to_build(compared)}; a search of rates can add to it.", flush=True)
    compare.compare(compared, outside)
    page, both = run_notebook(YOURS, beside), compare.Beside(beside)
    print(f"\n{FINDINGS[YOURS](both)}\n\n{standing(both).to_markdown(index=False)}\n\n{page}")


# -------------------------------------------------------------------------------------------------------------- pages


@command
def figures(*, study: Any, jobs: Positive = 1) -> None:
    """Draw figures and pages again from the tables; trains nothing.

    jobs: notebooks side by side

    beyond-outliers figures --scale laptop
    """
    from beyond_outliers.notebook import render

    render(study.scale, jobs)
    say_where(study)


@command
def notebook(*, study: Any, name: str, tables_only: bool = False) -> None:
    """Run one notebook and write its page.

    name: of a file in notebooks
    tables_only: read tables, train nothing

    beyond-outliers notebook --scale pocket --name 03_ptq
    """
    choose("notebook", name, sorted(file.stem for file in paths.NOTEBOOKS.glob("*.ipynb")))
    from beyond_outliers.notebook import run_notebook

    print(run_notebook(name, study.scale, build=not tables_only))


@command
def pages(task: Literal["check", "index", "readme"], /, *, study: Any) -> None:
    """Check the pages of a scale, or write their index or the README's table, docs/rules.md and the model card.

    beyond-outliers pages check --scale laptop
    """
    from beyond_outliers import pages

    scale = study.scale
    if task == "check":
        names = pages.names_of(scale)
        pages.check_pages(scale, names)
        print(f"{len(names)} pages of scale {scale} are up to date")
    elif task == "index":
        print(pages.write_index(scale))
    else:
        pages.write_decisions(paths.ROOT / "README.md", scale)
        paths.write_whole(paths.ROOT / "docs" / "rules.md", pages.rules())
        paths.write_whole(paths.CHECKPOINTS / scale / "README.md", pages.model_card(scale))


def say_where(study: Any) -> None:
    """Where to look, and your runs and verdicts compared with the committed ones."""
    from beyond_outliers.reproduction import write
    from beyond_outliers.study.tables import MissingResults

    scale = study.scale
    page = paths.pages(scale) / "README.md"
    print(f"\nScale {scale}: {len(study.table('runs'))} runs.\n  pages     {page} (start here)")
    print(f"  tables    {study.results}/*.csv")
    if "+" not in scale:  # of an optimizer from outside the page is the comparison
        try:
            print(write(scale))
        except MissingResults as nothing:
            print(f"Your runs and the committed ones: {nothing}.")


# ---------------------------------------------------------------------------------------------- steps of the workflow


@command
def corpus(*, study: Any) -> None:
    """Fetch and tokenize the corpus (a step of the workflow).

    beyond-outliers corpus --scale pocket
    """
    study.check()
    print(json.dumps(study.prepare_corpus()))


@command
def run(*, study: Any, run: str, level: Literal["light", "common", "full"] = "full", processes: Whole = 0) -> int:
    """Train and measure one run of the plan (a step of the workflow).

    run: the name of a planned run
    level: how much is measured; light: of a sweep's run, common: of a branch
    processes: that train it under torchrun, one a GPU

    beyond-outliers run --scale pocket --run 0.03M-adamw-lr0.01-s0-0123456789
    """
    planned = study.find(run, main=level != "light")
    if "RANK" in os.environ:  # one of several processes that train
        study.train(planned, progress=False)
        return 0
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        words = ["-m", "beyond_outliers", "run", "--scale", study.scale, "--run", run]
        if code := subprocess.run([*torchrun, *words]).returncode:
            return code
    study.run(planned, progress=False)
    return 0


@command
def tune(*, study: Any, size: str, optimizer: str, rows: bool = False) -> None:
    """Search the learning rates of an optimizer (a step of the workflow).

    rows: runs that the tables have are done

    beyond-outliers tune --scale confirm --size 0.08M --optimizer muon
    """
    print(json.dumps(study.tune(size, optimizer, rows, progress=False)))


@command
def choose_(*, study: Any, size: str) -> None:
    """Choose the learning rates of a size from its sweep (a step of the workflow).

    beyond-outliers choose --scale pocket --size 0.03M
    """
    print(study.choose_learning_rates(size).to_string(index=False))


@command
def common(*, study: Any, size: str, seed: str = "all") -> None:
    """Measure the runs of a size where they reach their Common Loss (a step of the workflow).

    seed: of scales whose Common Loss is taken by seed

    beyond-outliers common --scale pocket --size 0.03M
    """
    study.measure_common(size, None if seed == "all" else int(seed))


# ----------------------------------------------------------------------------------------------------- the entry point


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def add_options(parser: argparse.ArgumentParser, function: Callable) -> None:
    """The parameters of a subcommand as arguments and options, with the lines of its docstring that name them."""
    says = dict(re.findall(r"^ +(\w+): (.+)$", function.__doc__ or "", re.MULTILINE))
    for name, parameter in inspect.signature(function).parameters.items():
        kind, required = parameter.annotation, parameter.default is parameter.empty
        kind = next((of for of in get_args(kind) if type(None) in get_args(kind) and of is not type(None)), kind)
        settings: dict[str, Any] = {"help": says.get(name, "").replace("%", "%%") or None, "default": parameter.default}
        if get_origin(kind) is list:
            kind, settings["nargs"] = get_args(kind)[0], "+"
        if get_origin(kind) is Literal:
            settings["choices"] = get_args(kind)
        elif kind is bool:
            settings["action"] = "store_true"
        else:
            settings["type"] = partial(read, kind) if get_origin(kind) is Annotated else str if kind is Any else kind
        if parameter.kind is parameter.POSITIONAL_ONLY:
            parser.add_argument(name, **(settings if required else settings | {"nargs": "?"}))
        else:
            option = "scale" if name == "study" else name.replace("_", "-")
            parser.add_argument(f"--{option}", dest=name, required=required, **settings)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="beyond-outliers", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--traceback", action="store_true", help="where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        first, *_, example = inspect.cleandoc(function.__doc__ or "").split("\n")
        one = commands.add_parser(name, help=first, description=first, epilog=f"example: {example}", allow_abbrev=False)
        add_options(one, function)
    words = [word for word in arguments if word != "--traceback"]
    try:
        if words and not words[0].startswith("-"):
            choose("command", words[0], COMMANDS)
            options = commands.choices[words[0]]._option_string_actions
            for word in filter(re.compile(r"--[\w-]+(=|$)").match, words[1:]):
                choose("option", word.partition("=")[0], options)
    except ValueError as error:
        parser.error(str(error))
    return parser.parse_args([*["--traceback"] * (len(words) < len(arguments)), *words])


def main(arguments: list[str] | None = None) -> int:
    """Does what the words of a command line ask for; SystemExit, after one line, where that cannot be."""
    given = vars(parsed(sys.argv[1:] if arguments is None else arguments))
    name, traceback = given.pop("command"), given.pop("traceback")
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    function = COMMANDS[name]
    parameters = inspect.signature(function).parameters.values()
    first = [given.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY]
    try:
        if given.get("study"):
            from beyond_outliers.study.study import Study

            given["study"] = Study(given["study"])
        return function(*first, **given) or 0
    except KeyboardInterrupt:
        if traceback:
            raise
        ended(130, "interrupted; the same command goes on from what was saved")
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError)) or type(error).__module__.startswith("beyond_outliers")
        if traceback or not expected:
            raise
        remedy = ""
        if isinstance(error, OSError) and error.errno == errno.EROFS:
            remedy = ": set BEYOND_OUTLIERS_OUTPUT to a folder that can be written"
        code = DAMAGED if isinstance(error, DamagedFile) else 2 if isinstance(error, ValueError) else 1
        ended(code, f"beyond-outliers {name}: {error}{remedy}")


def ended(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
