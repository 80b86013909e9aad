"""The verdicts of a study: written to its judged.csv, or one claim shown with the rows behind it."""

import sys
from pathlib import Path

from beyond_outliers import checksums, paths
from beyond_outliers.claims.estimates import Estimate
from beyond_outliers.claims.verdicts import JUDGED, READ, frozen, headlines, judge, read_rules, rule_place
from beyond_outliers.study.study import Study


def write_verdicts(study: Study, checked: bool = False) -> Path:
    """Judges every claim and writes judged.csv beside the study's tables. MissingResults where there are none.

    Takes the tables as they are, however they came there: their SHA256SUMS are written anew, and what changed is named.
    checked: DamagedFile instead.
    """
    file = study.results / f"{JUDGED}.csv"
    if checked:
        checksums.check(study.results, remedy="without --checked the tables are taken as they are")
    elif study.results.exists() and (changed := checksums.seal(study.results)):
        print(f"taken as they are now: {', '.join(changed)}", file=sys.stderr)
    checksums.write_text(file, judge(study).to_csv(index=False))
    return file


def show(study: Study, name: str, limit: int | None) -> str:
    """Verdict, what would change it, rule, figure and the first `limit` rows (None: all) behind a claim, as text.

    Where a scale's verdicts are frozen, what was said at the time stands below.
    """
    rule, table = read_rules()[name], judge(study, (name,))
    row, rows = headlines(table).iloc[0], READ[rule["table"]](study)
    shown = rows.head(len(rows) if limit is None else limit)
    lines = [
        f"{name} at scale {study.scale}: {row.claim}",
        f"verdict    {row.verdict}. {row.comment}",
        f"changes    {row.changes}",
        f"statistic  {row.statistic}",
        f"estimate   {_estimate(row)}, n {row.n} ({row.unit})",
        f"rule       {rule_place('', name)}",
        f"paper      {row.paper}",
        f"figure     {paths.pages(study.scale) / rule['figure']}.png",
        f"notebook   {row.notebook}",
    ]
    parts = table[(table.optimizers == "six") & (table.part != "whole")]
    lines += [f"part       {' '.join(filter(None, [part.part, part.condition]))}: {part.verdict}, {_estimate(part)}"
              for part in parts.itertuples()]  # fmt: skip
    if (said := frozen(study)) is not None:
        then = said.set_index("id").loc[name]
        lines.append(f"then       {then.verdict}, {_estimate(then)}, n {then.n}: {rule_place(study.scale, name)}")
    lines += ["", shown.to_string(index=False, float_format="{:.4g}".format)]
    more = len(rows) - len(shown)
    return "\n".join(lines + [f"... and {more:,} rows more (--rows 0: all)"] * (more > 0))


def _estimate(row) -> str:
    return Estimate(row.value, row.low, row.high).text(4) if row.value == row.value else "none over all sizes"
