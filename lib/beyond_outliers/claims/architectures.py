"""The same optimizers on another architecture: do their differences carry over?

Scale `llama` repeats the smallest size of the confirmatory study with a pre-norm, gated decoder, rates tuned by the
same rule, for the three optimizers that the paper trains at every size. No rule judges it.
"""

from collections.abc import Sequence
from itertools import combinations

import pandas as pd

from beyond_outliers.claims.compare import Comparison, Estimate, NothingToCompare, label, listed
from beyond_outliers.claims.effects import NATS, QUANTITIES, at_size, scaled, titles
from beyond_outliers.study.study import Study
from beyond_outliers.study.tables import MissingResults

ARCHITECTURES = {"OLMo2-style": ("confirm", "0.08M"), "Llama-style": ("llama", "0.086M")}  # -> scale and size
SCALES = tuple(scale for scale, _ in ARCHITECTURES.values())
SECTION = """## The same three on another architecture

AdamW, Muon and Shampoo again at the smallest size, on a pre-norm, gated, Llama-style decoder (scale `llama`, four
seeds, rates tuned by the same rule): the first of each pair less the second, or how many times the second, with its
95 % interval over seeds. A difference *carries over* where both intervals say so, with the same sign. The Common Loss
is that of a scale's own optimizers, so it is another one here than there. No claim is judged by this."""
YES, REVERSED, NEITHER = "yes", "no, the other way round", "seen in neither"


def _compared(study, size: str, quantity: str, optimizers: Sequence[str]) -> Comparison | None:
    of = QUANTITIES[quantity]
    try:
        rows = at_size(study, of, size)
        return Comparison(rows.assign(compared=scaled(rows[of.value], of.unit)), "compared", optimizers)
    except (MissingResults, NothingToCompare):
        return None


def _carries(found: dict[str, Estimate]) -> str:
    """`found`: architecture -> a pair's difference there."""
    told = [name for name, difference in found.items() if difference.excludes_zero]
    if len(told) == len(found):
        return YES if len({difference.value > 0 for difference in found.values()}) == 1 else REVERSED
    return f"seen in {listed(told)} alone" if told else NEITHER


def summary(table: pd.DataFrame) -> str:
    """What `differences` found, in a sentence; each difference by itself, at 95 %."""
    of = table["carries over"]
    counts = {YES: "carry over", REVERSED: "turn round", NEITHER: NEITHER}
    said = [f"{(of == found).sum()} {words}" for found, words in counts.items()]
    alone = [f"{n} {where}" for where, n in of[~of.isin(counts)].value_counts(sort=False).sort_index().items()]
    return f"Of {len(of)} differences {listed([*said, *alone])}."


def differences(studies: dict[str, tuple[Study, str]] | None = None) -> pd.DataFrame:
    """Pairs of optimizers by every quantity of `effects`, on each architecture.

    studies: architecture -> its study and size (default: ARCHITECTURES, from the committed tables). One row a quantity
    and pair: quantity, pair ("Muon - AdamW", or "Muon / AdamW" where ratios are told), a column an architecture, and
    carries over. Quantities that one of them lacks have no row; unpaired Welch intervals (95 %).
    """
    studies = studies or {name: (Study(scale), size) for name, (scale, size) in ARCHITECTURES.items()}
    shared = set.intersection(*(set(study.protocol.optimizers) for study, _ in studies.values()))
    first = next(iter(studies.values()))[0]
    optimizers = [name for name in first.protocol.optimizers if name in shared]
    rows = []
    for quantity, (title, unit) in titles(first).items():
        compared = [_compared(study, size, quantity, optimizers) for study, size in studies.values()]
        if None in compared:
            continue
        for one, other in combinations(optimizers[::-1], 2):
            found = [of.difference(one, other) for of in compared if of]
            texts = [QUANTITIES[quantity].told(each) for each in found]
            pair = f" {'-' if unit == NATS else '/'} ".join([label(one), label(other)])
            rows.append((title, pair, *texts, _carries(dict(zip(studies, found, strict=True)))))
    return pd.DataFrame(rows, columns=["quantity", "pair", *studies, "carries over"])
