"""Optimizers at the rates that their searches did not find, on the main seeds: what local optima cost the contrasts.

Of all rates tried since on the tuning seed (confirm_adamw_rates.csv, confirm_wider_rates.csv) the study's rule names
other ones than its searches chose at 0.08M for AdamW and PSGD. This trains those on the ten main seeds, in full
precision and under QAT, measures each as the study does, and writes data/results/confirm_low_rates.csv. Asked on
2026-11-29, after the data: no rate or verdict changes by it.

python tests/benchmarks/low_rates.py        about 10 minutes an optimizer on two cores; rows that are there are kept
"""

import multiprocessing

import pandas as pd
import torch

from beyond_outliers import paths
from beyond_outliers.claims import readings
from beyond_outliers.config import RunConfig
from beyond_outliers.config.scale import qat
from beyond_outliers.metrics import without_down
from beyond_outliers.propagation import summarise
from beyond_outliers.study import Study
from beyond_outliers.study.measure import measure_run
from beyond_outliers.train import RunResult, train

SIZE, FILE = "0.08M", readings.FOUND


def configs() -> list[RunConfig]:
    """Of every main seed in full precision, then under QAT; all but the rate as in the study."""
    study, found = Study("confirm"), []
    seeds = study.protocol.settings.runs("full_precision").seeds_at(SIZE)
    for name, lr in readings.named_rates(study).items():
        chosen = study.rates[SIZE, name]
        if lr != chosen.lr:
            options = {"lr": lr, "auxiliary": chosen.auxiliary}
            full = [study.protocol.config(SIZE, name, seed=seed, **options) for seed in seeds]
            found += full + [config.replace(quantization=qat("quest", True)) for config in full]
    return found


def measured(result: RunResult, step: int) -> dict[str, float]:
    """The loss that W4A4+head adds, R_L under it, and MMR, at a checkpoint."""
    study = Study("confirm")
    folder = measure_run(result, step, "light", study.protocol.measure)
    ptq, outliers, errors = (pd.read_csv(folder / f"{name}.csv") for name in ("ptq", "outliers", "propagation"))
    spec = study.protocol.measure.primary
    inputs = without_down(outliers)
    return {
        "increase": ptq[ptq.spec == spec].increase.item(),
        "R_L": summarise(errors[errors.attention == "unit"])["R_L"],
        "mmr": inputs.mmr.mean(),
    }


def one(config: RunConfig) -> dict[str, object]:
    torch.set_num_threads(1)
    result = train(config, threads=1, progress=False)
    row = {"run": config.name, **result.row}
    if config.quantization is None:
        losses = result.evaluations
        common = Study("confirm").table("common_loss").query("size == @SIZE").common_loss.iloc[0]
        reached = losses[losses.val_loss <= common].step
        row |= {f"{name}_end": value for name, value in measured(result, result.row["steps"]).items()}
        row["step_common"] = int(reached.iloc[0]) if len(reached) else None
        if len(reached):
            row |= {f"{name}_common": value for name, value in measured(result, int(reached.iloc[0])).items()}
    return row


def main() -> None:
    kept = pd.read_csv(FILE, dtype={"size": str}) if FILE.exists() else pd.DataFrame({"run": []})
    asked, rows = [config for config in configs() if config.name not in set(kept.run)], []
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for row in pool.imap(one, asked, chunksize=1):
            rows.append(row)
            print(row["run"], round(row["val_loss"], 4), flush=True)
    paths.write_whole(FILE, pd.concat([kept, pd.DataFrame(rows)]).to_csv(index=False))


if __name__ == "__main__":
    main()
