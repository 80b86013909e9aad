"""The steps of a study from the shell: what the workflow (Snakefile) calls one by one, in parallel.

python -m beyond_outliers.study STEP --scale pocket ...; --help lists the steps
"""

import argparse
import errno
import json
import os
import shlex
import sys
import tomllib
from pathlib import Path
from typing import NoReturn

from beyond_outliers import paths
from beyond_outliers.checksums import DamagedFile
from beyond_outliers.study.study import Study
from beyond_outliers.study.tables import MissingResults


def _shard(text: str) -> tuple[int, int]:
    """ "2/5" -> (2, 5)."""
    part, _, parts = text.partition("/")
    if part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts):
        return int(part), int(parts)
    raise argparse.ArgumentTypeError(f"{text!r} is no part of a plan; valid: 1/5, 2/5, ..., 5/5")


def _where(study: Study) -> None:
    figures = paths.pages(study.scale)
    print(f"\nScale {study.scale}: {len(study.table('runs'))} runs.")
    print(f"  notebooks   {figures}/*.html")
    print(f"  figures     {figures}/*.png, *.pdf")
    print(f"  tables      {study.results}/*.csv")
    print(f"Start with    {figures / 'README.md'}")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizer", required=True, help="module:Class of an installed package or a file of yours")
    parser.add_argument("--name", help="of its folders: SCALE+NAME; default: from the class")
    parser.add_argument("--label", help="in figures; default: the class")
    parser.add_argument("--hyper", default="", help="TOML: \"momentum = 0.9, roles = ['matrix'], rest_lr = 3e-3\"")
    parser.add_argument("--rates", type=float, nargs="+", default=[], help="learning rates to sweep; default: searched")


