"""Learning rates: the choice on a grid, the search of scales that tune, and the table of what was chosen.

A grid ([learning_rates] of a scale file) is swept whole. A search ([tuning]) goes by one rule for every optimizer, one
(size, optimizer) after the other.

Two rates are tuned, each on a line of rates a factor apart: first the auxiliary rate (embedding and vectors) with the
hidden matrices' rate at its start, then the matrices' rate at the chosen auxiliary one. On each line the choice is the
smallest rate whose final validation loss is within `tolerance` nats of the best, never one beside a diverged rate; the
line is extended until the choice and the best lie inside it. The smallest size starts where the scale file says, every
other at the choice of the size before.

Embedding and vectors take the same step per entry: vector_lr = embedding_lr, for Scion, whose sign step on the
embedding is divided by its width, vector_lr = embedding_lr / width.
"""

import contextlib
import csv
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beyond_outliers import checksums, paths
from beyond_outliers.config.run import Rate, RunConfig

if TYPE_CHECKING:
    from beyond_outliers.config.protocol import Protocol
    from beyond_outliers.config.scale import Tuning

MOST_RATES = 12  # on a line; a search that wants more has gone astray


class EdgeWarning(UserWarning):
    """The best learning rate lies at the edge of its grid: the true optimum may lie outside."""


@dataclass(frozen=True)
class Rates:
    """The learning rates of a run: of the hidden matrices, and, where a scale tunes it, of embedding and vectors."""

    lr: Rate
    auxiliary: Rate | None = None


def choose_learning_rate(lrs: list[float], losses: list[float]) -> tuple[float, bool]:
    """(best learning rate, whether it lies at the edge of the grid) from one loss a learning rate; nan = diverged.

    Inside the grid: the vertex of the parabola through the best point and its two neighbours in log(lr), rounded to
    two digits. At the edge, or beside a diverged run, the best point itself. ValueError when every run diverged.
    """
    order = np.argsort(lrs)
    x, y = np.log(np.asarray(lrs, float)[order]), np.asarray(losses, float)[order]
    if np.isnan(y).all():
        raise ValueError(f"every learning rate of {sorted(lrs)} diverged: extend the grid downwards")
    best = int(np.nanargmin(y))
    edge = best in (0, len(y) - 1)
    near = slice(best - 1, best + 2)
    if not edge and np.isfinite(y[near]).all():
        steps = x[near] - x[best]
        a, b, _ = np.polyfit(steps, y[near], 2)
        if a > 0:
            shift = float(np.clip(-b / (2 * a), steps[0], steps[2]))
            return float(f"{math.exp(x[best] + shift):.1e}"), False
    return float(np.exp(x[best]).round(12)), edge


def read_rates(scale: str, results: Path | None = None) -> dict[tuple[str, str], Rates]:
    """(swept size, optimizer) -> chosen rates; empty before the sweep is done. results: a folder of tables to read."""
    file = (results or paths.results(scale)) / "learning_rates.csv"
    if not file.exists():
        return {}
    checksums.check(file.parent, file.name, remedy=f"`git restore {file}`, or choose them again")
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))  # sizes of one table may have an auxiliary rate or none
    found = [(row, row.get("auxiliary")) for row in rows]
    return {
        (row["size"], row["optimizer"]): Rates(float(row["lr"]), float(rate) if rate else None) for row, rate in found
    }


class Pending(Exception):
    """A run that the search asks for has not been trained yet."""


def line_search(loss: Callable[[float], float], start: float, factor: float, tolerance: float) -> dict[str, Any]:
    """Chooses a rate among start * factor^k by the rule above; `loss(rate)` is NaN where the run diverged.

    Returns {"rate": the choice, "best": the rate of the lowest loss, "tried": {rate: loss}, in ascending order}.
    ValueError after MOST_RATES rates, and where the first three end in one loss: the rate has no effect.
    """
    tried: dict[int, float] = {}

    def rate(k: int) -> float:
        return float(f"{start * factor**k:.6g}")

    def finite(*places: int) -> bool:
        return all(math.isfinite(tried.get(k, math.nan)) for k in places)

    asked = [0, -1, 1]
    while True:
        for k in asked:
            tried[k] = loss(rate(k))
        rates = {rate(k): tried[k] for k in sorted(tried)}
        if tried[-1] == tried[0] == tried[1]:  # NaN, where all three diverged, is equal to none
            raise ValueError(
                f"the rates {[*rates]} all end in the loss {tried[0]:.6g}: the learning rate has no effect"
            )
        safe = [k for k in tried if finite(k)]
        inside = [k for k in safe if finite(k - 1, k + 1)]  # not at the end of the line, nor beside a diverged rate
        best = min(safe, key=lambda k: tried[k], default=None)
        asked = [] if best is None else [k for k in (best + 1, best - 1) if k not in tried][:1]
        if not asked and not inside:  # all diverged, or the best is beside one that did: look further down
            asked = [min(tried) - 1]
        elif not asked:
            best = min(inside, key=lambda k: tried[k])
            good = [k for k in safe if tried[k] <= tried[best] + tolerance and finite(k + 1)]
            choice = min(k for k in good if k - 1 not in tried or finite(k - 1))
            if choice - 1 in tried:
                return {"rate": rate(choice), "best": rate(best), "tried": rates}
            asked = [choice - 1]
        if len(tried) == MOST_RATES:
            raise ValueError(f"no choice inside the grid after {[*rates]}: another start is needed")


Pair = tuple[int, int]  # factor^i times the matrix rate of the start, factor^j times the auxiliary one
CROSS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))


