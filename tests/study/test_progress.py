"""One line that says how far a study is: on a terminal, and where there is none."""

import io

import pytest

from beyond_outliers.study import progress


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
