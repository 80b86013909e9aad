"""What notebook 07 shows of the confirmatory verdicts."""

import tomllib
from types import SimpleNamespace

import pandas as pd
import pytest

from beyond_outliers import paths
from beyond_outliers.claims import confirm_ledger
from beyond_outliers.claims.confirm_readings import confirm_rules
from beyond_outliers.study import Study
from beyond_outliers.study.tables import MissingResults


@pytest.fixture(scope="module")
def table():
    return confirm_ledger.read(Study("confirm"))


def test_only_the_scale_that_the_rules_were_written_for_is_judged(table):
    assert confirm_ledger.read(Study("pocket")).empty
    assert set(table.id) == set(confirm_rules()) and table.n.map(type).eq(str).all()


def test_verdicts_are_read_where_they_are_written_and_computed_where_not(tmp_path, table, monkeypatch):
    study = SimpleNamespace(scale="confirm", results=tmp_path)
    monkeypatch.setattr(confirm_ledger, "confirm_verdicts", lambda study: table.assign(comment="computed"))
    assert set(confirm_ledger.read(study).comment) == {"computed"}
    table.assign(comment="written").to_csv(tmp_path / "verdicts.csv", index=False)
    assert set(confirm_ledger.read(study).comment) == {"written"}


@pytest.mark.parametrize(
    ("claim", "part", "expected"),
    [
        ("C1", "whole", (0.0, -1)),  # Muon lowest
        ("C3", "Shampoo highest", (0.0, 1)),
        ("C3", "Muon lowest", (0.0, -1)),
        ("C2", "muon", (0.0, 1)),
        ("C6", "mmr", (0.2, -1)),  # is silent
        ("C7", "whole", (0.811, 1)),
        ("C8", "whole", (0.8, 1)),
        ("C10", "adamw", (0.1, -1)),  # close to 1: the distance is small
        ("C12", "0.08M", (0.0, 1)),
        ("C14", "whole", (0.0, 1)),
    ],
)
def test_where_a_verdict_changes_and_on_which_side_a_claim_holds(claim, part, expected):
    assert confirm_ledger.line(confirm_rules()[claim], part) == expected


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'odd'; valid: extreme"):
        confirm_ledger.line({"kind": "odd"}, "whole")


def test_the_figure_has_every_part_of_the_six(table):
    rows = confirm_ledger.figure_rows(table)
    expected = table[(table.spec == "W4A4+head") & (table.optimizers == "six")]
    assert list(zip(rows.id, rows.part, strict=True)) == list(zip(expected.id, expected.part, strict=True))


def test_one_row_a_claim_with_what_would_change_it(table):
    rows = confirm_ledger.by_claim(table).set_index("id")
    assert list(rows.index) == list(confirm_rules())
    assert rows["what would change it"].to_dict() == {name: rule["changes"] for name, rule in confirm_rules().items()}
    whole = table[(table.part == "whole") & (table.spec == "W4A4+head")]
    for optimizers, column in (("six", "verdict"), ("three", "of the paper's three")):
        assert rows[column].tolist() == whole[whole.optimizers == optimizers].verdict.tolist()


def test_estimates_are_written_with_their_interval(table):
    changed = table.assign(estimate=-0.25, low=-0.5, high=-0.125)
    assert confirm_ledger.by_claim(changed).estimate[0] == "-0.25 [-0.5, -0.125] nats"


def test_long_lists_of_thin_cells_are_shortened():
    comment = "Undecided, fewer than 3 runs: adamw at 0.16M has 0, muon at 0.16M has 1, soap at 0.26M has 0."
    assert confirm_ledger.short(comment) == "Undecided: fewer than 3 runs of some optimizer at 0.16M, 0.26M."
    assert confirm_ledger.short("Rises.") == "Rises."


def test_the_finding_counts_verdicts_and_says_whether_they_are_final(table):
    judged = table.assign(complete=True, verdict="undecided")
    judged.loc[judged.id == "C4", "verdict"] = "reproduced"
    text = confirm_ledger.finding(judged)
    assert "On the six optimizers, of 14 claims: reproduced C4; undecided C1, C2, C3, C5" in text
    assert text.endswith("All are final.")
    assert "14 verdicts are provisional" in confirm_ledger.finding(judged.assign(complete=False))


def test_beside_the_exploratory_verdicts(table, monkeypatch):
    exploratory = pd.read_csv(Study("laptop").results / "claims.csv").set_index("id").verdict
    judged = table.assign(verdict="reproduced")
    found = confirm_ledger.beside_exploratory(judged).set_index("id")
    assert found.then.to_dict() == exploratory.to_dict() and set(found.now) == {"reproduced"}
    words = {"reproduced": "no", "not reproduced": "yes", "undecided": "decided now"}
    assert found.changed.to_dict() == {name: words[verdict] for name, verdict in exploratory.items()}
    assert found.why.str.len().min() > 40
    again = confirm_ledger.beside_exploratory(table.assign(verdict="undecided")).set_index("id")
    assert set(again.changed[exploratory == "reproduced"]) == {"open again"}

    def missing(study):
        raise MissingResults("laptop")

    monkeypatch.setattr(confirm_ledger, "read_verdicts", missing)
    assert confirm_ledger.beside_exploratory(table).empty


def test_every_claim_says_how_its_judging_changed():
    assert list(tomllib.loads((paths.DATA / "claims-changes.toml").read_text())) == list(confirm_rules())
