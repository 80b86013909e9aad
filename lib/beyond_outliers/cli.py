"""The one command, `beyond-outliers`: every use of the project is a subcommand of it.

A subcommand is a function below: its name, the first line of its docstring, an example and its options. Names and
numbers are checked before torch is imported. What cannot be done is said in one line; --traceback says where.

Exit codes: 1 it failed, 2 it was asked for in a way that cannot be, 65 a file is damaged, 75 it was stopped and saved
(the same command goes on), 130 Ctrl-C.
"""

import argparse
import contextlib
import errno
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from beyond_outliers import paths
from beyond_outliers.checksums import DamagedFile
from beyond_outliers.config.parsing import choose

DAMAGED = 65  # EX_DATAERR
COMMANDS: dict[str, tuple[Callable[[Any], int | None], str, tuple]] = {}
Given = argparse.Namespace


def option(*names: str, **settings: Any) -> tuple:
    return names, settings


def command(example: str, *options: tuple) -> Callable:
    """Makes a function a subcommand with these options, and an example in its help."""

    def register(function: Callable[[Given], int | None]) -> Callable:
        COMMANDS[function.__name__.strip("_")] = function, example, options
        return function

    return register


def number(kind: type, least: float, what: str) -> Callable[[str], Any]:
    """A type of arguments: finite numbers of a kind; `least` itself is one of them where kind is int."""

    def of(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (kind is float and value == least):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return of


def shard(text: str) -> tuple[int, int]:
    """ "2/5" -> (2, 5)."""
    part, _, parts = text.partition("/")
    if part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts):
        return int(part), int(parts)
    raise argparse.ArgumentTypeError(f"{text!r} is no part of a plan; valid: 1/5, 2/5, ..., 5/5")


COUNT = number(int, 1, "a whole number of at least 1")
SCALE = option("--scale", required=True, help="a study of data/scales, for instance pocket")
SIZE = option("--size", required=True, help="a size of the scale")
JOBS = option("--jobs", type=COUNT, help="jobs side by side; default: the processors that may be used")


def study_of(given: Given) -> Any:
    from beyond_outliers.study.study import Study

    return Study(given.scale)


# ------------------------------------------------------------------------------------------------------------ training


@command(
    "beyond-outliers train --scale pocket --size 0.08M --optimizer muon --lr 0.01",
    SCALE,
    SIZE,
    option("--optimizer", required=True, help="one of the scale's, or module:Class"),
    option("--lr", type=number(float, 0, "a positive number"), help="default: the chosen one, or the grid's middle"),
    option("--seed", type=number(int, 0, "a whole number of at least 0"), default=0),
    option("--scheme", help="quantization-aware training by this scheme, for instance quest"),
    option("--device", default="auto", choices=("auto", "cpu", "cuda")),
    option("--compile", default="auto", choices=("auto", "yes", "no")),
    option("--threads", type=COUNT),
    option("--recompute", action="store_true", help="activation checkpointing: less memory, more operations"),
    option("--dry-run", action="store_true", help="print parameters, memory and time, and train nothing"),
)
def train(given: Given) -> None:
    """Train one run, under torchrun with data parallelism; a run that was stopped goes on."""
    from beyond_outliers.config.protocol import Protocol

    config = Protocol.load(given.scale).config(
        given.size, given.optimizer, lr=given.lr, seed=given.seed, scheme=given.scheme
    )
    check_device(given.device)
    if given.dry_run:
        import torch

        from beyond_outliers.train.forecast import forecast
        from beyond_outliers.train.workers import place

        workers, rank = place()
        if rank == 0:
            torch.set_num_threads(given.threads or torch.get_num_threads())
            print(forecast(config, given.device, workers, given.recompute))
        return
    from beyond_outliers.train.folder import check
    from beyond_outliers.train.loop import train as train_run

    compiled: dict[str, bool | str] = {"auto": "auto", "yes": True, "no": False}
    options = {"threads": given.threads, "recompute": given.recompute}
    result = train_run(config, device=given.device, compile=compiled[given.compile], **options)
    if result.row:  # of the worker that writes
        print(f"{result.row['status']}: {config.name}, validation loss {result.row['val_loss']:.4f} -> {result.folder}")
        check(result.folder)  # an earlier checkpoint may have been damaged meanwhile


