"""How far a study is, in one line that a person can read: what is done of all, the time left, what runs now."""

import sys
import time
from collections.abc import Iterable
from typing import TextIO

from beyond_outliers.config.run import RunConfig

EVERY = 180  # seconds between two lines where there is no terminal to write one line over and over
# What a step takes however small the model, without and with quantization-aware training: fitted to lower quartiles of
# the committed runs (milliseconds a step, pocket: 0.03M 12, 0.08M 14, QAT 21 and 26; confirm: 0.08M 21, 0.26M 34).
STEP, QAT_STEP = 1e8, 2e8  # parameters times tokens


class Line:
    """One line of a terminal, written anew; in a file, or a pipe, a line every few minutes."""

    def __init__(self, stream: TextIO | None = None, every: float = EVERY, width: int = 120):
        self.stream, self.every, self.width = stream or sys.stderr, every, width
        self.shown, self.at = "", float("-inf")

    def show(self, text: str) -> None:
        if self.stream.isatty():
            if text != self.shown:
                cut = text if len(text) <= self.width else text[: self.width - 3] + "..."
                print(f"\r\033[K{cut}", end="", file=self.stream, flush=True)
        elif time.monotonic() - self.at >= self.every:
            print(text, file=self.stream, flush=True)
            self.at = time.monotonic()
        self.shown = text

    def note(self, text: str) -> None:
        """A line that stays."""
        print(f"\r\033[K{text}" if self.stream.isatty() else text, file=self.stream, flush=True)
        self.shown = ""

    def close(self) -> None:
        if self.stream.isatty() and self.shown:
            print(file=self.stream)


def work(config: RunConfig) -> float:
    """What training a run takes, in parameters times tokens, with the steps of small models at what they cost."""
    return config.steps * (
        config.model.n_parameters * config.tokens_per_step + (QAT_STEP if config.quantization else STEP)
    )


def left(seconds: float, done: float, remaining: float) -> str:
    """ "about 12 min left", as long as the rest takes at the pace so far; empty while there is no pace yet."""
    if not done or not remaining:
        return ""
    rest = seconds * remaining / done
    return f"about {max(1, round(rest / 60))} min left" if rest < 5400 else f"about {rest / 3600:.1f} hours left"


def sentence(*parts: str) -> str:
    """Parts that are not empty, joined by commas."""
    return ", ".join(part for part in parts if part)


def shortened(names: Iterable[str]) -> str:
    """Names of runs without the digits of their hash."""
    return ", ".join(name.rpartition("-")[0] or name for name in names)
