"""What a scale still has to run, and about how long it takes: `make plan`."""

import pandas as pd

from beyond_outliers.study.study import Study
from beyond_outliers.study.workflow import processors
from beyond_outliers.train.forecast import step_seconds


def plan_table(study: Study) -> pd.DataFrame:
    """One row a (purpose, size): runs, done, tokens per run, tokens_per_second, hours left of one run after the other.

    Throughput is the median of the runs of that size and scheme that have ended, else of a few steps timed here; NaN
    for models that are too large for that.
    """
    ended = study.table("runs").to_dict("records") if study.has("runs") else []
    ended += [result.row for planned in study.planned() if (result := study.result(planned))]
    known = pd.DataFrame(ended, columns=["run", "size", "scheme", "tokens_per_second"])
    speeds = known.groupby(["size", "scheme"]).tokens_per_second.median().dropna().to_dict()
    rows, counted = [], (done := set(known.run)).copy()  # a sweep run that is a main run, too, costs its time once
    for planned in study.all_runs():
        config = planned.config
        kind = (config.size, (config.quantization or {}).get("scheme", "none"))
        if kind not in speeds:
            seconds = step_seconds(config, "cpu", threads=study.protocol.threads) or float("nan")
            speeds[kind] = config.tokens_per_step / seconds
        tokens = (config.steps - planned.start) * config.tokens_per_step
        hours = 0.0 if config.name in counted else tokens / speeds[kind] / 3600
        counted.add(config.name)
        rows.append((planned.purpose, config.size, 1, config.name in done, tokens, speeds[kind], hours))
    table = pd.DataFrame(rows, columns=["purpose", "size", "runs", "done", "tokens", "tokens_per_second", "hours"])
    summary = {"runs": "sum", "done": "sum", "tokens": "first", "tokens_per_second": "median", "hours": "sum"}
    return table.groupby(["purpose", "size"], sort=False).agg(summary).reset_index()


def print_plan(study: Study, cores: int | None = None) -> None:
    cores = cores or processors()
    table = plan_table(study)
    formats = {"tokens": "{:,}", "tokens_per_second": "{:,.0f}", "hours": "{:.2f}"}
    print(table.to_string(index=False, formatters={name: text.format for name, text in formats.items()}))
    side_by_side = max(1, cores // study.protocol.threads)
    names = {planned.config.name for planned in study.all_runs()}  # a sweep run that serves as a main run is one run
    ended = sum(study.loss(name) is not None for name in names)
    print(
        f"{ended} of {len(names)} runs done; about {table.hours.sum() / side_by_side:.1f} hours of training "
        f"left on {cores} cores, {side_by_side} runs side by side; measurements and notebooks not counted"
    )
    if study.protocol.tuned:
        print("Of the search for learning rates, only the runs that it has asked for so far are counted.")
