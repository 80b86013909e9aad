"""What real quantizers leave of the damage: round-to-nearest, GPTQ, a rotation, and both, by number format.

Readings of the table `ptq` at the end of training, where every method is measured (at the Common Loss there is the
primary spec alone). The tied head is quantized or not as in the scale's primary spec: nothing but the method differs.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from beyond_outliers.claims import estimates, readings
from beyond_outliers.claims.estimates import ALL_SIZES, LEAST_SEEDS, Estimate, label, t_interval

FORMATS = {"W4A4": "int4", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}  # first part of a spec's name: weights and activations
RTN = "RTN"
METHODS = {"": RTN, "gptq": "GPTQ", "rot": "rotation", "rot+gptq": "rotation + GPTQ"}  # by the parts between
ORDER = tuple(METHODS.values())
WORDS = {1: "more", 0: "not told apart", -1: "less"}
DRAWS, LEAST_OPTIMIZERS = 2000, 3


def format_and_method(spec: str, head: bool) -> tuple[str, str] | None:
    """("int4", "rotation + GPTQ") of "W4A4+rot+gptq+head"; None for another width, and where the head differs."""
    first, *parts = str(spec).split("+")
    method = METHODS.get("+".join(part for part in parts if part != "head"))
    if first not in FORMATS or method is None or ("head" in parts) != head:
        return None
    return FORMATS[first], method


def measured(study) -> pd.DataFrame:
    """A row per run, format and method: RUN, format, method, val_loss (quantized), increase (nats per token)."""
    rows = readings.measured(study, "ptq")
    head = "head" in readings.primary(study).split("+")
    named = {spec: found for spec in rows.spec.unique() if (found := format_and_method(spec, head))}
    rows = rows[rows.spec.isin(list(named))]
    rows = rows.assign(format=[named[s][0] for s in rows.spec], method=[named[s][1] for s in rows.spec])
    place = rows.method.map(ORDER.index) + len(ORDER) * rows.format.map(list(FORMATS.values()).index)
    rows = rows.assign(place=place).sort_values("place", kind="stable")  # sizes and optimizers keep the study's order
    return rows[[*readings.RUN, "format", "method", "val_loss", "increase"]].reset_index(drop=True)


def missing(study) -> str:
    """A list of what the tables lack: sizes without a run, methods of a format at a size; "" if nothing."""
    rows = measured(study)
    sizes = [size for size in study.protocol.sizes if size in set(rows["size"])]
    parts = []
    if without := [size for size in study.protocol.sizes if size not in sizes]:
        parts.append(f"any run of {', '.join(without)}")
    for format in FORMATS.values():
        lacking: dict[str, list[str]] = {}
        for size in sizes:
            there = set(rows.method[(rows["size"] == size) & (rows.format == format)])
            lacks = [method for method in ORDER if method not in there]
            if lacks:
                lacking.setdefault(", ".join(lacks) if there else "any method", []).append(size)
        for names, at in lacking.items():
            what = f"{format} by {names}" if names != "any method" else format
            parts.append(what if at == sizes else f"{what} at {', '.join(at)}")
    return "\n".join([f"Not measured at scale `{study.scale}`:", "", *(f"- {part}" for part in parts)]) if parts else ""


def by_method(rows: pd.DataFrame, value: str = "increase") -> pd.DataFrame:
    """Mean of `value` over seeds with its interval, as text ("0.123 [0.110, 0.136]"), methods as columns in order."""
    table = estimates.means(rows, value, ("format", "method"))
    text = [Estimate(*values).text() for values in table[["mean", "low", "high"]].to_numpy()]
    keys = ["format", "size", "optimizer"]
    table = table.assign(text=text, key=list(zip(*(table[key] for key in keys), strict=True)))
    wide = table.pivot_table(index=keys, columns="method", values="text", aggfunc="first", sort=False)
    runs = table.groupby(keys, sort=False).n.max().rename("runs")
    return wide[[method for method in ORDER if method in wide]].join(runs).fillna("")


def left(rows: pd.DataFrame) -> pd.DataFrame:
    """The part of the round-to-nearest damage that a method leaves, a row a format, method, size and optimizer.

    left: geometric mean over runs of increase / increase under RTN of the same run; low, high: t interval over runs (of
    three or more), n. Runs in which one of the two is not positive are left out.
    """
    keys = ["format", "run"]
    base = rows[rows.method == RTN].set_index(keys).increase
    others = rows[rows.method != RTN]
    both = others.assign(rtn=others.set_index(keys).index.map(base))
    both = both[(both.increase > 0) & (both.rtn > 0)]
    found = estimates.means(both.assign(log=np.log(both.increase / both.rtn)), "log", ("format", "method"))
    found[["mean", "low", "high"]] = np.exp(found[["mean", "low", "high"]])
    return found.rename(columns={"mean": "left"})


def left_over_optimizers(table: pd.DataFrame) -> pd.DataFrame:
    """`left` as one number a format, method and size: geometric mean over optimizers, t interval over them."""
    found = []
    for key, own in table.groupby(["format", "method", "size"], sort=False).left:
        found.append((*key, *t_interval(np.log(own.to_numpy())).map(np.exp).interval, len(own)))
    return pd.DataFrame(found, columns=["format", "method", "size", "left", "low", "high", "optimizers"])


def agreement(rows: pd.DataFrame, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Does a method order the optimizers as RTN does? Rank correlations of their mean damages, a row a format, method
    and size: kendall and spearman, each with _low and _high, optimizers, and n (fewest runs).

    Interval: percentile bootstrap (95 %) over seeds within an optimizer; a run brings both damages, so that what it
    shares stays shared. NaN where an optimizer has fewer than three runs. It says how well these optimizers' means are
    known, not what others would do. Resampled means are noisier than the means, so an interval is drawn towards 0.
    """
    found = []
    for (format, size), own in rows.groupby(["format", "size"], sort=False):
        wide = own.pivot_table(index=["optimizer", "run"], columns="method", values="increase", sort=False)
        for method in [m for m in ORDER[1:] if m in wide and RTN in wide]:
            pairs = wide[[RTN, method]].dropna()
            if (optimizers := pairs.groupby("optimizer", sort=False).size()).size < LEAST_OPTIMIZERS:
                continue
            values = [part.to_numpy() for _, part in pairs.groupby("optimizer", sort=False)]  # (n, 2) each
            point = np.stack([part.mean(0) for part in values])
            sampled = _resampled(values, draws, np.random.default_rng(seed))
            ends = []
            for correlate in (kendall, spearman):
                at = float(correlate(point[:, 0], point[:, 1]))
                enough = optimizers.min() >= LEAST_SEEDS
                low, high = np.quantile(correlate(*sampled), [0.025, 0.975]) if enough else (np.nan, np.nan)
                ends += [at, low, high]
            found.append((format, method, size, *ends, len(optimizers), optimizers.min()))
    correlations = [name + end for name in ("kendall", "spearman") for end in ("", "_low", "_high")]
    return pd.DataFrame(found, columns=["format", "method", "size", *correlations, "optimizers", "n"])


