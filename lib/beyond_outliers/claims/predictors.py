"""Which cheap number predicts the damage of quantization? Candidates, targets, and correlations with intervals.

Paper: arXiv 2509.23500, section 5 and figure 1 (MMR, kurtosis and R_L against accuracy after PTQ, over optimizers).
"""

import pandas as pd

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
