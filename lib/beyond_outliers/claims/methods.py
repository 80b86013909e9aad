"""What real quantizers leave of the damage: round-to-nearest, GPTQ, a rotation, and both, by number format.

Readings of the table `ptq` at the end of training, where every method is measured (at the Common Loss there is the
primary spec alone). The tied head is quantized or not as in the scale's primary spec: nothing but the method differs.
"""

import numpy as np
import pandas as pd

from beyond_outliers.claims import estimates, readings
from beyond_outliers.claims.estimates import (
    ALL_SIZES,
    DRAWS,
    LEAST_SEEDS,
    as_table,
    as_text,
    t_interval,
)

FORMATS = {"W4A4": "int4", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}  # first part of a spec's name: weights and activations
RTN = "RTN"
METHODS = {"": RTN, "+gptq": "GPTQ", "+rot": "rotation", "+rot+gptq": "rotation + GPTQ"}  # by the parts behind it
ORDER = tuple(METHODS.values())
SPECS = {name + parts: (form, method) for name, form in FORMATS.items() for parts, method in METHODS.items()}
WORDS = {1: "more", 0: "not told apart", -1: "less"}
LEAST_OPTIMIZERS = 3


def measured(study) -> pd.DataFrame:
    """A row per run, format and method: RUN, format, method, val_loss (quantized), increase (nats per token)."""
    rows = readings.measured(study, "ptq")
    head = "+head" * readings.primary(study).endswith("+head")
    parts = [rows[rows.spec == spec + head].assign(format=form, method=way) for spec, (form, way) in SPECS.items()]
    return pd.concat(parts, ignore_index=True)[[*readings.RUN, "format", "method", "val_loss", "increase"]]


def missing(study) -> str:
    """A list of what the tables lack: the methods by which a format was not measured, and at which sizes."""
    rows, parts = measured(study), []
    there = set(zip(rows.format, rows.method, rows["size"], strict=True))
    for form in FORMATS.values():
        lacking: dict[str, list[str]] = {}
        for size in study.protocol.sizes:
            if lacks := [method for method in ORDER if (form, method, size) not in there]:
                lacking.setdefault(", ".join(lacks) if lacks != [*ORDER] else "any method", []).append(size)
        parts += [f"- {form} by {names} at {', '.join(sizes)}" for names, sizes in lacking.items()]
    return "\n".join([f"Not measured at scale `{study.scale}`:", "", *parts]) if parts else ""


def by_method(rows: pd.DataFrame, value: str = "increase") -> pd.DataFrame:
    """Mean of `value` over seeds with its interval, as text ("0.123 [0.110, 0.136]"), methods as columns in order."""
    table, keys = estimates.means(rows, value, ("format", "method")), ["format", "size", "optimizer"]
    wide = table.assign(text=as_text(table)).pivot_table("text", keys, "method", "first", sort=False)
    runs = table.groupby(keys, sort=False).n.max().rename("runs")
    return wide[[method for method in ORDER if method in wide]].join(runs).fillna("")


def left(rows: pd.DataFrame) -> pd.DataFrame:
    """The part of the round-to-nearest damage that a method leaves, a row a format, method, size and optimizer.

    left: geometric mean over runs of increase / increase under RTN of the same run; low, high: t interval over runs (of
    three or more), n. Runs in which one of the two is not positive are left out.
    """
    base = rows[rows.method == RTN].set_index(["format", "run"]).increase.rename("rtn")
    both = rows[rows.method != RTN].join(base, on=["format", "run"]).query("increase > 0 and rtn > 0")
    found = estimates.means(both.assign(log=np.log(both.increase / both.rtn)), "log", ("format", "method"))
    found[["mean", "low", "high"]] = np.exp(found[["mean", "low", "high"]])
    return found.rename(columns={"mean": "left"})


def left_over_optimizers(table: pd.DataFrame) -> pd.DataFrame:
    """`left` as one number a format, method and size: geometric mean over optimizers, t interval over them."""
    keys = ["format", "method", "size"]
    found = {key: t_interval(np.log(own)).map(np.exp) for key, own in table.groupby(keys, sort=False).left}
    return as_table(found, keys, "left").rename(columns={"n": "optimizers"})


def agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Does a method order the optimizers as RTN does? Kendall's tau of their mean damages, a row per format, method
    and size: kendall, kendall_low, kendall_high, optimizers, and n (fewest runs).

    Interval: percentile bootstrap (95 %) over seeds within an optimizer; a run brings both damages, so that what it
    shares stays shared. NaN where an optimizer has fewer than three runs. It says how well these optimizers' means are
    known, not what others would do. Resampled means are noisier than the means, so an interval is drawn towards 0.
    """
    found = []
    for (form, size), own in rows.groupby(["format", "size"], sort=False):
        wide = own.pivot_table(index=["optimizer", "run"], columns="method", values="increase", sort=False)
        for method in [m for m in ORDER[1:] if m in wide and RTN in wide]:
            pairs = wide[[RTN, method]].dropna()
            values = [part.to_numpy() for _, part in pairs.groupby("optimizer", sort=False)]  # (n, 2) each
            if len(values) < LEAST_OPTIMIZERS:
                continue
            rng, n = np.random.default_rng(0), min(map(len, values))
            means = [part[rng.integers(len(part), size=(DRAWS, len(part)))].mean(1) for part in values]
            point, sampled = np.stack([part.mean(0) for part in values], -1), np.stack(means, -1)
            drawn = kendall(sampled[:, 0], sampled[:, 1]) if n >= LEAST_SEEDS else np.nan
            numbers = float(kendall(*point)), *np.quantile(drawn, [0.025, 0.975])
            found.append((form, method, size, *numbers, len(values), n))
    tau = ["kendall", "kendall_low", "kendall_high"]
    return pd.DataFrame(found, columns=["format", "method", "size", *tau, "optimizers", "n"])


def kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kendall's tau-a over the last axis: pairs in the same order less pairs in the other, over all pairs."""
    first, second = np.triu_indices(x.shape[-1], 1)
    return np.prod([np.sign(v[..., first] - v[..., second]) for v in (x, y)], axis=0).mean(-1)


def order_in_words(study) -> str:
    """What the tables say of int4, in Markdown: Muon's damage over AdamW's, does the order survive, what lacks."""
    rows = measured(study).query("format == 'int4'")
    table, lines = estimates.ratios(rows, "increase", ("method",)), []
    for size, own in table[table.optimizer == "muon"].groupby("size", sort=False):
        by = own.set_index("method").reindex([method for method in ORDER if method in set(own.method)])
        if RTN not in by.index or len(by) < 2:
            continue
        ends = by.loc[[RTN, last := by.index[-1]]]
        (nearest, best), at = as_text(ends, "ratio", 2), "over the sizes" if size == ALL_SIZES else size
        change = "too few seeds for an interval"
        if np.isfinite(ends.low).all():
            first, then = (WORDS[place] for place in (ends.low > 1).astype(int) - (ends.high < 1))
            change = f"{first} under both" if first == then else f"{first} under {RTN}, {then} under {last}"
        lines.append(
            f"- {at}, n {by.n.min()}: Muon's damage is {nearest} times AdamW's under {RTN}. "
            f"Under {last} it is {best} times AdamW's: {change}."
        )
    orders = agreement(rows).drop_duplicates("size", keep="last")  # of the last method at each size
    for row, tau in zip(orders.itertuples(), as_text(orders, "kendall", 2, "kendall_"), strict=True):
        alike = f"{(1 + row.kendall) / 2:.0%} of the pairs alike (Kendall's tau {tau})"
        lines.append(f"- {row.size}: {row.method} and {RTN} order {alike}.")
    change = "change" if (orders.kendall < 1).any() else "keep"
    head = f"Other methods {change} the order of the optimizers under round to nearest (RTN), in int4."
    return "\n".join([*([head, "", *lines, ""] if lines else []), missing(study)]).strip()