def _compare(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Says what is guaranteed of the optimizer, trains and measures what is missing, and runs notebook 10."""
    from beyond_outliers.notebook import YOURS, run_notebook
    from beyond_outliers.optimizers.trial import trial
    from beyond_outliers.study.compare import compare, define

    try:
        hyper = tomllib.loads(f"hyper = {{ {given.hyper} }}")["hyper"]
        beside, one = define(given.scale, given.optimizer, given.name, given.label, hyper, tuple(given.rates))
        print(trial(one.source, one.learning_rates[0], **one.hyper), flush=True)
        compare(given.scale, beside, one)
    except (ValueError, MissingResults) as error:
        parser.error(str(error))
    print(run_notebook(YOURS, beside))
    return 0


def _under_torchrun(processes: int, command: list[str]) -> NoReturn:
    """Becomes torchrun with so many processes of this machine, each of which does the step."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "beyond_outliers.study", *command, "--quiet"])


STEPS = (
    *("corpus", "train", "tune", "choose", "measure", "collect"),
    *("reproduce", "continue", "notebook", "render", "plan", "where"),
    *("merge", "publish", "keep", "replay", "verify", "compare"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m beyond_outliers.study", description=__doc__.split("\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for step in STEPS:
        one = steps.add_parser(step)
        one.add_argument("--scale", required=step != "verify")
        if step == "train":
            one.add_argument("--run", required=True, help="name of a planned run")
            one.add_argument("--processes", type=int, default=1, help="more than one: under torchrun, one a GPU")
        if step in ("train", "tune"):
            one.add_argument("--quiet", action="store_true", help="no progress bar")
        if step == "measure":
            one.add_argument("--purpose", required=True)
        if step in ("tune", "choose", "measure"):
            one.add_argument("--size", required=True)
        if step == "tune":
            one.add_argument("--optimizer", required=True)
        if step == "notebook":
            one.add_argument("--name", required=True)
            one.add_argument("--tables-only", action="store_true", help="read tables, train nothing")
        if step == "render":
            one.add_argument("--jobs", type=int, default=1)
        if step == "continue":
            one.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
            one.add_argument("--hours", type=float, help="stop after that time; the default is when all is done")
            one.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="part I of N, for N machines")
        if step == "merge":
            one.add_argument("folder", type=Path, help="data/results/SCALE of another machine")
        if step == "publish":
            one.add_argument("--partial", action="store_true", help="although runs of the plan are missing")
        if step == "reproduce":
            one.add_argument(
                "--jobs", type=int, default=os.cpu_count(), help="cores, or jobs of a cluster, side by side"
            )
            one.add_argument("--executor", choices=("local", "slurm"), default="local")
            one.add_argument("--options", default="", help="more options of Snakemake, as one text")
        if step == "verify":
            one.add_argument("--runs", type=int, default=2, help="of the smallest size, that are trained again")
        if step == "compare":
            _add_compare(one)
        if step == "plan":
            one.add_argument("--cores", type=int, default=os.cpu_count())
    given = parser.parse_args(arguments)
    try:
        return _do(given, parser)
    except (DamagedFile, PermissionError) as error:
        parser.exit(1, f"{type(error).__name__}: {error}\n")
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        parser.exit(1, f"{error}: set BEYOND_OUTLIERS_OUTPUT to a folder that can be written\n")


def _do(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if given.step == "verify":
        from beyond_outliers.study.verify import verify

        return verify(given.scale, given.runs)
    if given.step == "compare":
        return _compare(given, parser)
    study = Study(given.scale)
    if given.step in ("corpus", "plan"):
        study.check()
    if given.step == "corpus":
        print(json.dumps(study.prepare_corpus()))
    elif given.step == "reproduce":
        from beyond_outliers.study.workflow import reproduce

        return reproduce(study, given.jobs, given.executor, shlex.split(given.options))
    elif given.step == "train" and given.processes > 1:
        _under_torchrun(given.processes, ["train", "--scale", given.scale, "--run", given.run])
    elif given.step == "train":
        study.train(study.find(given.run), progress=not given.quiet)
    elif given.step == "tune":
        print(json.dumps(study.tune(given.size, given.optimizer, progress=not given.quiet)))
    elif given.step == "choose":
        print(study.choose_learning_rates(given.size).to_string(index=False))
    elif given.step == "measure":
        study.measure(given.purpose, given.size)
    elif given.step == "collect":
        study.collect()
    elif given.step == "notebook":
        from beyond_outliers.notebook import run_notebook

        print(run_notebook(given.name, given.scale, build=not given.tables_only))
    elif given.step == "render":
        from beyond_outliers.notebook import render

        try:
            render(given.scale, given.jobs)
        except MissingResults as missing:
            parser.exit(1, f"{missing}\n")
    elif given.step == "plan":
        from beyond_outliers.study.plan import print_plan

        print_plan(study, given.cores)
    elif given.step == "continue":
        from beyond_outliers.study.runner import StudyFailed, continue_study
        from beyond_outliers.train.holding import TRY_AGAIN

        study.check()
        study.prepare_corpus()
        try:
            n = continue_study(study, given.jobs, given.hours, given.shard)
        except KeyboardInterrupt:  # or SIGTERM: runs in training are saved
            parser.exit(TRY_AGAIN, f"interrupted. To go on: make continue SCALE={study.scale}\n")
        except StudyFailed as failed:
            parser.exit(1, f"{failed}\nnext: make continue SCALE={study.scale} tries them again\n")
        print(f"{n} runs finished; their tables are in {study.results}")
    elif given.step == "merge":
        from beyond_outliers.study.collect import merge
        from beyond_outliers.study.own import take_up

        take_up(study)
        both = merge(study, given.folder)
        print(f"runs in both, kept as they are here: {len(both)}")
        if len(both):
            print(both.to_string(index=False))
    elif given.step == "publish":
        from beyond_outliers.study.own import publish

        try:
            print(publish(study, given.partial))
        except (MissingResults, ValueError) as error:
            parser.exit(1, f"{error}\n")
    elif given.step == "keep":
        from beyond_outliers.study.checkpoints import keep

        print(*keep(study), sep="\n")
    elif given.step == "replay":
        from beyond_outliers.study.checkpoints import replay

        print(replay(study).to_string(index=False))
    elif given.step == "where":
        _where(study)
    return 0


if __name__ == "__main__":
    sys.exit(main())