def check_device(name: str) -> None:
    """ValueError for CUDA where torch was built without it, which its files tell."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    built = re.findall(r"^(?:cuda|hip)\b.*= *'", file.read_text(), re.MULTILINE) if file and file.exists() else [""]
    if name == "cuda" and not built:
        raise ValueError("device 'cuda': this torch was built without CUDA; valid: cpu, auto")


@command(
    "beyond-outliers export RUN --to FOLDER --spec W4A4",
    option("run", help="a run's folder or name, or a .safetensors file of data/checkpoints"),
    option("--to", type=Path, required=True, help="a new folder"),
    option("--spec", help="round it first, for instance W4A4 or W4g32+gptq"),
)
def export(given: Given) -> None:
    """Write a run's model as a folder that `transformers` loads."""
    if not (Path(given.run).exists() or list(paths.RUNS.glob(f"*/{Path(given.run).name}/result.json"))):
        raise ValueError(
            f"no run {given.run!r}; valid: a run's folder or name below {paths.RUNS}, or a checkpoint file"
        )
    if given.to.exists() and any(given.to.iterdir()):
        raise ValueError(f"{given.to} is not empty; valid: a new folder")
    from beyond_outliers.export.folder import export as export_run
    from beyond_outliers.quantizers.spec import QuantSpec

    folder = export_run(given.run, given.to, QuantSpec.named(given.spec) if given.spec else None)
    print(f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)")


@command(
    "beyond-outliers probe HuggingFaceTB/SmolLM2-135M --text sample.txt --spec W4A4",
    option("model", help="a folder or name of transformers"),
    option("--text", type=Path, required=True, help="a file of text to run it on"),
    option("--spec", help="the format, for instance W4A4 (the default) or W8A8"),
    option("--worst", type=COUNT, default=10, help="how many linear layers to show"),
)
def probe(given: Given) -> None:
    """Measure outliers and the error of rounding of any checkpoint."""
    if not given.text.is_file():
        raise ValueError(f"no file {str(given.text)!r}; valid: a file of text")
    from beyond_outliers.probe import probe as probe_model
    from beyond_outliers.quantizers.spec import QuantSpec

    found = probe_model(given.model, given.text, QuantSpec.named(given.spec) if given.spec else None)
    print(found.summary().to_string(), found.worst(given.worst).to_string(index=False), found.quantization, sep="\n\n")


# ------------------------------------------------------------------------------------------------------------- a study


@command(
    "beyond-outliers reproduce --scale pocket",
    SCALE,
    JOBS,
    option("--executor", default="local", choices=("local", "slurm")),
    option("--options", default="", help="more options of Snakemake, as one text"),
    option("--gpus", type=COUNT, help="of one run in training, for clusters; default: none"),
    option("--target", default="all", help="a rule or a file of the Snakefile; tables: without verdicts and pages"),
)
def reproduce(given: Given) -> int:
    """Train, quantize, measure, run the notebooks and compare; what is done already is left alone."""
    study = study_of(given)
    from beyond_outliers.study.workflow import reproduce as run_workflow

    settings: dict[str, Any] = {"gpus": given.gpus} if given.gpus else {}
    status = run_workflow(study, given.jobs, given.executor, shlex.split(given.options), given.target, **settings)
    if not status and given.target == "all":
        say_where(study)
    return status


