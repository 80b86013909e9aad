"""Findings, verdicts and their evidence on made-up tables whose answer is known, and on the committed ones."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from beyond_outliers import paths
from beyond_outliers.claims import PAPER_OPTIMIZERS, rules
from beyond_outliers.claims import evidence as evidence_module
from beyond_outliers.claims.comparison import Comparison, NothingToCompare, listed, written
from beyond_outliers.claims.confirm_readings import confirm_rules
from beyond_outliers.claims.evidence import FIGURES, evidence, judged, rule_place, verdict_lines, would_change
from beyond_outliers.claims.findings import FINDINGS
from beyond_outliers.notebook import notebooks
from beyond_outliers.study import Study

LEVELS = {"adamw": 0.5, "muon": 0.3, "psgd": 0.6, "scion": 0.35, "shampoo": 0.1, "soap": 0.4}
NOISE = [-0.01, 0.0, 0.01, 0.005]


def runs(levels=LEVELS, seeds=3, sizes=("small", "large")):
    """One row a run: the level of its optimizer, 1 more at every further size, and a little noise by seed."""
    rows = [
        (f"{size}-{name}-{seed}", size, name, 0.1, seed, "finished", level + place + NOISE[seed])
        for place, size in enumerate(sizes)
        for name, level in levels.items()
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["run", "size", "optimizer", "lr", "seed", "status", "value"])


class Made:
    """A study whose runs have the given values: of losses, and of the damage of its primary format."""

    scale = "made-up"
    protocol = SimpleNamespace(measure=SimpleNamespace(primary="W4A4+head"), optimizers=PAPER_OPTIMIZERS)

    def __init__(self, full=None, qat=None, damage=None):
        self.full, self.qat, self.damage = full, qat, damage

    def runs(self, purpose):
        rows = {"full_precision": self.full, "qat": self.qat}[purpose]
        return (runs().iloc[:0] if rows is None else rows).rename(columns={"value": "val_loss"})

    def measured(self, table, purpose="full_precision"):
        assert (table, purpose) == ("ptq", "full_precision")
        right = self.damage.rename(columns={"value": "increase"}).assign(spec="W4A4+head", checkpoint="common")
        wrong = right.assign(spec="W4A4", increase=99.0)
        return pd.concat([right, wrong, right.assign(checkpoint="final", increase=77.0)], ignore_index=True)


def test_a_mean_of_one_size_has_the_t_interval():
    table = runs(sizes=("small",))
    values = table.value[table.optimizer == "muon"]
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert Comparison(table, "value").mean("muon") == pytest.approx((values.mean(), low, high))


def test_a_difference_of_one_size_has_the_interval_of_welchs_test():
    table = runs(sizes=("small",))
    table.loc[table.optimizer == "muon", "value"] *= 3  # another spread
    first, second = (table.value[table.optimizer == name] for name in ("muon", "shampoo"))
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    found = Comparison(table, "value").difference("muon", "shampoo")
    assert found == pytest.approx((first.mean() - second.mean(), expected.low, expected.high))


def test_a_mean_over_sizes_does_not_take_the_spread_between_sizes_for_noise():
    compared = Comparison(runs(), "value")
    value, low, high = compared.mean("muon")
    assert value == pytest.approx(0.8)  # sizes 1 apart
    errors = [np.std(NOISE[:3], ddof=1) / 3**0.5] * 2
    half = np.hypot(*errors) / 2 * stats.t.ppf(0.975, 4)  # equal variances: both samples' degrees of freedom
    assert (high - low) / 2 == pytest.approx(half)
    assert (compared.over, compared.n()) == ("over small and large", "n 6 each")
    assert compared.order == ["shampoo", "muon", "scion", "soap", "adamw", "psgd"]


def test_sizes_with_enough_seeds_are_preferred_to_those_without():
    table = pd.concat([runs(sizes=("small",)), runs(seeds=1, sizes=("large",))], ignore_index=True)
    compared = Comparison(table, "value")
    assert compared.sizes == ["small"] and compared.certain and compared.caveat == ""


@pytest.mark.parametrize(("seeds", "reason"), [(1, "One seed:"), (2, "Fewer than 3 seeds of some optimizer:")])
def test_too_few_seeds_have_no_interval_and_say_why(seeds, reason):
    compared = Comparison(runs(seeds=seeds), "value")
    assert np.isnan(compared.mean("muon")[1:]).all() and np.isnan(compared.difference("muon", "soap")[1:]).all()
    assert compared.caveat.strip().startswith(reason) and "no interval" in compared.caveat


def test_an_optimizer_that_is_missing_leaves_nothing_to_compare():
    table = runs()
    with pytest.raises(NothingToCompare, match=r"Shampoo and SOAP yet \(so far: AdamW, Muon, PSGD, Scion and SOAP\)"):
        Comparison(table[table.optimizer != "shampoo"], "value")


def test_words():
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "none",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert written((0.1234, 0.1, 0.2)) == "0.123 [0.100, 0.200]" and written((0.1234, np.nan, np.nan), 1) == "0.1"


def test_the_finding_of_ptq_is_of_the_primary_format_at_the_common_loss():
    text = FINDINGS["03_ptq"](Made(damage=runs()))
    assert "W4A4+head costs Muon 0.800 [" in text and "Shampoo 0.600 [" in text
    assert "over small and large, n 6 each" in text and "a difference of 0.200 [" in text
    assert "Least hurt is Shampoo, with Muon 0.200 [" in text and "most hurt is PSGD, 1.100 [" in text
    assert "77" not in text and "99" not in text and "can be none" not in text


def test_a_difference_that_may_be_none_is_called_so():
    text = FINDINGS["03_ptq"](Made(damage=runs(LEVELS | {"muon": 0.102})))
    assert "a difference of 0.002 [-" in text and "which can be none" in text
    assert "so which of the two is lower stays open" in text


def test_one_seed_gives_numbers_without_an_interval():
    text = FINDINGS["03_ptq"](Made(damage=runs(seeds=1)))
    assert "[" not in text and "a difference of 0.200." in text and "One seed: no interval" in text
    assert "stays open" not in text  # the caveat says it already


def test_the_finding_of_full_precision_leaves_diverged_runs_out_and_says_so():
    table = runs(seeds=4)
    table.loc[(table.optimizer == "psgd") & (table.seed == 3), ["status", "value"]] = "diverged", 99.0
    text = FINDINGS["01_full_precision"](Made(full=table))
    assert text.startswith("In full precision Shampoo ends lowest, at 0.601 [") and "n 8, 8, 6, 8, 8 and 8" in text
    assert "Muon 0.200 [" in text and "PSGD ends highest, 0.499 [" in text and "Left out: 2 diverged runs." in text


def test_the_finding_of_qat_names_both_winners():
    dearer = {"adamw": 0.2, "muon": 0.5, "psgd": 0.1, "scion": 0.3, "shampoo": 0.4, "soap": 0.3}
    text = FINDINGS["05_qat"](Made(full=runs(), qat=runs({name: LEVELS[name] + dearer[name] for name in LEVELS})))
    assert "costs PSGD least, 0.100 [" in text and "Muon most, 0.500 [" in text
    assert "Shampoo, best in full precision, is best under QAT, with Scion 0.150 [" in text
    text = FINDINGS["05_qat"](Made(full=runs(), qat=runs(LEVELS | {"shampoo": 0.9})))
    assert "Muon is best under QAT (Shampoo in full precision), with Scion 0.050 [" in text


def test_what_has_not_been_run_cannot_be_said():
    text = FINDINGS["05_qat"](Made(full=runs()))
    assert text == (
        "Nothing can be said yet: no size has runs of AdamW, Muon, PSGD, Scion, Shampoo and SOAP yet (so far: none)."
    )
    assert FINDINGS["06_scaling_laws"](Made(full=runs().assign(n_parameters=1, tokens=20))).startswith("Nothing can be")


def test_the_finding_of_a_probe():
    error = SimpleNamespace(value=0.5, low=0.4, high=0.6, n_sequences=8)
    worst = pd.DataFrame({"name": ["block.3.down"], "B": [0.25]})
    found = SimpleNamespace(name="tiny", spec=SimpleNamespace(name="W4A4"), error=error, worst=lambda n: worst)
    text = FINDINGS["08_probe_your_model"](found)
    assert "tiny in W4A4" in text and "R_L, is 0.500 [0.400, 0.600] (n 8 sequences)" in text
    assert "block.3.down adds most new error (B = 0.250)" in text


def test_a_scale_of_three_optimizers_compares_those():
    three = {name: LEVELS[name] for name in ("adamw", "muon", "shampoo")}
    study = Made(damage=runs(three))
    assert "AdamW, Muon, PSGD" in FINDINGS["03_ptq"](study)  # six were planned
    study.protocol = SimpleNamespace(measure=study.protocol.measure, optimizers=("muon", "shampoo", "adamw"))
    assert "most hurt is AdamW, 1.000 [" in FINDINGS["03_ptq"](study)


def test_every_notebook_has_a_finding():
    assert sorted(FINDINGS) == [*notebooks(), "10_your_optimizer"]  # the last is of `make compare` alone


STUDIES = [name for name in FINDINGS if name not in ("08_probe_your_model", "10_your_optimizer")]


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "06_scaling_laws"])  # its fits take a while
@pytest.mark.parametrize("scale", ["pocket", "laptop", "confirm"])
def test_every_committed_study_has_its_findings(scale, name):
    text = FINDINGS[name](Study(scale))
    assert text.endswith(".") and "nan" not in text
    if name == "05_qat" and scale == "pocket":
        assert "[" not in text  # one seed under QAT: nothing has an interval


# ------------------------------------------------------------------------------------------------------------ evidence


def test_every_claim_has_a_figure_and_its_rule_a_place():
    assert list(FIGURES) == list(rules())
    for scale, file in (("laptop", "claims.toml"), ("confirm", "claims-confirm.toml")):
        for claim in rules():
            path, _, line = rule_place(scale, claim).partition("#L")
            assert (paths.ROOT / path).name == file
            assert (paths.ROOT / path).read_text().splitlines()[int(line) - 1] == f"[{claim}]"
    with pytest.raises(ValueError, match="no rule for 'C15'"):
        rule_place("laptop", "C15")


def test_the_evidence_links_rule_figure_notebook_and_command():
    table = evidence(Study("laptop")).set_index("its rows")
    row = table.loc["<code>beyond-outliers claims C4 --scale laptop</code>"]
    verdict = pd.read_csv(paths.RESULTS / "laptop" / "claims.csv").set_index("id").loc["C4"]
    assert (
        row.verdict == verdict.verdict
        and row.estimate == f"{verdict.value:.2f} [{verdict.low:.2f}, {verdict.high:.2f}], n 6 (size and seed)"
    )
    targets = re.findall(r'href="([^"]+)"', row.evidence)
    assert targets == [f"../{rule_place('laptop', 'C4')}", "../figures/laptop/03_w4a4_increase.png", "03_ptq.ipynb"]


def test_scale_confirm_is_judged_by_its_own_rules(monkeypatch, tmp_path):
    study = SimpleNamespace(scale="confirm", results=tmp_path)
    columns = ["spec", "optimizers", "id", "part", "verdict", "estimate", "low", "high", "n", "unit", "comment"]
    rows = [
        ("W4A4", "six", "C4", "whole", "reproduced", 9.0, 8.0, 10.0, "9/9/9", "log nats", "another format"),
        ("W4A4+head", "three", "C4", "whole", "reproduced", 9.0, 8.0, 10.0, "9/9/9", "log nats", "three optimizers"),
        ("W4A4+head", "six", "C3", "Muon lowest", "reproduced", 9.0, 8.0, 10.0, "9/9/9", "log MMR", "a part"),
        ("W4A4+head", "six", "C4", "whole", "tie", -0.02, -0.05, 0.01, "9/9/6", "log nats", "Within 0.1 of 0."),
    ]
    table = pd.DataFrame(rows, columns=columns).assign(rival="adamw")  # as every verdicts.csv has it
    table.to_csv(tmp_path / "verdicts.csv", index=False)
    assert list(judged(study).id) == ["C4"] and "1 tie (C4)" in FINDINGS["07_claims"](study)
    text = verdict_lines(study, "03_ptq")
    assert text.endswith("*Would change it:* " + confirm_rules()["C4"]["changes"])
    assert "- C4, **tie**." in text and "-0.02 [-0.05, 0.01] (n 9/9/6, log nats). Within 0.1 of 0." in text
    assert "](../data/claims-confirm.toml#L" in text and verdict_lines(study, "01_full_precision") == ""


def test_cells_without_runs_are_named_by_their_sizes(monkeypatch):
    row = {"id": "C1", "claim": "c", "statistic": "s", "paper": "p", "value": np.nan, "low": np.nan, "high": np.nan}
    row |= {"n": "0", "unit": "nats", "verdict": "undecided", "notebook": "01_full_precision", "changes": "x"}
    row |= {"comment": "Undecided, fewer than 3 runs: adamw at 0.16M has 0, muon at 0.16M has 0, soap at 0.26M has 0."}
    monkeypatch.setattr(evidence_module, "judged", lambda study: pd.DataFrame([row]))
    text = verdict_lines(SimpleNamespace(scale="confirm"), "01_full_precision")
    assert "fewer than 3 runs of some optimizer at 0.16M, 0.26M." in text and "adamw" not in text


def test_a_long_reason_is_cut(monkeypatch):
    row = {"id": "C1", "claim": "c", "statistic": "s. More", "paper": "p", "value": 1.0, "low": np.nan, "high": np.nan}
    row |= {"n": 3, "unit": "runs", "verdict": "undecided", "comment": "word " * 100, "notebook": "01_full_precision"}
    row |= {"changes": "more " * 100}
    monkeypatch.setattr(evidence_module, "judged", lambda study: pd.DataFrame([row]))
    text = verdict_lines(SimpleNamespace(scale="laptop"), "01_full_precision")
    assert text.endswith("more ...") and "word ... *Would" in text and len(text) < 550
    assert "[s](../data/claims.toml#L" in text and ": 1.00 (n 3" in text


def numbers(value, low, high, n=6, holds="above 0.5", verdict="undecided"):
    return {"value": value, "low": low, "high": high, "n": n, "unit": "runs", "holds": holds, "verdict": verdict}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (numbers(1.0, 0.3, 1.0, n=2), "1 more of what is counted (runs)"),
        (numbers(np.nan, np.nan, np.nan), "Data that identify the number"),
        (numbers(0.6, 0.4, 0.8), "About 24 in place of 6"),  # half as near: four times as many
        (numbers(-0.3, -0.5, 0.1, n=10, holds="below 0"), "About 18 in place of 10"),  # (4/3)^2 of 10
        (numbers(0.5, 0.2, 0.8), "the number is 0.5 itself"),
        (numbers(0.9, 0.8, 0.95), "A third size or seed: the interval is clear of 0.5"),
        (numbers(0.9, 0.8, 0.95, verdict="reproduced"), "reaches 0.5; this one ends 0.3 away"),
        (numbers(0.1, 0.0, 0.25, verdict="not reproduced"), "reaches 0.5; this one ends 0.25 away"),
    ],
)
def test_what_would_change_a_verdict_is_read_off_its_numbers(row, said):
    assert said in would_change(row)


def test_the_six_are_in_the_made_up_tables():
    assert set(LEVELS) == set(PAPER_OPTIMIZERS)
