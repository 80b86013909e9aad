"""The verdicts of a study with what stands behind each: rule, figure, and the command that prints its rows.

At every scale the verdicts are the ledger's; at scale confirm, those of its own rules (six optimizers, primary format).
"""

import html
import math
import textwrap

import numpy as np
import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims import confirm_ledger
from beyond_outliers.claims.comparison import written
from beyond_outliers.claims.confirm_ledger import short
from beyond_outliers.claims.confirm_readings import PRIMARY, confirm_rules
from beyond_outliers.claims.confirm_rules import SCALE
from beyond_outliers.claims.ledger import read_verdicts
from beyond_outliers.claims.statistics import LEAST_UNITS

# the figure to look at, by claim
FIGURES = {
    "C1": "01_final_loss",
    "C2": "02_mmr_learning_rate",
    "C3": "02_mmr",
    "C4": "03_w4a4_increase",
    "C5": "03_w4a4_increase",
    "C6": "02_outliers_against_damage",
    "C7": "04_figure1",
    "C8": "04_abc",
    "C9": "04_depth",
    "C10": "04_gain",
    "C11": "04_gain",
    "C12": "05_curves",
    "C13": "05_increase",
    "C14": "06_rho",
}
LONGEST = 160  # characters of a comment in a list of verdicts; verdicts.csv has it in full
COLUMNS = ["id", "claim", "statistic", "paper", "value", "low", "high", "n", "unit", "verdict", "comment", "changes"]
COLUMNS += ["notebook"]


def judged(study) -> pd.DataFrame:
    """One row a claim: COLUMNS, by the rules of the study's scale."""
    if study.scale != SCALE:
        table = read_verdicts(study)
        changes = [would_change(row) for row in table.to_dict("records")]
        return table.assign(changes=changes)[COLUMNS]
    table = confirm_ledger.read(study)
    whole = table[(table.spec == PRIMARY) & (table.optimizers == "six") & (table.part == "whole")]
    rules = pd.DataFrame.from_dict(confirm_rules(), orient="index")[["statistic", "paper", "changes", "notebook"]]
    whole = whole.rename(columns={"estimate": "value"}).join(rules, on="id")
    return whole.assign(claim=whole.id.map(confirm_ledger.texts()), n=whole.n.replace("", "0")).reset_index(drop=True)[
        COLUMNS
    ]


def would_change(row: dict) -> str:
    """What would change a verdict of the ledger, read off its numbers: value, low, high, n, unit, holds, verdict."""
    threshold, n, unit = float(row["holds"].split()[1]), int(row["n"]), row["unit"]
    if n < LEAST_UNITS:
        return f"{LEAST_UNITS - n} more of what is counted ({unit}): a verdict needs {LEAST_UNITS}."
    if not np.isfinite([row["value"], row["low"], row["high"]]).all():
        return f"Data that identify the number, with an interval (counted: {unit})."
    gap = row["value"] - threshold
    towards = row["low"] if gap > 0 else row["high"]  # the end of the interval that is nearest to the threshold
    if row["verdict"] != "undecided":
        return f"An interval that reaches {threshold:g}; this one ends {abs(towards - threshold):.2g} away from it."
    if (towards - threshold) * gap > 0:
        return f"A third size or seed: the interval is clear of {threshold:g} already."
    if gap == 0:
        return f"Runs that lean one way: the number is {threshold:g} itself."
    needed = math.ceil(n * ((row["value"] - towards) / gap) ** 2)
    return f"About {needed} in place of {n} (counted: {unit}), if the number stays: intervals shrink with their root."


def rule_place(scale: str, claim: str) -> str:
    """ "data/claims.toml#L58": where the rule of a claim stands; ValueError for a claim without one."""
    file = paths.DATA / ("claims-confirm.toml" if scale == SCALE else "claims.toml")
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if line.strip() == f"[{claim}]":
            return f"data/{file.name}#L{number}"
    raise ValueError(f"no rule for {claim!r} in data/{file.name}")


def verdict_lines(study, notebook: str) -> str:
    """Markdown: a line a claim of this notebook with verdict, estimate, n and reason; links are those of a notebook."""
    lines = []
    for row in judged(study).query("notebook == @notebook").itertuples():
        estimate = f": {written((row.value, row.low, row.high), 2)}" if pd.notna(row.value) else ""
        lines.append(
            f"- {row.id}, **{row.verdict}**. [{_sentence(row.statistic)}](../{rule_place(study.scale, row.id)})"
            f"{estimate} (n {row.n}, {row.unit}). {textwrap.shorten(_ended(row.comment), LONGEST, placeholder=' ...')} "
            f"*Would change it:* {textwrap.shorten(row.changes, LONGEST, placeholder=' ...')}"
        )
    return "\n".join(["**Verdict here.**", "", *lines]) if lines else ""


def _sentence(statistic: str) -> str:
    return statistic.partition(". ")[0].rstrip(".")


def _ended(comment: str) -> str:
    """A comment, shortened, that ends like a sentence, since another one follows."""
    return f"{short(comment).rstrip('.')}." if comment else ""


def evidence(study) -> pd.DataFrame:
    """Claim by claim, to be shown as HTML: verdict and estimate, why, what would change it; evidence: links to rule,
    figure and notebook; and the command that prints the rows behind it."""
    rows = []
    for row in judged(study).itertuples():
        figure, command = FIGURES[row.id], f"beyond-outliers claims {row.id} --scale {study.scale}"
        estimate = f"{written((row.value, row.low, row.high), 2)}, " if pd.notna(row.value) else ""
        links = [
            link(html.escape(_sentence(row.statistic)), f"../{rule_place(study.scale, row.id)}"),
            link(figure, f"../figures/{study.scale}/{figure}.png"),
            link(row.notebook, f"{row.notebook}.ipynb"),
        ]
        rows.append(
            {
                "claim (what the paper has)": html.escape(f"{row.id} {row.claim} ({row.paper})"),
                "verdict": row.verdict,
                "estimate": f"{estimate}n {row.n} ({row.unit})",
                "why; what would change it": html.escape(f"{_ended(row.comment)} Would change it: {row.changes}"),
                "evidence": "; ".join(links),
                "its rows": f"<code>{command}</code>",
            }
        )
    return pd.DataFrame(rows)


def link(text: str, target: str) -> str:
    return f'<a href="{target}">{text}</a>'