@command(
    "beyond-outliers continue --scale confirm --hours 8",
    SCALE,
    JOBS,
    option("--hours", type=number(float, 0, "a positive number of hours"), help="default: until all is done"),
    option("--shard", type=shard, default=(1, 1), metavar="I/N", help="part I of N, for N machines"),
)
def continue_(given: Given) -> int:
    """Train and measure as far as the time reaches; rows that are committed count as done."""
    study = study_of(given)
    from beyond_outliers.study.collect import merge as merge_tables
    from beyond_outliers.study.own import take_up
    from beyond_outliers.study.tables import MissingResults
    from beyond_outliers.study.workflow import reproduce as run_workflow

    take_up(study)
    if (paths.RESULTS / study.scale / "runs.csv").exists():
        merge_tables(study, paths.RESULTS / study.scale)  # what others have committed since
    before = len(study.table("runs")) if study.has("runs") else 0
    settings: dict[str, Any] = {"rows": 1, "shard": "{}/{}".format(*given.shard)}
    status = run_workflow(study, given.jobs, options=["--keep-going"], target="tables", hours=given.hours, **settings)
    with contextlib.suppress(MissingResults):  # nothing has ended
        study.collect()
        print(f"{len(study.table('runs')) - before} runs finished; all tables are in {study.results}")
    return status


@command(
    "beyond-outliers plan --scale laptop",
    SCALE,
    option("--cores", type=COUNT, help="default: the processors that may be used"),
)
def plan(given: Given) -> None:
    """Say what a scale runs, how much is done, and how long the rest takes."""
    study = study_of(given)
    study.check()
    from beyond_outliers.study.plan import print_plan

    print_plan(study, given.cores)


@command("beyond-outliers collect --scale laptop", SCALE)
def collect(given: Given) -> None:
    """Write the tables of the runs that have ended so far."""
    study_of(given).collect()


@command(
    "beyond-outliers claims C4 --scale confirm",
    option("claim", nargs="?", help="one to show with the rows behind it; without: judge all and write claims.csv"),
    SCALE,
    option("--rows", type=number(int, 0, "a whole number of at least 0"), default=60, help="how many to show, 0: all"),
    option("--checked", action="store_true", help="refuse tables that are not what was written"),
)
def claims(given: Given) -> None:
    """Judge the claims by their rules, or show one with the rows behind it."""
    from beyond_outliers.study.tables import read_table

    choose("claim", given.claim, [None, *read_table(paths.PAPER / "claims.csv").id])
    study = study_of(given)
    from beyond_outliers.claims.report import show, write_verdicts

    print(show(study, given.claim, given.rows or None) if given.claim else write_verdicts(study, given.checked))


@command(
    "beyond-outliers verify --scale pocket --runs 2",
    option("--scale", help="also train runs of this one again; default: the tables and pages of all studies"),
    option(
        "--runs", type=number(int, 0, "a whole number of at least 0"), default=2, help="how many, of the smallest size"
    ),
)
def verify(given: Given) -> int:
    """Check every file against its checksum, and train runs again."""
    from beyond_outliers.config.scale import scales

    studies = sorted(folder.name for folder in paths.RESULTS.glob("*/"))
    choose("scale", given.scale, [None, *dict.fromkeys([*scales(), *studies])])
    from beyond_outliers.study.verify import verify as verify_study

    return verify_study(given.scale, given.runs)


@command("beyond-outliers replay --scale confirm", SCALE)
def replay(given: Given) -> None:
    """Measure the committed checkpoints again, untrained, and set that beside their rows."""
    study = study_of(given)
    from beyond_outliers.study.checkpoints import replay as replay_checkpoints

    print(replay_checkpoints(study).to_string(index=False))


@command("beyond-outliers keep --scale confirm", SCALE)
def keep(given: Given) -> None:
    """Write the final weights of one seed to data/checkpoints, to be committed."""
    study = study_of(given)
    from beyond_outliers.study.checkpoints import keep as keep_checkpoints

    print(*keep_checkpoints(study), sep="\n")


@command(
    "beyond-outliers merge --scale confirm OTHER/data/results/confirm",
    SCALE,
    option("folder", type=Path, help="data/results/SCALE, or data/runs/SCALE/results, of another machine"),
)
def merge(given: Given) -> None:
    """Take over the rows of another machine's tables."""
    from beyond_outliers.study.collect import merge as merge_tables
    from beyond_outliers.study.own import take_up

    study = study_of(given)
    take_up(study)
    both = merge_tables(study, given.folder)
    print(
        f"runs in both, kept as they are here: {len(both)}", both.to_string(index=False) if len(both) else "", sep="\n"
    )


