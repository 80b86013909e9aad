"""Which number of a layer tells where bits are needed: propagation, outliers, or trying it out?

Guides are measured on one text, judged on another: by rank correlation with what `ablate` saves, and by the damage
that is left when a budget of bits is shared out by them.
"""

import numpy as np
import pandas as pd
from scipy import stats
from torch import Tensor, nn

from beyond_outliers.anymodel.sensitivity import Damage, ablate, carried, estimate_with, mixed, recommend
from beyond_outliers.metrics import activation_metrics
from beyond_outliers.quantizers.convert import quantize_model
from beyond_outliers.quantizers.spec import QuantSpec

GUIDES = ("ablation", "carried", "B", "kurtosis", "mmr", "weight_error")
LOW, HIGH = 4, 8  # bits of a layer


def compare_guides(
    model: nn.Module,
    spec: QuantSpec,
    ids: Tensor,
    judged: Tensor,
    budgets: tuple[float, ...] = (4.25, 4.5, 5.0, 6.0),
    draws: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """A row for each guide and reading, with 95 % intervals over the sequences of text.

    ids: text (N, T) that the guides are measured on; judged: another one, of the damage. Columns: guide, reading
    ("rank correlation" with ablation; "kl", or "R_L" without logits, and "increase" at a budget), bits (mean over
    weight entries), value, low, high, n. "uniform": all layers alike; "random": the mean of `draws` orders.
    """
    quantized, rng = quantize_model(model, spec), np.random.default_rng(seed)
    layers = carried(model, quantized, ids)
    layers = layers.merge(activation_metrics(model, ids.split(4), spec), on="name")
    layers["mmr"] = layers.mmr.fillna(np.inf)  # most entries are zero, as after ReLU
    saved = ablate(model, quantized, Damage(model, ids), HIGH)[layers.name]
    layers["ablation"] = saved.mean().to_numpy()
    rows = []
    resamples = [saved.to_numpy()[rng.integers(len(saved), size=len(saved))].mean(0) for _ in range(1000)]
    for guide in GUIDES[1:]:
        several = [stats.spearmanr(layers[guide], resample).statistic for resample in resamples]
        row = {"value": stats.spearmanr(layers[guide], layers.ablation).statistic}
        row |= dict(zip(("low", "high"), np.quantile(several, [0.025, 0.975]), strict=True))
        rows.append({"guide": guide, "reading": "rank correlation", "bits": np.nan, **row, "n": len(saved)})
    damage = Damage(model, judged)

    def judge(guide: str, bits: float, mixes: list[dict[str, int]]):
        tables = [damage.of(mixed(model, quantized, mix)) for mix in mixes]
        for reading in tables[0]:
            several = np.mean([table[reading] for table in tables], 0)
            row = estimate_with(several, log=reading != "increase")
            rows.append({"guide": guide, "reading": reading, "bits": bits, **row, "n": len(several)})

    for width in range(LOW, HIGH + 1):
        judge("uniform", width, [dict.fromkeys(layers.name, width) if width > LOW else {}])
    for budget in budgets:
        orders = [layers.assign(random=rng.permutation(len(layers)) * layers.entries) for _ in range(draws)]
        shares = {guide: [recommend(layers, budget, guide)] for guide in GUIDES}
        for guide, several in (shares | {"random": [recommend(o, budget, "random") for o in orders]}).items():
            judge(guide, budget, [bits[bits == HIGH].to_dict() for bits in several])
    return pd.DataFrame(rows)
