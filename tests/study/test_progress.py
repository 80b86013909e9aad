"""One line that says how far a study is: on a terminal, and where there is none."""

import io

import pandas as pd
import pytest

from beyond_outliers.study import progress
from beyond_outliers.study.study import Study


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_there_is_a_line_every_few_minutes(monkeypatch):
    clock, stream = iter([0.0, 0.0, 100.0, 200.0, 200.0]), io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    line = progress.Line(stream, every=180)
    for text in ("first", "second", "third"):
        line.show(text)
    line.note("stays")
    line.close()
    assert stream.getvalue() == "first\nthird\nstays\n"


def test_on_a_terminal_one_line_is_written_over_and_cut():
    stream = Terminal()
    line = progress.Line(stream, width=10)
    for text in ("one", "one", "a long line of text"):
        line.show(text)
    line.close()
    assert stream.getvalue() == "\r\033[Kone\r\033[Ka long ...\n"


@pytest.mark.parametrize(
    ("seconds", "done", "remaining", "said"),
    [
        (600, 0, 5, ""),  # no pace yet
        (600, 5, 0, ""),
        (600, 1, 2, "about 20 min left"),
        (600, 1, 0.01, "about 1 min left"),
        (3600, 1, 2, "about 2.0 hours left"),
    ],
)
def test_the_time_left_is_that_of_the_pace_so_far(seconds, done, remaining, said):
    assert progress.left(seconds, done, remaining) == said


def test_words():
    assert progress.sentence("a", "", "b") == "a, b"
    assert progress.shortened(["0.04M-muon-lr0.01-s0-7bf448f521", "corpus"]) == "0.04M-muon-lr0.01-s0, corpus"


def test_the_work_of_small_runs_is_in_proportion_to_their_seconds():
    # parameters times tokens alone put the runs of 0.08M at 8.1 times those of 0.03M; they take 3.1 times as long
    study = Study("pocket")
    done = study.table("runs").set_index("run")
    took = pd.DataFrame(
        {
            "kind": [f"{planned.config.size} {planned.config.quantization is not None}" for planned in study.planned()],
            "work": [progress.work(planned.config) for planned in study.planned()],
            "seconds": [done.seconds.get(planned.config.name) for planned in study.planned()],
        }
    )
    assert took.seconds.notna().all()
    pace = took.groupby("kind").median().eval("seconds / work")
    assert len(pace) == 4
    assert pace.max() / pace.min() < 1.5
