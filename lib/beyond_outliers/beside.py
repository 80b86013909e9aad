"""Yours beside ours: the runs that were made here, and the verdicts on them, beside the committed tables of the scale.

`make reproduce` and `make figures` end with it: they print the comparison and write it beside your figures.
"""

import numpy as np
import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims.comparison import label
from beyond_outliers.claims.evidence import judged
from beyond_outliers.config.optimizers import OPTIMIZER_NAMES
from beyond_outliers.markdown import markdown_table
from beyond_outliers.study.study import Study
from beyond_outliers.study.tables import MissingResults, read_table

CELL = ["size", "optimizer", "seed", "scheme"]  # what a main run is beside its learning rate
SAME_RATE, OTHER_RATE, NOT_COMMITTED = "the same run", "at another learning rate", "not committed"
ALL = "all"


class NothingOfYourOwn(MissingResults):
    """There is nothing to compare: no run was made here, or nothing is committed."""


def made_here(study: Study) -> pd.DataFrame:
    """Rows of the table `runs` whose training ended in this checkout, not those taken up from the committed tables."""
    ended = {planned.config.name for planned in study.planned() if study.result(planned) is not None}
    return _runs(study)[lambda runs: runs.run.isin(ended)].reset_index(drop=True)


def _runs(study: Study) -> pd.DataFrame:
    file = study.results / "runs.csv"
    return read_table(file)  # every digit counts here


def compare_runs(own: pd.DataFrame, committed: pd.DataFrame) -> pd.DataFrame:
    """One row a run of `own`: run, optimizer, yours, ours (final losses), match, same, difference (yours - ours).

    match: SAME_RATE for the same name; OTHER_RATE for a main run of the same size, optimizer, seed and scheme, whose
    sweep chose otherwise; else NOT_COMMITTED. same: to the last digit, or diverged in both. The difference is NaN where
    either diverged.
    """
    ours = committed.set_index("run").val_loss
    main = committed[committed.purpose.str.contains("full_precision|qat|schemes")].drop_duplicates(CELL)
    elsewhere = main.set_index(CELL).val_loss
    rows = []
    for row in own.to_dict("records"):
        cell, swept = tuple(row[name] for name in CELL), row["purpose"] == "sweep"
        if row["run"] in ours.index:
            match, beside = SAME_RATE, ours[row["run"]]
        elif not swept and cell in elsewhere.index:
            match, beside = OTHER_RATE, elsewhere[cell]
        else:
            match, beside = NOT_COMMITTED, np.nan
        alike = row["val_loss"] == beside or (np.isnan(row["val_loss"]) and np.isnan(beside))
        rows.append((row["run"], row["optimizer"], row["val_loss"], beside, match, match == SAME_RATE and alike))
    table = pd.DataFrame(rows, columns=["run", "optimizer", "yours", "ours", "match", "same"])
    return table.assign(difference=table.yours - table.ours)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """`compare_runs` in numbers, a row for ALL and one an optimizer.

    runs, same, other_rate, not_committed, diverged (in one of the two), and of |difference| the median and the largest,
    with its run.
    """
    rows = []
    names = [name for name in OPTIMIZER_NAMES if name in set(runs.optimizer)]
    for name in [ALL, *names, *sorted(set(runs.optimizer) - set(names))]:
        of = runs if name == ALL else runs[runs.optimizer == name]
        apart = of.difference.abs().dropna()
        committed = of[of.match != NOT_COMMITTED]
        rows.append(
            {
                "optimizer": name if name == ALL else label(name),
                "runs": len(of),
                "same": int(of.same.sum()),
                "other_rate": int((of.match == OTHER_RATE).sum()),
                "not_committed": len(of) - len(committed),
                "diverged": int((committed.yours.isna() != committed.ours.isna()).sum()),
                "median": apart.median(),
                "largest": apart.max(),
                "run": of.run[apart.idxmax()] if apart.max() > 0 else "",
            }
        )
    return pd.DataFrame(rows)