def pair_search(
    loss: Callable[[float, float, int], float], start: Rates, rule: "Tuning", cross_seeds: int = 0
) -> dict[str, Any]:
    """Chooses a pair of rates by the rule above; `loss(lr, auxiliary, seed)` is NaN where the run diverged.

    cross_seeds: 0 for the grid, else how many seeds every pair of the cross about `start` is trained from. Returns
    {"lr", "auxiliary", "lines": the rates tried of each, ascending, "n_runs"}. ValueError where every pair
    diverged, and where more than MOST_RATES rates of a kind are asked for.
    """
    tried: dict[tuple[Pair, int], float] = {}
    starts = start.lr, start.auxiliary or 0.0

    def rates(pair: Pair) -> tuple[float, float]:
        lr, auxiliary = (float(f"{first * rule.factor**k:.6g}") for first, k in zip(starts, pair, strict=True))
        return lr, auxiliary

    def means(pairs: Iterable[Pair], seeds: Sequence[int]) -> dict[Pair, float]:
        """Mean losses over seeds, of the pairs of which none diverged, neither at the next larger matrix rate."""
        for seed, pair in itertools.product(seeds, pairs):
            if (pair, seed) not in tried:
                tried[pair, seed] = loss(*rates(pair), seed)
        mean = {pair: sum(tried[pair, seed] for seed in seeds) / len(seeds) for pair in pairs}
        above = {(i, j): tried.get(((i + 1, j), seeds[0]), 0.0) for i, j in mean}
        finite = {pair: value for pair, value in mean.items() if math.isfinite(value + above[pair])}
        if not finite:
            raise ValueError(f"every pair of rates about {start} diverged: another start is needed")
        return dict(sorted(finite.items(), key=lambda item: item[1]))  # the lowest first

    pairs: set[Pair] = set()
    grown = set(CROSS) if cross_seeds else set(itertools.product(range(rule.shape[0]), range(rule.shape[1])))
    while not grown <= pairs:
        pairs |= grown
        rows, columns = (sorted(set(places)) for places in zip(*pairs, strict=True))
        if max(len(rows), len(columns)) > MOST_RATES:
            raise ValueError(f"no lowest loss inside {len(rows)} x {len(columns)} rates: another start is needed")
        losses = means(sorted(pairs), rule.seeds[: cross_seeds or 1])
        i, j = next(iter(losses))
        if cross_seeds:
            grown = {(i + x, j + y) for x, y in CROSS}
        else:
            grown = {(end + way, k) for end, way in ((rows[0], -1), (rows[-1], 1)) if i == end for k in columns}
            grown |= {(k, end + way) for end, way in ((columns[0], -1), (columns[-1], 1)) if j == end for k in rows}
    if not cross_seeds:
        losses = means([*losses][: rule.finalists], rule.seeds)
    lr, auxiliary = rates(min(pair for pair, mean in losses.items() if mean <= min(losses.values()) + rule.tolerance))
    lrs, auxiliaries = (sorted(set(line)) for line in zip(*(rates(pair) for pair, _ in tried), strict=True))
    return {"lr": lr, "auxiliary": auxiliary, "lines": {"lr": lrs, "auxiliary": auxiliaries}, "n_runs": len(tried)}


def auxiliary_rates(optimizer: str, auxiliary: float, width: int) -> dict[str, float]:
    """Hyperparameters of an auxiliary rate: the same step per entry of embedding and vectors."""
    vector = float(f"{auxiliary / width:.6g}") if optimizer == "scion" else auxiliary
    return {"embedding_lr": auxiliary, "vector_lr": vector}


def tune(protocol: "Protocol", size: str, optimizer: str, val_loss: Callable[[RunConfig], float]) -> dict[str, Any]:
    """Both rates of an optimizer at a size: {"lr", "auxiliary", "lines": {"auxiliary": rates, "lr": rates}, "n_runs"}.

    `val_loss(config)`: the final validation loss of a tuning run, NaN when it diverged; it may raise `Pending`.
    """
    rule, place = protocol.tuning, protocol.sizes.index(size)
    start = rule.start[optimizer]
    if place:
        before = tune(protocol, protocol.sizes[place - 1], optimizer, val_loss)
        start = Rates(before["lr"], before["auxiliary"])

    def loss(lr: float, auxiliary: float | None, seed: int = rule.seeds[0]) -> float:
        return val_loss(protocol.config(size, optimizer, lr=lr, auxiliary=auxiliary, seed=seed))

    if rule.shape:
        return pair_search(loss, start, rule, rule.cross_seeds.get(size, 0))
    step = rule.factor, rule.tolerance
    first = line_search(lambda rate: loss(start.lr, rate), start.auxiliary or 0.0, *step)
    second = line_search(lambda rate: loss(rate, first["rate"]), start.lr, *step)
    lines = {"auxiliary": list(first["tried"]), "lr": list(second["tried"])}
    n_runs = sum(map(len, lines.values())) - 1  # both lines share the run at which the second one starts
    return {"lr": second["rate"], "auxiliary": first["rate"], "lines": lines, "n_runs": n_runs}


def runs_of_search(
    protocol: "Protocol", size: str, optimizer: str, losses: Callable[[str], float | None]
) -> list[RunConfig]:
    """The runs of a size that the search asks for, in its order, as far as they can be known: the last is the next one.

    `losses` gives the final validation loss of a run by its name, None while it has not ended.
    """
    asked: dict[str, RunConfig] = {}

    def val_loss(config: RunConfig) -> float:
        asked[config.name] = config
        loss = losses(config.name)
        if loss is None:
            raise Pending(config.name)
        return loss

    with contextlib.suppress(Pending):
        tune(protocol, size, optimizer, val_loss)
    return [config for config in asked.values() if config.size == size]
