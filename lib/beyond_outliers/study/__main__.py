"""The steps of a study from the shell: what the workflow (Snakefile) calls one by one, in parallel.

python -m beyond_outliers.study {corpus,train,tune,choose,measure,collect,notebook,render,plan,where} --scale pocket ...
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from beyond_outliers import paths
from beyond_outliers.study.study import Study


def _shard(text: str) -> tuple[int, int]:
    """ "2/5" -> (2, 5)."""
    part, _, parts = text.partition("/")
    if part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts):
        return int(part), int(parts)
    raise argparse.ArgumentTypeError(f"{text!r} is no part of a plan; valid: 1/5, 2/5, ..., 5/5")


def _where(study: Study) -> None:
    figures = paths.FIGURES / study.scale
    print(f"\nScale {study.scale}: {len(study.table('runs'))} runs.")
    print(f"  notebooks   {figures}/*.html")
    print(f"  figures     {figures}/*.png, *.pdf")
    print(f"  tables      {study.results}/*.csv")
    print(f"Start with    {figures / '01_full_precision.html'}")


STEPS = (
    *("corpus", "train", "tune", "choose", "measure", "collect"),
    *("notebook", "render", "plan", "where", "continue", "merge", "keep", "verify", "reproduce"),
)


# of make reproduce EXECUTOR=...: what Snakemake is told beside the number of jobs
EXECUTORS = {
    "local": ["--cores"],
    "slurm": ["--executor", "slurm", "--retries", "3", "--latency-wait", "60", "--jobs"],
}


def reproduce(study: Study, jobs: int, executor: str, options: str) -> NoReturn:
    """Becomes Snakemake, as the only one at work on this scale.

    Snakemake's own lock outlives a process that was killed; the one that is held here ends with it.
    """
    from beyond_outliers.train.holding import RunHeld, held

    study.check()
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(paths.ROOT / "Snakefile"), "--nolock"]
    command += ["--config", f"scale={study.scale}", "--rerun-incomplete", "--quiet", "rules", *EXECUTORS[executor]]
    try:
        with held(study.runs_folder / ".workflow.lock", wait=False) as lock:
            os.set_inheritable(lock.fileno(), True)
            os.execv(sys.executable, [*command, str(jobs), *shlex.split(options)])
    except RunHeld as other:
        raise SystemExit(str(other)) from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m beyond_outliers.study", description=__doc__.split("\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for step in STEPS:
        one = steps.add_parser(step)
        one.add_argument("--scale", required=step != "verify")
        if step == "train":
            one.add_argument("--run", required=True, help="name of a planned run")
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
        if step == "reproduce":
            one.add_argument(
                "--jobs", type=int, default=os.cpu_count(), help="cores, or jobs of a cluster, side by side"
            )
            one.add_argument("--executor", choices=sorted(EXECUTORS), default="local")
            one.add_argument("--options", default="", help="more options of Snakemake, as one text")
        if step == "verify":
            one.add_argument("--runs", type=int, default=2, help="of the smallest size, that are trained again")
        if step == "plan":
            one.add_argument("--cores", type=int, default=os.cpu_count())
    given = parser.parse_args(arguments)
    if given.step == "verify":
        from beyond_outliers.study.verify import verify

        return verify(given.scale, given.runs)
    study = Study(given.scale)
    if given.step == "reproduce":
        reproduce(study, given.jobs, given.executor, given.options)
    if given.step in ("corpus", "plan"):
        study.check()
    if given.step == "corpus":
        print(json.dumps(study.prepare_corpus()))
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

        render(given.scale, given.jobs)
    elif given.step == "plan":
        from beyond_outliers.study.plan import print_plan

        print_plan(study, given.cores)
    elif given.step == "continue":
        from beyond_outliers.study.runner import continue_study

        study.check()
        study.prepare_corpus()
        continue_study(study, given.jobs, given.hours, given.shard)
    elif given.step == "merge":
        from beyond_outliers.study.collect import merge

        both = merge(study, given.folder)
        print(f"runs in both, kept as they are here: {len(both)}")
        if len(both):
            print(both.to_string(index=False))
    elif given.step == "keep":
        from beyond_outliers.study.checkpoints import keep

        print(*keep(study), sep="\n")
    elif given.step == "where":
        _where(study)
    return 0


if __name__ == "__main__":
    sys.exit(main())
