"""The confirmatory verdicts as notebook 07 shows them: rows of a figure, a table, and beside the exploratory ones.

Judging is done in `confirm_rules`; nothing here decides anything.
"""

import re
import tomllib

import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims.confirm_kinds import WHOLE
from beyond_outliers.claims.confirm_readings import BESIDE, PRIMARY, confirm_rules, confirm_verdicts
from beyond_outliers.claims.confirm_rules import KINDS, SCALE
from beyond_outliers.claims.contrasts import VERDICTS
from beyond_outliers.claims.ledger import read_verdicts
from beyond_outliers.study.study import Study
from beyond_outliers.study.tables import MissingResults, check_table

EXPLORATORY = "laptop"  # the scale whose verdicts stay visible beside those of `confirm`

EXPLORATORY_RULES = """## The claims

Judged by `data/claims.toml`, which has the dates of what was changed and what had been seen by then:

- *reproduced*: the whole 95 % interval lies on the claim's side of the threshold;
- *not reproduced*: the whole interval lies on the other side;
- *undecided*: the interval reaches across, there are fewer than three units (sizes and seeds, or runs), or the study
  has fewer than three sizes and seeds.

Rules that can tell more, on more and longer runs, are those of scale `confirm`."""
INTRODUCTION = """## The confirmatory verdicts

Judged by `data/claims-confirm.toml`, rules that were committed before the first of the runs that count. Sizes are
strata, seeds replicates, and every estimate is a difference (or slope, share, correlation) with a 95 % interval.
*Reproduced*: the interval lies on the claimed side of the threshold, for every rival where there are several; *not
reproduced*: one lies on the other side (of differences at 99 %); *tie*: the nearest rival lies within a margin
stated beforehand; *undecided*: the rest, and whatever has fewer than three runs of an optimizer at a size.
Correlations (C6, C7) must also survive without each optimizer. Damage is the loss increase under `W4A4+head`: 4-bit
weights and activations of every linear layer, the tied output head included. In the figure each row has a scale of
its own, with the claimed side to the right; a claim of several parts holds if all of them do (C12, which claims that
something occurs, if one does)."""
BEFORE = """## What the exploratory study said, and why that can differ

`then`: the verdict of scale `laptop` by the rules of `data/claims.toml`, which stay as they were; `now`: the one above.
Two things changed for every claim: the regime (thousands of optimizer steps in place of hundreds, learning rates tuned
at every size, more seeds, the head quantized), and how it is judged (`why`). A change of verdict alone does not tell
which of the two did it."""


def read(study) -> pd.DataFrame:
    """Confirmatory verdicts as the workflow wrote them to verdicts.csv; computed now, not written, where it has not.

    Empty at other scales: the rules were written for one.
    """
    if study.scale != SCALE:
        return pd.DataFrame(columns=["spec", "optimizers", "id", "part", "verdict"])
    file = study.results / "verdicts.csv"
    check_table(study.results, file.stem)
    table = pd.read_csv(file, dtype={"n": str, "rival": str}) if file.exists() else confirm_verdicts(study)
    return table.assign(n=table.n.fillna(""), rival=table.rival.fillna(""))


def introduction(table: pd.DataFrame) -> str:
    """How claims are judged at a scale, and, of confirmatory verdicts, how many there are of each; in Markdown."""
    return f"{INTRODUCTION}\n\n{finding(table)}" if len(table) else EXPLORATORY_RULES


def texts() -> pd.Series:
    """What the paper claims, by id."""
    return pd.read_csv(paths.PAPER / "claims.csv").set_index("id").claim


def line(rule: dict, part: str) -> tuple[float, int]:
    """Where the verdict on a part changes, and the side (1 above, -1 below) on which the claim holds."""
    if "half" in rule:
        sides = {half["name"]: half["side"] for half in rule["half"]}
        return 0.0, 1 if sides.get(part, rule["half"][0]["side"]) == "highest" else -1
    if rule["kind"] == "prediction":
        return (rule["predicts"], 1) if rule["claim"] == "predicts" else (rule["silent"], -1)
    if rule["kind"] in ("share", "near one"):
        return rule["threshold"], 1 if rule["kind"] == "share" else -1
    if rule["kind"] in ("slopes", "reversal"):
        return 0.0, 1
    raise ValueError(f"unknown kind {rule['kind']!r}; valid: {', '.join(KINDS)}")


