"""Two rates beyond both ends of every line that scale confirm searched at 0.08M, on its tuning seed.

AdamW's search ended in a local optimum (confirm_adamw_rates.csv); this asks whether the others' did, by the same means:
at the chosen auxiliary rate, a factor of two apart, and further down while the study's rule names the lowest. Asked on
2026-11-29, after the data: no rate or verdict changes by it. Writes data/results/confirm_wider_rates.csv.

python tests/benchmarks/wider_rates.py        about 10 minutes on two cores; takes up what is done
"""

import multiprocessing

import pandas as pd
import torch

from beyond_outliers import paths
from beyond_outliers.claims import readings
from beyond_outliers.config import RunConfig
from beyond_outliers.study import Study
from beyond_outliers.train import train

SIZE, BEYOND = "0.08M", 2
FILE = paths.RESULTS / "confirm_wider_rates.csv"


def tuned(study: Study, name: str, lr: float, auxiliary: float) -> RunConfig:
    return study.protocol.config(SIZE, name, lr, study.protocol.tuning.seeds[0], auxiliary=auxiliary)


def configs() -> list[RunConfig]:
    """Of every optimizer but AdamW, whose lower end has been looked at; of AdamW the upper one alone."""
    study, found = Study("confirm"), []
    rule = study.protocol.tuning
    chosen = study.table("learning_rates").query("size == @SIZE")
    for row in chosen.itertuples():
        grid = sorted(map(float, row.grid.split()))
        below = [] if row.optimizer == "adamw" else [grid[0] / rule.factor**i for i in range(BEYOND, 0, -1)]
        above = [grid[-1] * rule.factor**i for i in range(1, BEYOND + 1)]
        found += [tuned(study, row.optimizer, lr, row.auxiliary) for lr in below + above]
    return found


def one(config: RunConfig) -> dict[str, object]:
    torch.set_num_threads(1)
    return {"run": config.name, "purpose": "sweep", **train(config, threads=1, progress=False).row}


def further_down() -> list[RunConfig]:
    """The next lower rate of every optimizer of whose rates, those of the table included, the lowest is named."""
    study = Study("confirm")
    lowest = readings.tried_since(study).groupby("optimizer").lr.min()
    return [
        tuned(study, name, lr / study.protocol.tuning.factor, study.rates[SIZE, name].auxiliary)
        for name, lr in readings.named_rates(study).items()
        if lr == lowest[name]
    ]


def main() -> None:
    rows, asked = [], configs()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        while asked:
            for row in pool.imap(one, asked, chunksize=1):
                rows.append(row)
                print(row["run"], row["status"], row["val_loss"], flush=True)
            paths.write_whole(FILE, pd.DataFrame(rows).to_csv(index=False))
            asked = further_down()


if __name__ == "__main__":
    main()
