"""The ledger of the claims, as it is drawn."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from beyond_outliers import plots

ROWS = [
    ("C1", "whole", "reproduced", -0.4, -0.5, -0.3, "nats", "3", 0.0, -1),
    ("C2", "whole", "tie", np.nan, np.nan, np.nan, "slope", "3", 0.0, 1),
    ("C2", "muon", "not reproduced", -0.2, -0.4, -0.1, "slope", "3", 0.0, 1),
    ("C8", "whole", "undecided", 0.85, 0.7, 0.9, "share", "3", 0.8, 1),
]
COLUMNS = ["id", "part", "verdict", "value", "low", "high", "unit", "n", "threshold", "side"]
CLAIMS = pd.Series({"C1": "First", "C2": "Second " * 30, "C8": "Third"})


def test_the_claimed_side_is_right_and_numbers_are_written_out():
    (ax,) = plots.verdict_ledger(pd.DataFrame(ROWS, columns=COLUMNS), CLAIMS).axes
    spans = [list(line.get_xdata()) for line in ax.get_lines() if len(line.get_xdata()) == 2][:-1]
    assert spans == [pytest.approx(ends) for ends in ([1, 0.6], [-1, -0.25], [-1, 1])]
    texts = [text.get_text() for text in ax.texts]
    assert texts[:2] == ["reproduced", "-0.4 [-0.5, -0.3] nats, n 3"] and texts[2:4] == ["tie", ""]
    assert texts[-1] == "0.85 [0.7, 0.9] share, threshold 0.8, n 3"
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels[0] == "C1  First" and labels[1].endswith("...") and len(labels[1]) < 90 and labels[2] == "Muon"
    plt.close("all")


def test_an_unknown_verdict_is_refused():
    table = pd.DataFrame(ROWS, columns=COLUMNS).assign(verdict="perhaps")
    with pytest.raises(ValueError, match="unknown verdicts \\['perhaps'\\]; valid: reproduced"):
        plots.verdict_ledger(table, CLAIMS)