def figure_rows(table: pd.DataFrame, spec: str = PRIMARY, optimizers: str = "six") -> pd.DataFrame:
    """Rows of `plots.confirm_ledger`, in the order of the rules: id, part, verdict, estimate, ..., threshold, side.

    The whole of a claim of several parts stands first, without an estimate.
    """
    rules = confirm_rules()
    shown = table[(table.spec == spec) & (table.optimizers == optimizers)].reset_index(drop=True)
    lines = [line(rules[row.id], row.part) for row in shown.itertuples()]
    shown = shown.assign(threshold=[at for at, _ in lines], side=[side for _, side in lines])
    return shown[["id", "part", "verdict", "estimate", "low", "high", "unit", "n", "threshold", "side"]]


def short(comment: str) -> str:
    """A comment without the list of every cell that has too few runs: n has the numbers."""
    found = re.match(r"Undecided, (fewer than \d+ runs): ", comment)
    if not found:
        return comment
    sizes = dict.fromkeys(re.findall(r" at (\S+) has ", comment))
    return f"Undecided: {found[1]} of some optimizer at {', '.join(sizes)}."


def by_claim(table: pd.DataFrame) -> pd.DataFrame:
    """One row a claim: its verdict on the six, on the paper's three, on the six without head, and what is behind it.

    Estimate and rival are those of the whole, "" where a claim has several parts.
    """
    rules, whole = confirm_rules(), table[table.part == WHOLE]

    def verdicts(spec: str, optimizers: str) -> pd.DataFrame:
        return whole[(whole.spec == spec) & (whole.optimizers == optimizers)].set_index("id")

    six, three, beside = verdicts(PRIMARY, "six"), verdicts(PRIMARY, "three"), verdicts(BESIDE, "six")
    rows = []
    for name, row in six.iterrows():
        rows.append(
            {
                "id": name,
                "claim": texts()[name],
                "verdict": row.verdict,
                "of the paper's three": three.verdict.get(name, ""),
                "without head": beside.verdict.get(name, ""),
                "estimate": _estimate(row),
                "rival": row.rival,
                "n": row.n,
                "comment": short(row.comment),
                "what would change it": rules[name]["changes"],
                "final": "yes" if row.complete else "runs are missing",
            }
        )
    return pd.DataFrame(rows)


def _estimate(row: pd.Series) -> str:
    if pd.isna(row.estimate):
        return ""
    ends = "" if pd.isna(row.low) else f" [{row.low:.3g}, {row.high:.3g}]"
    return f"{row.estimate:.3g}{ends} {row.unit}"


def finding(table: pd.DataFrame) -> str:
    """How many claims have which verdict, on the six and on the three, in Markdown; and whether that is final."""
    whole = table[(table.part == WHOLE) & (table.spec == PRIMARY)]
    lines = []
    for optimizers, words in (("six", "the six optimizers"), ("three", "the paper's three (AdamW, Muon, Shampoo)")):
        own = whole[whole.optimizers == optimizers]
        ids = {verdict: ", ".join(own.id[own.verdict == verdict]) for verdict in VERDICTS}
        counts = [f"{verdict} {names}" for verdict, names in ids.items() if names]
        lines.append(f"- On {words}, of {len(own)} claims: {'; '.join(counts)}.")
    open_ones = int((~whole.complete[whole.optimizers == "six"]).sum())
    state = f"{open_ones} verdicts are provisional: runs of the plan are missing." if open_ones else "All are final."
    return "\n".join([*lines, "", state])


def beside_exploratory(table: pd.DataFrame) -> pd.DataFrame:
    """Verdicts of the exploratory study beside these: id, claim, then, now, changed, why. Empty without its tables."""
    try:
        before = read_verdicts(Study(EXPLORATORY)).set_index("id")
    except MissingResults:
        return pd.DataFrame(columns=["id", "claim", "then", "now", "changed", "why"])
    why = tomllib.loads((paths.DATA / "claims-changes.toml").read_text())
    now = by_claim(table).set_index("id")
    rows = []
    for name, row in now.iterrows():
        then = before.verdict[name]
        rows.append((name, row.claim, then, row.verdict, _changed(then, row.verdict), why[name]["judged"]))
    return pd.DataFrame(rows, columns=["id", "claim", "then", "now", "changed", "why"])


def _changed(then: str, now: str) -> str:
    if then == now:
        return "no"
    if "undecided" in (then, now):
        return "decided now" if then == "undecided" else "open again"
    return "yes"
