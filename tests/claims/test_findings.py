"""Findings, verdicts and their evidence on made-up tables whose answer is known, and on the committed ones."""

import re
import tomllib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import prose_style
from beyond_outliers import paths
from beyond_outliers.claims import PAPER_OPTIMIZERS, along_training, findings, judged, read_rules, readings, verdicts
from beyond_outliers.claims.findings import FINDINGS, evidence, how_judged, verdict_lines
from beyond_outliers.claims.verdicts import (
    COLUMNS,
    FROZEN,
    counted,
    frozen,
    parts,
    read_verdicts,
    then_and_now,
)
from beyond_outliers.notebook import notebooks, setting
from beyond_outliers.study import Study
from made_up_runs import LEVELS, Made, runs


def made(full=None, qat=None, damage=None, **options):
    """A study whose runs have the given values: of losses, and of the damage of its primary format."""
    losses = {"full_precision": full, "qat": qat}
    losses = {
        name: rows if rows is None else rows.rename(columns={"value": "val_loss"}) for name, rows in losses.items()
    }
    if damage is None:
        return Made(losses, **options)
    right = damage.rename(columns={"value": "increase"}).assign(spec="W4A4+head", checkpoint="common")
    wrong = right.assign(spec="W4A4", increase=99.0), right.assign(checkpoint="final", increase=77.0)
    return Made(losses, ptq=pd.concat([right, *wrong]), **options)


ONE_DIVERGED = runs(seeds=4)
ONE_DIVERGED.loc[(ONE_DIVERGED.optimizer == "psgd") & (ONE_DIVERGED.seed == 3), ["status", "value"]] = "diverged", 99.0
DEARER = {"adamw": 0.2, "muon": 0.5, "psgd": 0.1, "scion": 0.3, "shampoo": 0.4, "soap": 0.3}
THREE = {name: LEVELS[name] for name in ("adamw", "muon", "shampoo")}
NOTHING = "Nothing can be said yet: no size has runs of AdamW, Muon, PSGD, Scion, Shampoo and SOAP yet (so far: none)."


@pytest.mark.parametrize(("notebook", "study", "said", "not_said"), [
    ("03_ptq", made(damage=runs()),  # in the primary format, at the Common Loss
     ["At equal loss, W4A4+head hurts Shampoo least and PSGD most. Shampoo loses 0.600 [", "PSGD 1.100 [",
      "over small and large (n 6 each)", "Muon lies 0.200 [", "Muon loses 0.800 [", "which is 0.200 ["],
     ["77", "99", "can be none"]),
    ("03_ptq", made(damage=runs(LEVELS | {"muon": 0.102})),
     ["which is 0.002 [-", "which can be none", "so which of the two is lower stays open"], []),
    ("03_ptq", made(damage=runs(seeds=1)),  # the caveat says already that something stays open
     ["which is 0.200 more than Shampoo.", "One seed: no interval"], ["[", "stays open"]),
    ("03_ptq", made(damage=runs(THREE)), ["AdamW, Muon, PSGD"], []),  # six were planned
    ("03_ptq", made(damage=runs(THREE), optimizers=("muon", "shampoo", "adamw")),
     ["and AdamW most. Shampoo loses 0.600 ["], []),
    ("01_full_precision", made(full=ONE_DIVERGED),
     ["In full precision Shampoo ends lowest and PSGD highest. Shampoo reaches 0.601 [", "Muon ends 0.200 [",
      "n 8, 8, 6, 8, 8 and 8", "PSGD ends 0.499 [", "Left out: 2 diverged runs."], []),
    ("05_qat", made(full=runs(), qat=runs({name: LEVELS[name] + DEARER[name] for name in LEVELS})),
     ["Shampoo ends lowest after training in 4 bits (QAT), as in full precision. Scion ends 0.150 [",
      "costs PSGD least, 0.100 [", "Muon most, 0.500 ["], []),
    ("05_qat", made(full=runs(), qat=runs(LEVELS | {"shampoo": 0.9})),
     ["Muon ends lowest after training in 4 bits (QAT). In full precision Shampoo does. Scion ends"], []),
    ("05_qat", made(full=runs()), [NOTHING], []),
    ("06_scaling_laws", made(full=runs().assign(n_parameters=1, tokens=20)), ["Nothing can be said yet: a law"], []),
])  # fmt: skip
def test_findings_follow_the_numbers(notebook, study, said, not_said):
    text = FINDINGS[notebook](study)
    assert [words for words in said if words not in text] == [] == [words for words in not_said if words in text]


