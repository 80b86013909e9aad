"""The verdicts of a study: written to its claims.csv, or one claim shown with the rows behind it."""

import sys
from pathlib import Path

from beyond_outliers import checksums, paths
from beyond_outliers.claims.confirm_ledger import short
from beyond_outliers.claims.confirm_readings import confirm_verdicts
from beyond_outliers.claims.confirm_rules import SCALE
from beyond_outliers.claims.evidence import FIGURES, judged, rule_place
from beyond_outliers.claims.ledger import CLAIMS, complete_cells, rules, verdicts
from beyond_outliers.claims.statistics import verdict
from beyond_outliers.study.study import Study


def write_verdicts(study: Study, checked: bool = False) -> Path:
    """Judges every claim and writes claims.csv beside the study's tables. MissingResults where there are none.

    Takes the tables as they are, however they came there: their SHA256SUMS are written anew, and what changed is named.
    checked: DamagedFile instead.

    At scale confirm, whose rules were written first, also verdicts.csv, by those.
    """
    file = study.results / "claims.csv"
    if checked:
        checksums.check(study.results, remedy="without --checked the tables are taken as they are")
    elif study.results.exists() and (changed := checksums.seal(study.results)):
        print(f"taken as they are now: {', '.join(changed)}", file=sys.stderr)
    checksums.write_text(file, verdicts(study).to_csv(index=False))
    if study.scale == SCALE:
        checksums.write_text(study.results / "verdicts.csv", confirm_verdicts(study).to_csv(index=False))
    return file


def show(study: Study, name: str, limit: int | None) -> str:
    """Verdict, what would change it, rule, figure and the first `limit` rows (None: all) behind a claim, as text.

    At scale confirm the verdict is that of its own rules; the ledger's, whose rows are shown, stands below.
    """
    claim, rule, cells = CLAIMS[name], rules()[name], complete_cells(study)
    found, rows = claim(study), claim.rows(study)
    row = judged(study).set_index("id").loc[name]
    shown = rows[["size", "optimizer", "seed", *claim.columns]].head(len(rows) if limit is None else limit)
    lines = [
        f"{name} at scale {study.scale}: {row.claim}",
        f"verdict    {row.verdict}. {short(row.comment)}",
        f"changes    {row.changes}",
        f"statistic  {row.statistic}",
        f"estimate   {row.value:.4g} [{row.low:.4g}, {row.high:.4g}], n {row.n} ({row.unit})",
        f"rule       {rule_place(study.scale, name)}",
        f"paper      {row.paper}",
        f"figure     {paths.pages(study.scale) / FIGURES[name]}.png",
        f"notebook   {row.notebook}",
        f"ledger     {rule['statistic']}: {rule['side']} {rule['threshold']:g}, over {rule['unit']}",
    ]
    if study.scale == SCALE:
        by_ledger = verdict(found, rule["side"], rule["threshold"], cells)
        lines.append(f"by it      {by_ledger}, {found.value:.4g} [{found.low:.4g}, {found.high:.4g}], n {found.n}")
    lines += ["", shown.to_string(index=False, float_format="{:.4g}".format)]
    more = len(rows) - len(shown)
    return "\n".join(lines + [f"... and {more:,} rows more (--rows 0: all)"] * (more > 0))
