"""The runs that were made here and the verdicts on them, compared with the committed tables of the scale."""

import numpy as np
import pandas as pd

from beyond_outliers import paths
from beyond_outliers.study.study import Study
from beyond_outliers.study.tables import MissingResults, read_table

CELL = ["size", "optimizer", "seed", "scheme"]  # what a main run is, but for its learning rate
SAME_RATE, OTHER_RATE, NOT_COMMITTED = "the same run", "at another learning rate", "not committed"


def compare_runs(yours: pd.DataFrame, committed: pd.DataFrame) -> pd.DataFrame:
    """One row per run of `yours`: run, optimizer, yours, committed (final losses), match, same, difference.

    match: SAME_RATE for the same name; OTHER_RATE for a main run of the same size, optimizer, seed and scheme; else
    NOT_COMMITTED. same: to the last digit, or diverged in both. difference: yours - committed, NaN where one diverged.
    """
    main = committed[committed.purpose.str.contains("full_precision|qat|schemes")].drop_duplicates(CELL)
    losses, by_cell = committed.set_index("run").val_loss, main.set_index(CELL).val_loss
    cells = pd.MultiIndex.from_frame(yours[CELL])
    named, found = yours.run.isin(losses.index), cells.isin(by_cell.index) & (yours.purpose != "sweep")
    loss = yours.run.map(losses).where(named, by_cell.reindex(cells).where(found.to_numpy()).to_numpy())
    match = np.select([named, found], [SAME_RATE, OTHER_RATE], NOT_COMMITTED)
    table = yours[["run", "optimizer"]].assign(yours=yours.val_loss, committed=loss, match=match)
    equal = (table.yours == loss) | (table.yours.isna() & loss.isna())
    return table.assign(same=named & equal, difference=table.yours - loss)


def write(scale: str) -> str:
    """Writes comparison.md next to your figures and returns what a terminal shows.

    MissingResults where no run was made here, or nothing is committed.
    """
    from beyond_outliers.claims.verdicts import headlines, read_verdicts

    study, other = Study(scale), Study(scale, paths.RESULTS / scale)
    if not other.has("runs"):
        raise MissingResults(f"nothing is committed of scale {scale}, so there is nothing to compare with")
    here = read_table(study.results / "runs.csv") if study.has("runs") else pd.DataFrame(columns=["run"])
    here = here[here.run.isin([planned.config.name for planned in study.planned() if study.result(planned)])]
    if here.empty:
        raise MissingResults(f"no run of scale {scale} was made here: run `make reproduce SCALE={scale}`")
    committed = read_table(other.results / "runs.csv")
    runs = compare_runs(here.reset_index(drop=True), committed)
    distance = runs.difference.abs()
    lines = [f"Of {len(runs)} runs made here, {runs.same.sum()} end at the committed loss to the last digit."]
    if (most := distance.max()) > 0:
        farthest = runs.run[distance.idxmax()]
        lines.append(f"Losses differ by {distance.median():.4f} nats in the median, {most:.4f} at most ({farthest}).")
    lines += [f"{n} runs are {match}." for match, n in runs.match.value_counts().items() if match != SAME_RATE]
    yours, theirs = (
        headlines(read_verdicts(of))[["id", "claim", "verdict"]].rename(columns={"verdict": name})
        for name, of in (("yours", study), ("committed", other))
    )
    verdicts = yours.merge(theirs)
    differ = verdicts.query("yours != committed").itertuples()
    changed = [f"{row.id} ({row.yours}; committed {row.committed})" for row in differ]
    agree = f"{len(verdicts) - len(changed)} of {len(verdicts)} verdicts agree"
    lines.append(f"{agree}{': not ' * bool(changed)}{', '.join(changed)}.")
    machines = [", ".join(sorted(set(table.device_name))) for table in (here, committed)]
    page, way_up = paths.figures(scale) / "comparison.md", paths.way_up(paths.figures(scale))
    apart = runs[~runs.same].sort_values("difference", key=abs, ascending=False).drop(columns=["optimizer", "same"])
    parts = [
        f"# Your runs and the committed ones: scale `{scale}`",
        " ".join(lines),
        f"Your runs: {machines[0]}. Committed runs: {machines[1]}. Losses are final, on validation text, in nats per "
        f"token. [What differs between machines]({way_up}/docs/reproducibility.md).",
        "## Verdicts",
        verdicts.to_markdown(index=False),
        "## Runs that differ, farthest first",
        apart.to_markdown(index=False, floatfmt=".6f"),
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    paths.write_whole(page, "\n\n".join(parts) + "\n")
    return "\n".join(
        [f"Compared with the committed runs of scale {scale}", *(f"  {line}" for line in lines), f"  more: {page}"]
    )