def test_every_notebook_has_a_finding():
    assert sorted(FINDINGS) == [*notebooks(), "10_your_optimizer"]  # the last is of `make compare` alone


STUDIES = [name for name in FINDINGS if name not in ("08_probe_your_model", "10_your_optimizer")]


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", ["pocket", "laptop", "confirm"])
def test_every_committed_study_has_its_findings(scale, name):
    """In plain sentences, of the format and the checkpoint that the rules of that scale read."""
    text = FINDINGS[name](Study(scale))
    assert "nan" not in text and prose_style.wrong(text) == []
    settings = tomllib.loads((paths.SCALES / f"{scale}.toml").read_text())
    assert set(re.findall(r"W4A4[+\w]*", text)) <= {settings["measure"].get("primary", "W4A4")}
    rules = read_rules(FROZEN[scale][1] if scale in FROZEN else "claims.toml")
    if name in ("02_outlier_metrics", "04_error_propagation"):
        read = rules["C6" if name.startswith("02") else "C7"]["statistic"]
        assert ("at the Common Loss (n" in text) == ("Common Loss" in read)
    quoted = re.findall(r"\[([^]]+)\]\(\.\./docs/rules", verdict_lines(Study(scale), name))
    assert all(any(rule["statistic"].startswith(words) for rule in rules.values()) for words in quoted)
    assert "(n ," not in verdict_lines(Study(scale), name)
    if name == "05_qat" and scale == "pocket":
        assert "[" not in text  # one seed under QAT: nothing has an interval


@pytest.mark.parametrize("scale", ["pocket", "laptop", "confirm"])
def test_other_texts_that_are_made_of_tables_are_plain(scale):
    study = Study(scale)
    for text in (how_judged(study), along_training.in_words(study), setting(study).data):
        assert prose_style.wrong(text) == []


# ------------------------------------------------------------------------------------------------------------ evidence


def test_the_evidence_links_rule_figure_notebook_and_command():
    table = evidence(Study("laptop")).set_index("its rows")
    row = table.loc["`beyond-outliers claims C4 --scale laptop`"]
    verdict = pd.read_csv(paths.RESULTS / "laptop" / "claims.csv").set_index("id").loc["C4"]
    assert (
        row.verdict == verdict.verdict
        and row.estimate == f"{verdict.value:.2f} [{verdict.low:.2f}, {verdict.high:.2f}], n 6 (size and seed)"
    )
    targets = re.findall(r"\]\(([^)]+)\)", row.evidence)
    assert targets == ["../docs/rules.md#c4", "../figures/laptop/03_w4a4_increase.png", "03_ptq.ipynb"]


@pytest.mark.parametrize("scale", list(FROZEN))
def test_what_was_said_at_the_time_is_read_as_it_stands(scale):
    """Every verdict, number and reason of the frozen tables; none is made again."""
    said, table = judged(Study(scale)), pd.read_csv(paths.RESULTS / scale / f"{FROZEN[scale][0]}.csv")
    if scale == "confirm":
        table = table[(table.spec == "W4A4+head") & (table.optimizers == "six")]
        shown, slopes = parts(Study(scale), "C2"), table[(table.id == "C2") & (table.part != "whole")]
        assert shown.value.tolist() == slopes.estimate.tolist() and shown.verdict.tolist() == slopes.verdict.tolist()
        table = table[table.part == "whole"].rename(columns={"estimate": "value"})
    assert list(said.columns) == COLUMNS and said.id.tolist() == list(read_rules())
    for column in ("id", "verdict", "value", "low", "high", "unit", "comment"):
        assert said[column].tolist() == pytest.approx(table[column].tolist(), nan_ok=True), column
    text = how_judged(Study(scale))
    assert f"{FROZEN[scale][1]}](../data/{FROZEN[scale][1]})" in text and FROZEN[scale][2] in text
    assert (paths.DATA / FROZEN[scale][1]).exists()


def test_where_nothing_is_frozen_the_rules_of_today_judge(tmp_path):
    """A reader's own tables of scale confirm are not what was frozen."""
    study = Study("pocket")
    table = judged(study).set_index("id")
    assert (
        table.verdict.to_dict()
        == read_verdicts(study)
        .query("optimizers == 'six' and part == 'whole'")
        .drop_duplicates("id")
        .set_index("id")
        .verdict.to_dict()
    )
    assert frozen(study) is None and "frozen verdicts" not in how_judged(study)
    assert frozen(Study("confirm", tmp_path)) is None
    shown = then_and_now(study).set_index("id")
    assert shown.now.to_dict() == table.verdict.to_dict()
    for scale, (name, *_) in FROZEN.items():
        assert shown[scale].to_dict() == judged(Study(scale)).set_index("id").verdict.to_dict(), name
    assert shown.why.str.len().min() > 40


