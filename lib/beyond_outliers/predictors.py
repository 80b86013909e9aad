"""Which cheap number predicts the damage of quantization? Candidates, targets, and correlations with intervals.

Paper: arXiv 2509.23500, section 5 and figure 1 (MMR, kurtosis and R_L against accuracy after PTQ, over optimizers).
"""

import numpy as np
import pandas as pd
from scipy.stats import rankdata

# candidate -> where it comes from; all of them in every table, none picked after the fact
CANDIDATES = {
    "mmr": "mean over linear inputs of max / median, without `down`, whose median is near zero (paper)",
    "mmr_all": "the same with `down`",
    "kurtosis": "mean over linear inputs (paper)",
    "mean_B": "mean over modules of the new error B (paper)",
    "R_L": "relative error at the network's end (paper's proposal)",
    "mean_gain": "mean gain of the linear layers, attention opened up (paper)",
    "noise_gain": "what linear layers do to undirected noise, full precision alone (this project)",
    "expected_error": "noise_gain times the rounding errors of input and weight (this project)",
}
TARGETS = {"increase": "loss increase under W4A4", "accuracy": "cloze accuracy after W4A4"}


def predictor_table(study, purpose: str = "full_precision", checkpoint: str = "final") -> pd.DataFrame:
    """One row a run: size, optimizer, lr, seed, every candidate and both targets of the paper's W4A4 format."""
    keys = ["run", "size", "optimizer", "lr", "seed"]

    def measured(name: str) -> pd.DataFrame:
        table = study.measured(name, purpose)
        return table[table.checkpoint == checkpoint]

    inputs = measured("outliers")
    outliers = inputs.groupby(keys, sort=False)[["kurtosis", "noise_gain", "expected_error"]].mean()
    modules = measured("propagation")
    linear = modules[(modules.attention == "open") & (modules.kind == "linear") & (modules.name != "head")]
    modules = modules[modules.attention == "unit"]
    ptq, accuracy = measured("ptq").query("spec == 'W4A4'"), measured("zero_shot").query("spec == 'W4A4'")
    columns = {
        "mmr": inputs[inputs.kind != "down"].groupby("run").mmr.mean(),
        "mmr_all": inputs.groupby("run").mmr.mean(),
        "mean_B": modules.groupby("run").B.mean(),
        "R_L": modules.sort_values("index").groupby("run").R.last(),
        "mean_gain": linear.groupby("run").gain.mean(),
        "increase": ptq.set_index("run").increase,
        "accuracy": accuracy[accuracy.task == "cloze"].set_index("run").accuracy,
    }
    table = outliers.reset_index()
    for name, values in columns.items():
        table[name] = table.run.map(values)
    return table


def correlations(
    table: pd.DataFrame,
    within: str | None = None,
    candidates: tuple[str, ...] = tuple(CANDIDATES),
    targets: tuple[str, ...] = tuple(TARGETS),
    draws: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Pearson and Spearman correlation of every candidate with every target, with percentile bootstrap intervals.

    One row a (target, candidate): n points, pearson, pearson_low, pearson_high, spearman, ... `within` names a column
    whose group means are taken out first (of ranks, for Spearman), so that pooled sizes do not correlate by their size
    alone. Rows where the candidate or the target is missing are left out. Fewer than four points give NaN intervals.
    """
    rng, rows, tail = np.random.default_rng(seed), [], 100 * (1 - confidence) / 2
    for target in targets:
        for candidate in candidates:
            kept = table.dropna(subset=[candidate, target])
            groups = kept[within].to_numpy() if within else np.zeros(len(kept))
            x, y = kept[candidate].to_numpy(float), kept[target].to_numpy(float)
            row = {"target": target, "candidate": candidate, "n": len(kept)}
            for name, transform in (("pearson", lambda v: v), ("spearman", rankdata)):
                u, v = (_without_group_means(transform(values), groups) for values in (x, y))
                picks = rng.integers(len(kept), size=(draws, len(kept))) if len(kept) else np.zeros((0, 0), int)
                low = high = np.nan
                if len(kept) > 3:
                    low, high = np.nanpercentile(_pearson(u[picks], v[picks]), [tail, 100 - tail])
                value = _pearson(u[None], v[None])[0] if len(kept) > 1 else np.nan
                row |= {name: value, f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def _without_group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return values - pd.Series(values).groupby(groups).transform("mean").to_numpy()


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation along the last axis of (draws, n) arrays; NaN where one side is constant."""
    x, y = (values - values.mean(-1, keepdims=True) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
