"""What every benchmark shares: candidates timed in turns, ratios with quartiles, targets, the table of docs/speed.md.

A benchmark's rows have the columns of `COLUMNS`. `value` is a ratio of paired times (unit "x"), or plain seconds; its
target, what it was before, and the reason of a miss are in data/benchmarks.toml, by benchmark, size and what.
"""

import ctypes
import re
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch

from beyond_outliers import paths
from beyond_outliers.train.machine import processor

FILE, TARGETS = paths.RESULTS / "benchmarks.csv", paths.DATA / "benchmarks.toml"
KEYS = ["benchmark", "size", "what"]
COLUMNS = [
    *["benchmark", "size", "what", "beside", "threads", "unit", "value", "low", "high", "target", "before"],
    *["seconds", "beside_seconds", "rounds", "processor"],
]
BEGIN, END = "<!-- made of data/results/benchmarks.csv by `make bench` -->", "<!-- end of the benchmarks -->"


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def paired(
    calls: dict[str, Callable], rounds: int, warm_up: int = 1, clock: Callable[[], float] = time.perf_counter
) -> pd.DataFrame:
    """Seconds of every call, a row a round: in one process, in turns, so that load from outside meets all alike."""
    rows = []
    for number in range(warm_up + rounds):
        row = {}
        for name, call in calls.items():
            start = clock()
            call()
            row[name] = clock() - start
        if number >= warm_up:
            rows.append(row)
    return pd.DataFrame(rows)


def compared(
    times: pd.DataFrame, what: str, beside: str, benchmark: str, size: str, threads: int, speedup: bool = False
) -> dict:
    """One row: how often `beside`'s time the candidate `what` takes, round by round; `speedup`: the inverse."""
    ratios = times[beside] / times[what] if speedup else times[what] / times[beside]
    low, value, high = ratios.quantile([0.25, 0.5, 0.75])
    row = {"benchmark": benchmark, "size": size, "what": what, "beside": beside, "threads": threads, "unit": "x"}
    row |= {"value": value, "low": low, "high": high, "rounds": len(times)}
    return row | {"seconds": times[what].median(), "beside_seconds": times[beside].median()}


def resident(what: str) -> int:
    """Bytes of resident memory now (VmRSS) or at most since the last reset (VmHWM)."""
    found = re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"{what} in /proc/self/status"
    return 1024 * int(found[1])


def measured(call: Callable, repeats: int = 2) -> tuple[float, int]:
    """Least CPU seconds of some calls, and bytes of the peak of the first above what was held before."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, times = resident("VmRSS"), []
    for number in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
        if number == 0:
            peak = resident("VmHWM") - before
    return min(times), peak


# ------------------------------------------------------------------------------------------------ targets and the table


def targets() -> dict[tuple, dict]:
    """(benchmark, size, what, beside) -> at_least or at_most, perhaps before and reason."""
    entries = tomllib.loads(TARGETS.read_text())["target"]
    return {(e["benchmark"], e["size"], e["what"], e.get("beside", "")): e for e in entries}


def with_targets(rows: pd.DataFrame) -> pd.DataFrame:
    wanted, rows = targets(), rows.reindex(columns=COLUMNS)
    found = [wanted.get((r.benchmark, r.size, r.what, r.beside), {}) for r in rows.fillna({"beside": ""}).itertuples()]
    rows["target"] = [
        f"at least {e['at_least']}" if "at_least" in e else f"at most {e['at_most']}" if "at_most" in e else None
        for e in found
    ]
    rows["before"] = [e.get("before") for e in found]
    return rows


def met(row) -> bool | None:
    """Whether a row of the table reaches its target; None without one."""
    if not isinstance(row.target, str):
        return None
    side, _, bound = row.target.rpartition(" ")
    return row.value >= float(bound) if side == "at least" else row.value <= float(bound)


def write(rows: pd.DataFrame) -> None:
    """Replaces this processor's rows of the same benchmarks in benchmarks.csv, and the table of docs/speed.md."""
    rows = rows.assign(processor=processor())
    if FILE.exists():
        old = read()
        again = old.benchmark.isin(set(rows.benchmark)) & (old.processor == processor())
        rows = pd.concat([old[~again], rows], ignore_index=True)
    rows = with_targets(rows).sort_values(["benchmark", "processor"], kind="stable")
    paths.write_whole(FILE, rows.to_csv(index=False, float_format="%.4g"))
    page = paths.ROOT / "docs" / "speed.md"
    text = page.read_text()
    begin, end = text.index(BEGIN), text.index(END)
    paths.write_whole(page, text[:begin] + rendered(read()) + text[end + len(END) :])


def read() -> pd.DataFrame:
    return pd.read_csv(FILE, dtype={"size": str})


def told(row) -> str:
    """ "1.29 (1.21 to 1.33), missed"."""
    quartiles = "" if pd.isna(row.low) else f" ({row.low:.2f} to {row.high:.2f})"
    value = f"{row.value:.3g}" if row.value < 1000 else f"{row.value:.0f}"
    return f"{value}{quartiles}, {'met' if met(row) else 'missed'}"


def rendered(table: pd.DataFrame) -> str:
    """The table of docs/speed.md: a row per target, a column per processor; then the reasons of misses."""
    wanted, lines, reasons = targets(), [], []
    named = dict(zip(sorted(set(table.processor)), "ABCDEFGH", strict=False))
    lines.append(f"| what | size | measured in | target | before | {' | '.join(named.values())} |")
    lines.append(f"| --- | --- | --- | --- | ---: |{' --- |' * len(named)}")
    rows = table.dropna(subset="target").fillna({"beside": ""})
    for (benchmark, size, what, beside), own in rows.groupby([*KEYS, "beside"], sort=False):
        first, of = next(own.itertuples()), {row.processor: row for row in own.itertuples()}
        unit = {"s": "seconds", "MB": "MB"}.get(first.unit, f"x {beside}")
        before = "" if pd.isna(first.before) else f"{first.before:g}"
        cells = " | ".join(told(of[one]) if one in of else "" for one in named)
        lines.append(f"| {benchmark}: {what} | {size} | {unit} | {first.target} | {before} | {cells} |")
        if not all(map(met, of.values())):
            said = wanted[benchmark, size, what, beside].get("reason", "no reason is known yet.")
            if said not in reasons:
                reasons.append(said)
    lines += ["", *(f"- {letter}: `{one}`" for one, letter in named.items())]
    if reasons:
        lines += ["", "Why targets are missed:", "", *(f"- {reason}" for reason in reasons)]
    return "\n".join([BEGIN, "", *lines, "", END])