@command(
    "beyond-outliers publish --scale laptop",
    SCALE,
    option("--partial", action="store_true", help="although runs of the plan are missing"),
)
def publish(given: Given) -> None:
    """Move the tables of your own runs over the committed ones."""
    from beyond_outliers.study.own import publish as publish_tables

    print(publish_tables(study_of(given), given.partial))


@command(
    "beyond-outliers compare --scale pocket --optimizer pytorch_optimizer:Lion",
    SCALE,
    option("--optimizer", required=True, help="module:Class of an installed package or a file of yours"),
    option("--name", help="of its folders: SCALE+NAME; default: from the class"),
    option("--label", help="in figures; default: the class"),
    option("--hyper", default="", help="TOML: \"momentum = 0.9, roles = ['matrix'], rest_lr = 3e-3\""),
    option("--rates", type=number(float, 0, "a positive number"), nargs="+", default=[], help="default: searched"),
)
def compare(given: Given) -> None:
    """Train and measure an optimizer of yours beside the scale's own, and draw its page."""
    study_of(given)
    try:
        hyper = tomllib.loads(f"hyper = {{ {given.hyper} }}")["hyper"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--hyper {given.hyper!r} is not TOML: {error}") from None
    from beyond_outliers.notebook import YOURS, run_notebook
    from beyond_outliers.optimizers.trial import trial
    from beyond_outliers.study.compare import compare as compare_optimizer
    from beyond_outliers.study.compare import define

    beside, one = define(given.scale, given.optimizer, given.name, given.label, hyper, tuple(given.rates))
    print(trial(one.source, one.learning_rates[0], **one.hyper), flush=True)
    compare_optimizer(given.scale, beside, one)
    print(run_notebook(YOURS, beside))


# -------------------------------------------------------------------------------------------------------------- pages


@command("beyond-outliers figures --scale laptop", SCALE, JOBS)
def figures(given: Given) -> None:
    """Draw figures and pages again from the tables; trains nothing."""
    study = study_of(given)
    from beyond_outliers.notebook import render

    render(given.scale, given.jobs)
    say_where(study)


@command(
    "beyond-outliers notebook --scale pocket --name 03_ptq",
    SCALE,
    option("--name", required=True, help="of a file in notebooks"),
    option("--tables-only", action="store_true", help="read tables, train nothing"),
)
def notebook(given: Given) -> None:
    """Run one notebook and write its page."""
    choose("notebook", given.name, sorted(file.stem for file in paths.NOTEBOOKS.glob("*.ipynb")))
    study_of(given)
    from beyond_outliers.notebook import run_notebook

    print(run_notebook(given.name, given.scale, build=not given.tables_only))


@command(
    "beyond-outliers pages check --scale laptop",
    option("task", choices=("check", "index", "readme"), help="readme: the README's table of decisions"),
    SCALE,
)
def pages(given: Given) -> None:
    """Check the pages of a scale, or write their index or the README's table of decisions."""
    study_of(given)
    from beyond_outliers import pages

    if given.task == "check":
        names = pages.names_of(given.scale)
        pages.check_pages(given.scale, names)
        print(f"{len(names)} pages of scale {given.scale} are up to date")
    elif given.task == "index":
        print(pages.write_index(given.scale))
    else:
        pages.write_decisions(paths.ROOT / "README.md", given.scale)


def say_where(study: Any) -> None:
    """Where to look, and your runs and verdicts compared with the committed ones."""
    from beyond_outliers.reproduction import NothingToCompare, write

    pages = paths.pages(study.scale)
    print(f"\nScale {study.scale}: {len(study.table('runs'))} runs.")
    print(f"  pages     {pages / 'README.md'} (start here), {pages}/*.html")
    print(f"  tables    {study.results}/*.csv")
    if "+" not in study.scale:  # of an optimizer from outside the page is the comparison
        try:
            print(write(study.scale))
        except NothingToCompare as nothing:
            print(f"Not compared with committed runs: {nothing}.")


# ---------------------------------------------------------------------------------------------- steps of the workflow


@command("beyond-outliers corpus --scale pocket", SCALE)
def corpus(given: Given) -> None:
    """Fetch and tokenize the corpus (a step of the workflow)."""
    study = study_of(given)
    study.check()
    print(json.dumps(study.prepare_corpus()))


@command(
    "beyond-outliers run --scale pocket --run 0.03M-adamw-lr0.01-s0-0123456789",
    SCALE,
    option("--run", required=True, help="the name of a planned run"),
    option("--level", choices=("light", "full"), default="full", help="how much is measured; light: of a sweep's run"),
    option("--processes", type=number(int, 0, "a whole number of at least 0"), default=0, help="one a GPU"),
)
def run(given: Given) -> int:
    """Train and measure one run of the plan (a step of the workflow)."""
    study = study_of(given)
    planned = study.find(given.run, main=given.level == "full")
    if "RANK" in os.environ:  # one of several processes that train
        study.train(planned, progress=False)
    elif given.processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        words = ["run", "--scale", given.scale, "--run", given.run]
        if code := subprocess.run([*torchrun, str(given.processes), "-m", "beyond_outliers", *words]).returncode:
            return code
    if "RANK" not in os.environ:
        study.run(planned, progress=False)
    return 0


@command(
    "beyond-outliers tune --scale confirm --size 0.08M --optimizer muon",
    SCALE,
    SIZE,
    option("--optimizer", required=True),
    option("--rows", action=argparse.BooleanOptionalAction, default=False, help="what the tables have is done"),
)
def tune(given: Given) -> None:
    """Search the learning rates of an optimizer (a step of the workflow)."""
    print(json.dumps(study_of(given).tune(given.size, given.optimizer, given.rows, progress=False)))


@command("beyond-outliers choose --scale pocket --size 0.03M", SCALE, SIZE)
def choose_(given: Given) -> None:
    """Choose the learning rates of a size from its sweep (a step of the workflow)."""
    print(study_of(given).choose_learning_rates(given.size).to_string(index=False))


@command(
    "beyond-outliers common --scale pocket --size 0.03M",
    SCALE,
    SIZE,
    option("--seed", default="all", help="of scales whose Common Loss is taken by seed"),
)
def common(given: Given) -> None:
    """Measure the runs of a size where they reach their Common Loss (a step of the workflow)."""
    study_of(given).measure_common(given.size, None if given.seed == "all" else int(given.seed))


# ----------------------------------------------------------------------------------------------------- the entry point


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: list[str]) -> Given:
    parser = Parser(prog="beyond-outliers", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--traceback", action="store_true", help="where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    valid: dict[str, list[str]] = {}
    for name, (function, example, options) in COMMANDS.items():
        first = (function.__doc__ or "").split("\n")[0]
        one = commands.add_parser(name, help=first, description=first, epilog=f"example: {example}", allow_abbrev=False)
        for names, settings in options:
            one.add_argument(*names, **settings)
        valid[name] = [*one._option_string_actions]
    words = [word for word in arguments if word != "--traceback"]
    try:
        if words and not words[0].startswith("-"):
            choose("command", words[0], COMMANDS)
            for word in filter(re.compile(r"--[\w-]+(=|$)").match, words[1:]):
                choose("option", word.partition("=")[0], valid[words[0]])
    except ValueError as error:
        parser.error(str(error))
    return parser.parse_args([*["--traceback"] * (len(words) < len(arguments)), *words])


def main(arguments: list[str] | None = None) -> int:
    """Does what the words of a command line ask for; SystemExit, after one line, where that cannot be."""
    given = parse(sys.argv[1:] if arguments is None else arguments)
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        return COMMANDS[given.command][0](given) or 0
    except KeyboardInterrupt:
        if given.traceback:
            raise
        ended(130, "interrupted; the same command goes on from what was saved")
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError)) or type(error).__module__.startswith("beyond_outliers")
        if given.traceback or not expected:
            raise
        remedy = ""
        if isinstance(error, OSError) and error.errno == errno.EROFS:
            remedy = ": set BEYOND_OUTLIERS_OUTPUT to a folder that can be written"
        code = DAMAGED if isinstance(error, DamagedFile) else 2 if isinstance(error, ValueError) else 1
        ended(code, f"beyond-outliers {given.command}: {error}{remedy}")


def ended(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
