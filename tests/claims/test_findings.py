"""Findings, verdicts and their evidence on made-up tables whose answer is known, and on the committed ones."""

import re
import tomllib

import pandas as pd
import pytest

import prose_style
from beyond_outliers import paths
from beyond_outliers.claims import along_training, findings, judged, read_rules, readings, verdicts
from beyond_outliers.claims.findings import FINDINGS, evidence, how_judged, verdict_lines
from beyond_outliers.claims.verdicts import COLUMNS, FROZEN, frozen, parts, read_verdicts, then_and_now
from beyond_outliers.notebook import notebooks, setting
from beyond_outliers.study import Study
from made_up_runs import LEVELS, Made, runs, table

NO_RUN = runs().iloc[:0]


def made(full=NO_RUN, qat=NO_RUN, damage=None, **options):
    """A study whose runs have the given values: of losses, and of the damage of its primary format."""
    full, qat = (rows.rename(columns={"value": "val_loss"}) for rows in (full, qat))
    losses = {"full_precision": full, "qat": qat}
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


SCALES = ["pocket", *FROZEN]
STUDIES = [name for name in FINDINGS if name not in ("08_probe_your_model", "10_your_optimizer")]


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_committed_study_has_its_findings(scale, name):
    """In plain sentences, of the format and the checkpoint that the rules of that scale read."""
    text = FINDINGS[name](Study(scale))
    assert "nan" not in text and prose_style.wrong(text) == []
    settings = tomllib.loads((paths.SCALES / f"{scale}.toml").read_text())
    assert set(re.findall(r"W4A4[+\w]*", text)) <= {settings["measure"].get("primary", "W4A4")}
    rules = read_rules(FROZEN[scale][1] if scale in FROZEN else "claims.toml")
    if claim := {"02_outlier_metrics": "C6", "04_error_propagation": "C7"}.get(name):
        assert ("at the Common Loss (n" in text) == ("Common Loss" in rules[claim]["statistic"])
    quoted = re.findall(r"\[([^]]+)\]\(\.\./docs/rules", verdict_lines(Study(scale), name))
    assert all(any(rule["statistic"].startswith(words) for rule in rules.values()) for words in quoted)
    assert "(n ," not in verdict_lines(Study(scale), name)
    if name == "05_qat" and scale == "pocket":
        assert "[" not in text  # one seed under QAT: nothing has an interval


@pytest.mark.parametrize("scale", SCALES)
def test_other_texts_that_are_made_of_tables_are_plain(scale):
    study = Study(scale)
    for text in (how_judged(study), along_training.in_words(study), setting(study).data):
        assert prose_style.wrong(text) == []


# ------------------------------------------------------------------------------------------------------------ evidence


def test_the_evidence_links_rule_figure_notebook_and_command():
    row = evidence(Study("laptop")).set_index("its rows").loc["`beyond-outliers claims C4 --scale laptop`"]
    said = pd.read_csv(paths.RESULTS / "laptop" / "claims.csv").set_index("id").loc["C4"]
    estimate = f"{said.value:.2f} [{said.low:.2f}, {said.high:.2f}], n 6 (size and seed)"
    assert (row.verdict, row.estimate) == (said.verdict, estimate)
    targets = re.findall(r"\]\(([^)]+)\)", row.evidence)
    assert targets == ["../docs/rules.md#c4", "../figures/laptop/03_w4a4_increase.png", "03_ptq.ipynb"]


@pytest.mark.parametrize("scale", list(FROZEN))
def test_what_was_said_at_the_time_is_read_as_it_stands(scale):
    """Every verdict, number and reason of the frozen tables; none is made again."""
    said, then = judged(Study(scale)), pd.read_csv(paths.RESULTS / scale / f"{FROZEN[scale][0]}.csv")
    if scale == "confirm":
        then = then[(then.spec == "W4A4+head") & (then.optimizers == "six")]
        shown, slopes = parts(Study(scale), "C2"), then[(then.id == "C2") & (then.part != "whole")]
        assert shown.value.tolist() == slopes.estimate.tolist() and shown.verdict.tolist() == slopes.verdict.tolist()
        then = then[then.part == "whole"].rename(columns={"estimate": "value"})
    assert list(said.columns) == COLUMNS and said.id.tolist() == list(read_rules())
    for column in ("id", "verdict", "value", "low", "high", "unit", "comment"):
        assert said[column].tolist() == pytest.approx(then[column].tolist(), nan_ok=True), column
    text, (_, rules, commit, _) = how_judged(Study(scale)), FROZEN[scale]
    assert f"{rules}](../data/{rules})" in text and commit in text and (paths.DATA / rules).exists()