def compare_verdicts(own: Study, committed: Study) -> pd.DataFrame:
    """One row a claim: id, claim, yours, ours (verdicts), agree, and both estimates."""
    columns = ["id", "claim", "verdict", "value"]
    both = judged(own)[columns].merge(judged(committed)[columns], on=["id", "claim"], suffixes=("_own", "_committed"))
    names = {
        "verdict_own": "yours",
        "verdict_committed": "ours",
        "value_own": "estimate",
        "value_committed": "our estimate",
    }
    return both.rename(columns=names).assign(agree=both.verdict_own == both.verdict_committed)


def opened(scale: str) -> tuple[Study, Study]:
    """The study of a reader's own tables and that of the committed ones; NothingOfYourOwn where either has none."""
    own, committed = Study(scale), Study(scale, paths.RESULTS / scale)
    if not (committed.results / "runs.csv").exists():
        raise NothingOfYourOwn(f"nothing is committed of scale {scale}, so there is nothing to compare with")
    if own.results == committed.results or not (own.results / "runs.csv").exists():
        raise NothingOfYourOwn(
            f"these are the committed tables of scale {scale}, and no run of your own is there to compare: "
            f"run `make reproduce SCALE={scale}`"
        )
    return own, committed


def write(scale: str) -> str:
    """Writes comparison.md beside a reader's own figures and returns what the terminal shows.

    NothingOfYourOwn where no run was made here, or nothing is committed.
    """
    own, committed = opened(scale)
    here = made_here(own)
    if here.empty:
        raise NothingOfYourOwn(
            f"no run of scale {scale} was made here: all rows were taken up from the committed tables"
        )
    runs, verdicts = compare_runs(here, _runs(committed)), compare_verdicts(own, committed)
    table = summary(runs)
    total = table.iloc[0]
    machines = [", ".join(sorted(set(rows.device_name))) for rows in (here, _runs(committed))]
    said = [f"Of {total.runs} runs made here, {total.same} end at the committed loss to the last digit."]
    if total.same < total.runs and np.isfinite(total["median"]):
        said.append(
            f"The losses differ by {total['median']:.4f} nats in the median and by {total.largest:.4f} at most "
            f"({total.run})."
        )
    if total.other_rate:
        said.append(f"{total.other_rate} main runs have another learning rate, because their sweep chose otherwise.")
    if total.not_committed:
        said.append(f"{total.not_committed} runs have no committed one beside them.")
    if total.diverged:
        said.append(f"{total.diverged} diverged here or there, but not in both.")
    differ = [f"{row.id} ({row.yours}; ours {row.ours})" for row in verdicts[~verdicts.agree].itertuples()]
    said.append(
        f"{verdicts.agree.sum()} of {len(verdicts)} verdicts agree{': not ' if differ else ''}{', '.join(differ)}."
    )
    page = paths.figures(scale) / "comparison.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    paths.write_whole(page, _page(scale, said, machines, table, verdicts, runs))
    lines = [f"Yours beside ours, scale {scale}", *(f"  {sentence}" for sentence in said), f"  more: {page}"]
    return "\n".join(lines)


def _page(scale: str, said: list[str], machines: list[str], table, verdicts, runs) -> str:
    apart = runs[~runs.same & (runs.match != NOT_COMMITTED)].sort_values("difference", key=abs, ascending=False)
    names = {
        "same": "same to the last digit",
        "other_rate": OTHER_RATE,
        "not_committed": NOT_COMMITTED,
    }
    parts = [
        f"# Yours beside ours: scale `{scale}`",
        " ".join(said),
        f"Yours ran on {machines[0]}; the committed ones on {machines[1]}. Losses are final validation losses, in nats "
        "a token; differences are yours less ours, without their sign where median and largest are taken. What differs "
        f"between machines: [reproducibility]({paths.way_up(paths.figures(scale))}/docs/reproducibility.md).",
        "## By optimizer",
        _markdown(table.rename(columns=names), 5),
        "## The verdicts",
        _markdown(verdicts.assign(agree=verdicts.agree.map({True: "yes", False: "no"})), 3),
        "## The runs that differ, furthest first",
        _markdown(apart.drop(columns=["optimizer", "same"]), 6) if len(apart) else "None.",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _markdown(table: pd.DataFrame, digits: int) -> str:
    return markdown_table(table.style.hide(axis="index").format(precision=digits, na_rep="").to_html())
