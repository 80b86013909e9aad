"""Which number of a layer tells where bits are needed: propagation, outliers, trying it out? Writes guides.csv.

Guides are measured on one text, judged on another: by rank correlation with what `ablate` saves, and by the damage
that is left when a budget of bits is shared out by them.

.venv/bin/python tests/benchmarks/guides.py [SmolLM2] [confirm]     # an hour, a quarter of an hour on one core
"""

import sys

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn

from beyond_outliers import paths
from beyond_outliers.anymodel.loading import load
from beyond_outliers.anymodel.probe import HELD_OUT, read_windows
from beyond_outliers.anymodel.sensitivity import Damage, ablate, carried, estimate_with, mixed, recommend
from beyond_outliers.corpus.tokens import open_corpus
from beyond_outliers.evaluate.loss import window_starts
from beyond_outliers.metrics import activation_metrics
from beyond_outliers.quantizers import QuantSpec, quantize_model
from beyond_outliers.study.checkpoints import load_checkpoint

TABLE = paths.RESULTS / "guides.csv"
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
    weight entries), value, low, high, n. "uniform": all layers alike; "any width": by `carried`, in 3 to 8 bits and not
    4 or 8 alone; "random": the mean of `draws` orders.
    """
    quantized, rng = quantize_model(model, spec), np.random.default_rng(seed)
    layers = carried(model, quantized, ids)
    layers = layers.merge(activation_metrics(model, ids.split(4), spec), on="name")
    layers["mmr"] = layers.mmr.fillna(np.inf)  # most entries are zero, as after ReLU
    saved = ablate(model, quantized, Damage(model, ids), HIGH)[layers.name]
    layers["ablation"] = saved.mean().to_numpy()
    rows = []
    resamples = [saved.to_numpy()[rng.integers(len(saved), size=len(saved))].mean(0) for _ in range(1000)]
    guides = [guide for guide in GUIDES if layers[guide].nunique() > 1]  # activations alone: no error of weights
    for guide in guides[1:]:
        several = [stats.spearmanr(layers[guide], resample).statistic for resample in resamples]
        low, high = np.arctanh(np.quantile(several, [0.025, 0.975]))
        value = stats.spearmanr(layers[guide], layers.ablation).statistic
        # of the resamples, whose noise lowers them, the width alone counts, on Fisher's scale
        ends = np.tanh(np.arctanh(value) + np.array([-1, 1]) * (high - low) / 2)
        row = {"value": value, "low": ends[0], "high": ends[1]}
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
        shares = {guide: [recommend(layers, budget, guide)] for guide in guides}
        shares["any width"] = [recommend(layers, budget, "carried", tuple(range(LOW - 1, HIGH + 1)))]
        for guide, several in (shares | {"random": [recommend(o, budget, "random") for o in orders]}).items():
            judge(guide, budget, [bits[bits != LOW].to_dict() for bits in several])
    return pd.DataFrame(rows)


SMOLLM2 = ("A4", "W4")  # its weights lie on a grid of 16 levels already, in blocks of 32


def smollm2():
    model, tokenizer = load("SmolLM2")
    ids = read_windows(model, tokenizer, HELD_OUT, 48, 20)
    for name in SMOLLM2:
        yield {"model": "SmolLM2-135M", "optimizer": "", "spec": name}, model, QuantSpec.named(name), ids[:8], ids[8:]


def confirm():
    for file in sorted((paths.ROOT / "data" / "checkpoints" / "confirm").glob("*.safetensors")):
        config, model = load_checkpoint(file)
        if config.quantization:
            continue
        tokens = open_corpus(config.corpus, config.context).validation
        starts = window_starts(len(tokens), config.context, 64 * config.context)
        rows = [torch.from_numpy(tokens[start : start + config.context].astype("int64")) for start in starts]
        ids = torch.stack(rows)
        yield (
            {"model": config.size, "optimizer": config.optimizer, "spec": "W4A4"},
            model,
            QuantSpec(),
            ids[::2],
            ids[1::2],
        )


def main(names: list[str]):
    for name, source in {"SmolLM2": smollm2, "confirm": confirm}.items():
        if name not in names:
            continue
        for labels, *what in source():
            table = compare_guides(*what)
            for column, value in reversed(labels.items()):
                table.insert(0, column, value)
            print(table.to_string(), flush=True)
            known = pd.read_csv(TABLE).fillna({"optimizer": ""}) if TABLE.exists() else table[:0]
            same = (known[list(labels)] == pd.Series(labels)).all(axis=1)
            pd.concat([known[~same], table]).to_csv(TABLE, index=False)


if __name__ == "__main__":
    main(sys.argv[1:] or ["SmolLM2", "confirm"])
