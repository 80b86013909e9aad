"""Which cheap number predicts the damage of quantization? Candidates and targets, one row a run.

Paper: arXiv 2509.23500, section 5 and figure 1 (MMR, kurtosis and R_L against accuracy after PTQ, over optimizers).
"""

import pandas as pd

from beyond_outliers.claims import readings

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


def predictor_table(
    study, purpose: str = "full_precision", checkpoint: str = "final", spec: str | None = None
) -> pd.DataFrame:
    """One row a run: size, optimizer, lr, seed, every candidate and both targets, those of the format `spec`.

    spec: None for the scale's primary format.
    """
    where = {"purpose": purpose, "checkpoint": checkpoint}
    inputs = readings.measured(study, "outliers", **where)
    averages = inputs.groupby(readings.RUN, sort=False)[["mmr", "kurtosis", "noise_gain", "expected_error"]].mean()
    columns = {
        "mmr": readings.mmr(study, **where).set_index("run").mmr,
        "mean_B": readings.new_error(study, **where).set_index("run").mean_B,
        "R_L": readings.output_error(study, **where).set_index("run").R_L,
        "mean_gain": readings.linear_gain(study, **where).set_index("run").gain,
        "increase": readings.damage(study, spec=spec, **where).set_index("run").increase,
        "accuracy": readings.cloze(study, spec or readings.primary(study), **where).set_index("run").accuracy,
    }
    table = averages.rename(columns={"mmr": "mmr_all"}).reset_index()
    for name, values in columns.items():
        table[name] = table.run.map(values)
    return table[[*readings.RUN, *CANDIDATES, *TARGETS]]