def test_runs_that_ended_before_the_rules_do_not_count():
    ends = {
        "early": "2026-12-01T11:19:59+00:00",
        "late": "2026-12-01T11:20:01+00:00",
        "far": "2026-12-01T12:30:00+02:00",
    }
    runs = pd.DataFrame({"run": list(ends), "finished_at": list(ends.values())})
    rows = pd.DataFrame({"run": list(ends), "seed": [400, 401, 402]})
    judged_by_them, other = (SimpleNamespace(scale=scale, table=lambda _: runs) for scale in ("confirm2", "pocket"))
    assert counted(judged_by_them, rows).run.tolist() == ["late"]  # far: 10:30 UTC
    assert counted(other, rows).run.tolist() == list(ends)


def test_tuning_runs_count_whenever_they_ended(monkeypatch):
    rows = pd.DataFrame({"run": ["early"], "seed": [300]})
    runs = pd.DataFrame({"run": ["early"], "finished_at": ["2026-12-01T09:00:00+00:00"]})
    monkeypatch.setattr(verdicts, "READ", {"sweep": lambda study: rows, "final": lambda study: rows})
    found = verdicts.tables(SimpleNamespace(scale="confirm2", table=lambda _: runs))
    assert len(found["sweep"]) == 1 and found["final"].empty


def test_runs_at_the_found_rates_take_the_place_of_those_at_the_searched_ones():
    cell = pd.DataFrame({"size": "0.08M", "optimizer": ["adamw", "muon"], "seed": 200})
    both = [pd.concat([cell.assign(**{name: of}, loss=9.0, increase=9.0, mmr=9.0) for of in values])
            for name, values in (("bits", (16, 4)), ("condition", ("with head", "without head")))]  # fmt: skip
    read = {"runs": cell.assign(loss=9.0, qat_loss=9.0), "final": cell.assign(mmr=9.0), "scaling": both[0]}
    new = verdicts.at_found_rates(read | {"common": both[1]})
    row = readings.found_rates().query("optimizer == 'adamw' and seed == 200").iloc[0]
    expected = {
        "runs": [[row.val_loss, row.val_loss_qat], [9, 9]],
        "final": [[row.mmr_end], [9]],
        "scaling": [[row.val_loss], [9], [row.val_loss_qat], [9]],
        "common": [[row.increase_common, row.mmr_common], [9, 9], [9, 9], [9, 9]],
    }
    columns = {"runs": ["loss", "qat_loss"], "final": ["mmr"], "scaling": ["loss"], "common": ["increase", "mmr"]}
    assert {name: new[name][of].to_numpy().tolist() for name, of in columns.items()} == expected


def test_lines_of_verdicts_are_those_of_the_notebook_and_its_scale():
    text = verdict_lines(Study("confirm"), "03_ptq")
    assert "- C4, **reproduced**." in text and "-0.35 [-0.38, -0.31] (n 10/10/6, log nats)" in text
    assert "](../docs/rules.md#c4)" in text and verdict_lines(Study("confirm"), "09_real_quantizers") == ""
    assert "*Would change it:*" in text and "*Would change it:*" not in verdict_lines(Study("laptop"), "03_ptq")


def test_a_long_reason_is_cut(monkeypatch):
    row = {"id": "C1", "claim": "c", "statistic": "s. More", "paper": "p", "value": 1.0, "low": np.nan, "high": np.nan}
    row |= {"n": 3, "unit": "runs", "verdict": "undecided", "comment": "word " * 100, "notebook": "01_full_precision"}
    row |= {"changes": "more " * 100}
    monkeypatch.setattr(findings, "judged", lambda study: pd.DataFrame([row]))
    text = verdict_lines(SimpleNamespace(scale="laptop"), "01_full_precision")
    assert text.endswith("more ...") and "word ... *Would" in text and len(text) < 550
    assert "[s](../docs/rules.md#c1)" in text and ": 1.00 (n 3" in text


def test_the_six_are_in_the_made_up_tables():
    assert set(LEVELS) == set(PAPER_OPTIMIZERS)
