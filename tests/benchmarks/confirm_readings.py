"""The committed checkpoints of scale confirm in every reading of R, with and without the head.

Asked on 2026-12-01, after the data: no verdict changes by it. One row a (checkpoint in full precision, format), on the
study's own windows of validation text. The weights are rounded to bfloat16, so that losses are near the tables', not
equal. Writes data/results/confirm_readings.csv and prints how the readings correlate with the damage over optimizers.

python tests/benchmarks/confirm_readings.py        about 5 minutes on one thread
"""

import numpy as np
import pandas as pd

from beyond_outliers import paths
from beyond_outliers.corpus.tokens import open_corpus
from beyond_outliers.quantizers import QuantSpec, quantize_model
from beyond_outliers.study import Study
from beyond_outliers.study.checkpoints import checkpoints, load_checkpoint
from beyond_outliers.study.measure import network_readings, validation_batches

SCALE, SPECS = "confirm", ("W4A4+head", "W4A4")
FILE = paths.RESULTS / "confirm_readings.csv"


def measured() -> pd.DataFrame:
    study, rows = Study(SCALE), []
    ptq = study.table("ptq").query("checkpoint == 'final'").set_index(["run", "spec"])
    for run, file in checkpoints(SCALE).items():
        config, model = load_checkpoint(file)
        if config.quantization:
            continue
        corpus = open_corpus(config.corpus)
        batches = validation_batches(corpus, config.context, study.protocol.measure.propagation_tokens)
        for spec in SPECS:
            row = {"run": run, "size": config.size, "optimizer": config.optimizer, "seed": config.seed, "spec": spec}
            given = QuantSpec.named(spec)
            readings = network_readings(model, quantize_model(model, given), given, batches)
            rows.append(row | {"damage": ptq.increase[run, spec]} | readings)
            print(run, spec, flush=True)
    return pd.DataFrame(rows)


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Pearson's r of log reading and log damage over optimizers, and the least and most r without one of them.

    An optimizer's logs are means over the sizes, each less its size's mean.
    """
    readings = [name for name in table.columns[5:] if not name.startswith(("loss", "top1", "norms"))]
    logs = np.log(table[readings])
    centred = logs - logs.groupby(table["size"]).transform("mean")
    points = centred.groupby(table.optimizer).mean()

    def r(points: pd.DataFrame) -> pd.Series:
        return points.drop(columns="damage").corrwith(points.damage)

    without = pd.DataFrame([r(points.drop(name)) for name in points.index])
    return pd.DataFrame({"r": r(points), "least": without.min(), "most": without.max()})


def main() -> None:
    table = measured()
    paths.write_whole(FILE, table.to_csv(index=False))
    for spec, rows in table.groupby("spec", sort=False):
        print(spec, correlations(rows).round(2), sep="\n")


if __name__ == "__main__":
    main()
