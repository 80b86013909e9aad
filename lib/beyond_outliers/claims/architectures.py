"""The same optimizers on another architecture: do their differences carry over?

Scale `llama` repeats the smallest size of the confirmatory study with a pre-norm, gated decoder, rates tuned by the
same rule, for the three optimizers that the paper trains at every size. No rule judges it.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from beyond_outliers.claims.comparison import Comparison, NothingToCompare, excludes_zero, label, written
from beyond_outliers.claims.effects import NATS, QUANTITIES, TIMES, titles
from beyond_outliers.claims.eligibility import eligible
from beyond_outliers.study.study import Study
from beyond_outliers.study.tables import MissingResults

ARCHITECTURES = {"OLMo2-style": ("confirm", "0.08M"), "Llama-style": ("llama", "0.086M")}  # -> scale and size
SCALES = tuple(scale for scale, _ in ARCHITECTURES.values())
SECTION = """## The same three on another architecture

AdamW, Muon and Shampoo again at the smallest size, on a pre-norm, gated, Llama-style decoder (scale `llama`, four
seeds, rates tuned by the same rule): the first of each pair less the second, or how many times the second, with its
95 % interval over seeds. A difference *carries over* where both intervals lie on the same side of none. The Common Loss
is that of a scale's own optimizers, so it is another one here than there. No claim is judged by this."""


def _compared(study, size: str, quantity: str, optimizers: Sequence[str]) -> Comparison | None:
    of = QUANTITIES[quantity]
    try:
        rows = eligible(study, of.rows(study))
        rows = rows[rows["size"] == size]
        values = np.log(rows[of.value]) if of.unit == TIMES else rows[of.value]
        return Comparison(rows.assign(compared=values), "compared", optimizers)
    except (MissingResults, NothingToCompare):
        return None


def _carries(found: Sequence[tuple[float, float, float]]) -> str:
    if not all(excludes_zero(one) for one in found):
        return "not told apart on both"
    return "yes" if len({one[0] > 0 for one in found}) == 1 else "no, the other way round"


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
            shown = found if unit == NATS else [tuple(np.exp(each)) for each in found]
            texts = [written(each, 3 if unit == NATS else 2) for each in shown]
            pair = f" {'-' if unit == NATS else '/'} ".join([label(one), label(other)])
            rows.append((title, pair, *texts, _carries(found)))
    return pd.DataFrame(rows, columns=["quantity", "pair", *studies, "carries over"])