def _resampled(values: Iterable[np.ndarray], draws: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Means of both columns (draws, O) over runs drawn with replacement within every optimizer."""
    means = [part[rng.integers(len(part), size=(draws, len(part)))].mean(1) for part in values]
    both = np.stack(means, 1)
    return both[..., 0], both[..., 1]


def kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kendall's tau-a over the last axis: pairs in the same order less pairs in the other, over all pairs."""
    first, second = np.triu_indices(x.shape[-1], 1)
    signs = np.sign(x[..., first] - x[..., second]) * np.sign(y[..., first] - y[..., second])
    return signs.mean(-1)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation over the last axis; NaN where all values of one are equal."""
    x, y = (rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2 for values in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def finding(study, optimizer: str = "muon", reference: str = "adamw") -> str:
    """What the tables say of int4, in Markdown: one optimizer beside another, does the order survive, what lacks."""
    rows = measured(study)
    rows = rows[rows.format == "int4"]
    table = estimates.ratios(rows, "increase", ("method",), reference)
    who, whose = (f"{label(name)}'s" for name in (optimizer, reference))
    lines = []
    for size, own in table[table.optimizer == optimizer].groupby("size", sort=False):
        by = own.set_index("method")
        if RTN not in by.index or len(by) < 2:
            continue
        last = [method for method in ORDER if method in by.index][-1]
        nearest, best = (Estimate(*by.loc[method, ["ratio", "low", "high"]]).text(2) for method in (RTN, last))
        at = "over the sizes" if size == ALL_SIZES else size
        lines.append(
            f"- {at}, n {int(by.n.min())}: {who} damage is {nearest} times {whose} under {RTN}. Under {last} it is "
            f"{best} times {whose}: {_change(by, last)}."
        )
    lines += _survival(agreement(rows))
    listed = ["What other methods leave of the order under round to nearest (RTN), in int4:", "", *lines, ""]
    return "\n".join([*(listed if lines else []), missing(study)]).strip()


def _survival(table: pd.DataFrame) -> list[str]:
    """Sentences on the order of the optimizers, one a size, of the last method of each."""
    lines = []
    for row in table.drop_duplicates("size", keep="last").to_dict("records"):
        tau = Estimate(row["kendall"], row["kendall_low"], row["kendall_high"]).text(2)
        lines.append(
            f"- {row['size']}: {row['method']} and {RTN} order {(1 + row['kendall']) / 2:.0%} of the pairs alike "
            f"(Kendall's tau {tau})."
        )
    return lines


def _change(by: pd.DataFrame, last: str) -> str:
    """What becomes of a ratio from RTN to the method `last`, in words."""
    ends = by.loc[[RTN, last], ["low", "high"]].to_numpy()
    if not np.isfinite(ends).all():
        return "too few seeds for an interval"
    first, then = (WORDS[int(low > 1) - int(high < 1)] for low, high in ends)
    return f"{first} under both" if first == then else f"{first} under RTN, {then} under {last}"
