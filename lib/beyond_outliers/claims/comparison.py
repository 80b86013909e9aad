"""Optimizers in words: a mean of each over sizes, differences of two, and why there is no interval where there is none.

Sizes are strata and seeds replicates, as in `contrasts`: a mean over sizes has the t interval whose squared standard
error and degrees of freedom are those of a Welch contrast with a constant 0.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from beyond_outliers.claims.confirm_kinds import with_zero
from beyond_outliers.claims.contrasts import LEAST_SEEDS, USUAL, Cells, cells, contrast
from beyond_outliers.claims.readings import PAPER_OPTIMIZERS
from beyond_outliers.config.loading import is_own
from beyond_outliers.config.optimizers import REGISTRY, entry

Interval = tuple[float, float, float]  # estimate, low, high (95 %); NaN where there is none


class NothingToCompare(ValueError):
    """No size has a run of every optimizer of the paper yet; the message says what is there."""


def label(name: str) -> str:
    """An optimizer's name in figures and sentences."""
    return entry(name).label if name in REGISTRY or is_own(name) else name


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"; "none" of nothing."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "none"


def without(value: float) -> Interval:
    """A value that has no interval."""
    return float(value), np.nan, np.nan


def written(found: Interval, digits: int = 3, scale: float = 1.0) -> str:
    """ "0.163 [0.150, 0.176]", or the number alone where it has no interval."""
    value, low, high = (f"{scale * number:.{digits}f}" for number in found)
    return f"{value} [{low}, {high}]" if np.isfinite(found[1:]).all() else value


class Comparison:
    """Optimizers by one value, over the sizes at which all of them have runs, or enough runs for an interval."""

    def __init__(self, rows: pd.DataFrame, value: str, optimizers: Sequence[str] = PAPER_OPTIMIZERS):
        """`rows`: size, optimizer, seed and `value`, one row a run; NaN for a run that diverged.

        Raises NothingToCompare where no size has a run of each optimizer.
        """
        sizes = list(dict.fromkeys(rows["size"]))
        least = cells(rows, value, optimizers, sizes).n.min(0) if sizes else np.zeros(0, int)
        wanted = next((n for n in (LEAST_SEEDS, 1) if (least >= n).any()), None)
        if wanted is None:
            there = [label(name) for name in optimizers if name in set(rows.optimizer)]
            raise NothingToCompare(
                f"no size has runs of {listed([label(name) for name in optimizers])} yet (so far: {listed(there)})"
            )
        self.sizes = [size for size, n in zip(sizes, least, strict=True) if n >= wanted]
        self.cells: Cells = cells(rows, value, optimizers, self.sizes)
        self.certain = wanted == LEAST_SEEDS
        self.order = [optimizers[place] for place in self.cells.mean.mean(-1).argsort(kind="stable")]  # lowest first

    def mean(self, name: str) -> Interval:
        """Mean over sizes of the means over seeds, with its interval."""
        place = self.cells.of([name])
        parts = (values[place] for values in (self.cells.mean, self.cells.variance, self.cells.n))
        own = Cells((name,), self.cells.sizes, *parts)
        return self._interval(with_zero(own), (name, "zero"), float(own.mean.mean()))

    def difference(self, first: str, second: str) -> Interval:
        """First minus second."""
        one, two = self.cells.mean[self.cells.of([first, second])].mean(-1)
        return self._interval(self.cells, (first, second), float(one - two))

    def _interval(self, of: Cells, pair: tuple[str, str], estimate: float) -> Interval:
        low, high = contrast(of, [pair]).interval(USUAL)
        return estimate, float(low[0]), float(high[0])

    def n(self, *names: str) -> str:
        """ "n 6 each", or "n 6 and 5": runs behind the numbers of these optimizers (default: all)."""
        counts = [int(n) for n in self.cells.n.sum(-1)[self.cells.of(names or self.cells.optimizers)]]
        if len(set(counts)) == 1:
            return f"n {counts[0]}{' each' if len(counts) > 1 else ''}"
        return f"n {listed([str(count) for count in counts])}"

    @property
    def over(self) -> str:
        """ "at 0.08M", or "over 0.08M and 0.16M"."""
        return f"{'over' if len(self.sizes) > 1 else 'at'} {listed(self.sizes)}"

    @property
    def caveat(self) -> str:
        """Why there is no interval, as a sentence with a space before it; empty where there is one."""
        if self.certain:
            return ""
        seeds = "One seed" if self.cells.n.max() == 1 else f"Fewer than {LEAST_SEEDS} seeds of some optimizer"
        return f" {seeds}: no interval, so differences may be luck."


def excludes_zero(found: Interval) -> bool:
    """Whether the interval lies on one side of 0; False where there is none."""
    return found[1] > 0 or found[2] < 0