def test_where_nothing_is_frozen_the_rules_of_today_judge(tmp_path):
    """A reader's own tables of scale confirm are not what was frozen."""
    study = Study("pocket")
    today = read_verdicts(study).query("optimizers == 'six' and part == 'whole'").drop_duplicates("id")
    shown, expected = then_and_now(study).set_index("id"), today.set_index("id").verdict.to_dict()
    assert judged(study).set_index("id").verdict.to_dict() == shown.now.to_dict() == expected
    assert frozen(study) is None and "frozen verdicts" not in how_judged(study)
    assert frozen(Study("confirm", tmp_path)) is None
    for scale in FROZEN:
        assert shown[scale].to_dict() == judged(Study(scale)).set_index("id").verdict.to_dict(), scale
    assert shown.why.str.len().min() > 40


def test_runs_that_ended_before_the_rules_do_not_count_but_tuning_does(monkeypatch):
    ends = table("run finished_at seed", ("early", "2026-12-01T11:19:59+00:00", 400),
                 ("late", "2026-12-01T11:20:01+00:00", 401), ("far", "2026-12-01T12:30:00+02:00", 402))  # fmt: skip
    study, rows = Made(runs=ends), ends[["run", "seed"]]
    monkeypatch.setattr(verdicts, "READ", {"sweep": lambda study: rows, "final": lambda study: rows})
    for scale, counted in (("confirm2", ["late"]), ("pocket", [*ends.run])):  # far: 10:30 UTC
        study.scale = scale
        found = verdicts.tables(study)
        assert found["final"].run.tolist() == counted and found["sweep"].run.tolist() == [*ends.run]


def test_runs_at_the_found_rates_take_the_place_of_those_at_the_searched_ones():
    cell = pd.DataFrame({"size": "0.08M", "optimizer": ["adamw", "muon"], "seed": 200, "loss": 9.0, "qat_loss": 9.0})
    cell = cell.assign(increase=9.0, mmr=9.0)
    scaling = pd.concat([cell.assign(bits=bits) for bits in (16, 4)])
    common = pd.concat([cell.assign(condition=f"{head} head") for head in ("with", "without")])
    new = verdicts.at_found_rates({"runs": cell, "final": cell, "scaling": scaling, "common": common})
    row = readings.found_rates().query("optimizer == 'adamw' and seed == 200").iloc[0]
    expected = {
        ("runs", "loss"): [row.val_loss, 9],
        ("runs", "qat_loss"): [row.val_loss_qat, 9],
        ("final", "mmr"): [row.mmr_end, 9],
        ("scaling", "loss"): [row.val_loss, 9, row.val_loss_qat, 9],
        ("common", "increase"): [row.increase_common, 9, 9, 9],
        ("common", "mmr"): [row.mmr_common, 9, 9, 9],
    }
    assert {key: new[key[0]][key[1]].tolist() for key in expected} == expected


def test_lines_of_verdicts_are_those_of_the_notebook_and_its_scale():
    text = verdict_lines(Study("confirm"), "03_ptq")
    assert "- C4, **reproduced**." in text and "-0.35 [-0.38, -0.31] (n 10/10/6, log nats)" in text
    assert "](../docs/rules.md#c4)" in text and verdict_lines(Study("confirm"), "09_real_quantizers") == ""
    assert "*Would change it:*" in text and "*Would change it:*" not in verdict_lines(Study("laptop"), "03_ptq")


def test_a_long_reason_is_cut(monkeypatch):
    columns = "id statistic value low high n unit verdict notebook comment changes"
    row = "C1", "s. More", 1.0, float("nan"), float("nan"), 3, "runs", "undecided", "01", "word " * 100, "more " * 100
    monkeypatch.setattr(findings, "judged", lambda study: table(columns, row))
    text = verdict_lines(None, "01")
    assert text.endswith("more ...") and "word ... *Would" in text and len(text) < 550
    assert "[s](../docs/rules.md#c1): 1.00 (n 3, runs)" in text
