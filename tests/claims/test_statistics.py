"""The test of equal means over optimizers."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_ind

from beyond_outliers.claims.statistics import means_differ


def rows(**of):
    """One size; a value a run of each optimizer."""
    return pd.DataFrame(
        [("s", name, value) for name, values in of.items() for value in values],
        columns=["size", "optimizer", "increase"],
    )


def test_two_optimizers_as_by_welch():
    rng = np.random.default_rng(0)
    few, many = rng.normal(0.1, 0.02, 10), rng.normal(0.14, 0.05, 15)
    found = means_differ(rows(adamw=few, muon=many), "increase").iloc[0]
    assert (found["size"], found.n_optimizers, found.n_runs) == ("s", 2, 25)
    assert found["range"] == pytest.approx(many.mean() - few.mean())
    assert found.p == pytest.approx(ttest_ind(few, many, equal_var=False).pvalue, rel=0.1)


def test_equal_means_are_seldom_told_apart():
    """Three optimizers, six seeds each, unequal variances: p falls below .1 in about a tenth of 300 draws."""
    rng = np.random.default_rng(0)
    draws = ({name: rng.normal(0.1, 0.02 * (i + 1), 6) for i, name in enumerate("abc")} for _ in range(300))
    assert 0.05 < np.mean([means_differ(rows(**draw), "increase").p[0] < 0.1 for draw in draws]) < 0.15


@pytest.mark.parametrize("of", [{"a": [0.1, 0.2]}, {"a": [0.1, 0.2], "b": [0.1]}, {"a": [0.1, 0.2], "b": [0.1] * 3}])
def test_too_few_to_say(of):
    found = means_differ(rows(**of), "increase")
    assert len(found) == 1 and found[["statistic", "p"]].isna().all(axis=None)


def test_no_run_no_row():
    assert list(means_differ(rows(), "increase").columns)[:2] == ["size", "n_optimizers"]
