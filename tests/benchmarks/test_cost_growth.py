"""What the committed table of costs says: nothing grows faster than it should."""

import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parent))
import cost_growth

import benchmarking

# Largest power of an axis with which a cost may grow; GPTQ inverts matrices of width^2, as parameters grow: 1.5.
LARGEST = {"parameters": 1.3, "tokens": 1.15, "modules": 1.15}


@pytest.mark.parametrize("axis", LARGEST)
def test_time_grows_no_faster_than_what_it_is_spent_on(axis):
    table = pd.read_csv(cost_growth.FILE).query("axis == @axis")
    powers = {what: cost_growth.exponent(rows, axis, "seconds") for what, rows in table.groupby("what")}
    assert len(powers) == 6
    assert {what: power for what, power in powers.items() if power > LARGEST[axis] + 0.2 * (what == "GPTQ")} == {}


def test_memory_does_not_grow_with_the_number_of_batches():
    table = pd.read_csv(cost_growth.FILE).query("axis == 'tokens'")
    for what, rows in table.groupby("what"):
        peaks = rows.sort_values("tokens").megabytes
        assert peaks.iloc[-1] < 1.5 * peaks.iloc[0] + 10, what


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peaks_and_times_are_those_of_the_call():
    held = []
    seconds, peak = benchmarking.measured(lambda: held.append(bytearray(50_000_000)), repeats=1)
    assert 45e6 < peak < 70e6 and 0 < seconds < 5
