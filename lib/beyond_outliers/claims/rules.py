"""The rule of every claim of the paper, one function each, C1 to C14: pure functions of tables, one row a run.

data/claims.toml has their numbers (margins, thresholds), units, reasons and dates; `claims.verdicts` reads the tables
off a study. Every scale is judged by these. A rule sees `Evidence`, and returns a finding for every part of its claim
with, first, one for the whole. Of the tables it takes size, optimizer and seed, and

    runs      loss, qat_loss (NaN where there is none yet)                                      C1, C12, C13
    sweep     lr, auxiliary, loss, mmr, increase, gain: the tuning runs, at their end           C2, and what tuning adds
    final     mmr: at the end of training                                                       C3
    common    condition, increase, gain, mmr, kurtosis, R_L_token, R_L_centred_token            C4 to C7, C11
    recipes   the same columns, `optimizer` naming one of twelve recipes                        C7
    modules   R_in, A, B, C of the modules that add an error, at the Common Loss                C8
    norms     falls: share of sublayer RMSNorms at which R per token falls, there               C9
    linear    spectral_ratio of the linear layers of the blocks, attention opened up, there     C10
    scaling   N, bits, loss                                                                     C14

`condition` is "with head", "without head" (is the output head quantized?) or "equal schedule" (the damage between fully
decayed models, read at equal loss).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from beyond_outliers.claims.estimates import (
    LEAST_SEEDS,
    PAPER_OPTIMIZERS,
    STRICT,
    USUAL,
    Cells,
    Contrasts,
    Drawn,
    Estimate,
    cells,
    common_slope,
    contrast,
    difference,
    heterogeneity,
    label,
    leave_one_out,
    listed,
    pearson,
    points,
    slope_weights,
    t_interval,
)
from beyond_outliers.config.parsing import choose
from beyond_outliers.scaling import log_rho_draws

VERDICTS = REPRODUCED, NOT_REPRODUCED, TIE, UNDECIDED, NOT_MEASURED = (
    "reproduced", "not reproduced", "tie", "undecided", "not measured"
)  # fmt: skip
PAPER_THREE = ("adamw", "muon", "shampoo")  # those that the paper trains at every size
SETS = {"six": PAPER_OPTIMIZERS, "three": PAPER_THREE}
WHOLE = "whole"
LEAST_POINTS, LEAST_SIZES = 6, 3  # optimizers of a correlation; sizes of a scaling law
ALIKE = 0.05  # p of heterogeneity over sizes above which one number stands for all of them


class Open(Exception):
    """Why there is no verdict: UNDECIDED or NOT_MEASURED, and the reason."""

    def __init__(self, verdict: str, reason: str):
        super().__init__(reason)
        self.verdict = verdict


@dataclass(frozen=True)
class Finding:
    """What a rule says of a claim or a part of it.

    runs: the fewest of an optimizer at each size, "12/8/4". trend: slope of the estimate per doubling of the size;
    heterogeneity: p that all sizes have one estimate.
    """

    verdict: str
    comment: str
    part: str = WHOLE
    estimate: Estimate = field(default_factory=Estimate)
    runs: str = ""
    rival: str = ""
    trend: Estimate = field(default_factory=Estimate)
    heterogeneity: float = np.nan


@dataclass(frozen=True)
class Evidence:
    """Tables by name, the optimizers that are compared, the planned sizes with their parameters, and a condition."""

    tables: Mapping[str, pd.DataFrame]
    optimizers: tuple[str, ...]
    sizes: Mapping[str, int]
    condition: str = ""
    tolerance: float = 0.0  # nats; rates within it of the best were as good as chosen. 0: tuning is not counted

    def rows(self, name: str, *columns: str) -> pd.DataFrame:
        """Rows of a table at the planned sizes and under the condition that have all `columns`; Open without any."""
        table = self.tables.get(name, pd.DataFrame())
        if "condition" in table:
            table = table[table.condition == self.condition]
        if not set(columns) <= set(table.columns):
            raise Open(NOT_MEASURED, f"Not measured: {', '.join(columns)} ({name}{', ' * bool(self.condition)}"
                       f"{self.condition}).")  # fmt: skip
        kept = table[table["size"].isin(list(self.sizes))].dropna(subset=list(columns))
        lacking = [label(one) for one in self.optimizers if one not in set(kept.optimizer)]
        if lacking := lacking if name != "recipes" else ["any recipe"] * kept.empty:
            raise Open(NOT_MEASURED, f"Not measured of {listed(lacking)}: {', '.join(columns)} ({name}).")
        return kept

    def cells(self, rows: pd.DataFrame, value: str, log: bool = False, tuning: str = "") -> Cells:
        """`value` (log: its logarithm) by optimizer and size, over the sizes that have enough runs of all of them.

        tuning: the column of `sweep` whose spread over rates as good as the chosen ones is added. Open where no size
        has enough runs, or a value has no logarithm.
        """
        if log and (bad := int((rows[value] <= 0).sum())):
            raise Open(UNDECIDED, f"Undecided: {bad} values of {value} are not positive and have no logarithm.")
        judged = rows.assign(judged=np.log(rows[value]) if log else rows[value])
        every = cells(judged, "judged", self.optimizers, list(self.sizes))
        sizes = [size for size, n in zip(every.sizes, every.n.min(0), strict=True) if n >= LEAST_SEEDS]
        if not sizes:
            raise Open(UNDECIDED, f"Undecided: fewer than {LEAST_SEEDS} runs of some optimizer at every size.")
        tuned = tuning_variance(self, tuning, log, every) if tuning and self.tolerance else np.zeros(every.n.shape)
        return replace(every, tuning=tuned).at(*sizes)


def tuning_variance(data: Evidence, column: str, log: bool, main: Cells) -> np.ndarray:
    """(O, S): what the choice of learning rates adds to the variance of a mean over main runs, `main`.

    The variance of `column` over the tuned rates (matrix and auxiliary) that the tuning cannot tell from the best:
    whose loss lies within the tolerance and one standard error of the difference above the best. A rate's seeds are
    averaged. What seeds alone make of that variance is taken out, but for the loss itself, which the window bounds
    already. With a single such rate: the mean of the other optimizers at that size; without any, 0.
    """
    sweep = data.tables.get("sweep", pd.DataFrame())
    if not {column, "loss"} <= set(sweep):
        return np.zeros(main.n.shape)
    losses = cells(data.rows("runs", "loss"), "loss", main.optimizers, main.sizes)
    names, keys = list(main.optimizers), ["optimizer", "size"]
    rates = sweep.assign(value=np.log(sweep[column]) if log else sweep[column])
    rates = rates[rates.optimizer.isin(names)].groupby([*keys, "lr", "auxiliary"], dropna=False, as_index=False)
    rates = rates.agg(loss=("loss", "mean"), value=("value", "mean"), each=("loss", lambda of: 1 / len(of)))
    best = rates.loc[rates.groupby(keys).loss.transform("idxmin"), ["loss", "each"]].reset_index(drop=True)
    error = np.sqrt(rates.optimizer.map(_pooled(losses)) * (rates.each + best.each))
    good = rates[rates.loss <= best.loss + data.tolerance + error].groupby(keys)
    found = good.value.var()
    if column != "loss":
        noise = good.each.mean() * found.index.get_level_values("optimizer").map(_pooled(main))
        found = (found - noise).clip(lower=0)
    table = found.unstack().reindex(index=names, columns=list(main.sizes))
    return table.fillna(table.mean()).fillna(0.0).to_numpy()


def _pooled(found: Cells) -> dict[str, float]:
    """Variance over seeds of every optimizer, pooled over sizes; 0 where there are too few."""
    freedom = np.clip(found.n - 1, 0, None)
    pooled = np.nansum(found.variance * freedom, -1) / np.clip(freedom.sum(-1), 1, None)
    return dict(zip(found.optimizers, pooled, strict=True))


# --------------------------------------------------------------------------------------------------- what decides


def decide(holds, fails, tie=False) -> np.ndarray:
    """The verdict of the first condition that is true, else undecided."""
    return np.select([holds, fails, tie], [REPRODUCED, NOT_REPRODUCED, TIE], UNDECIDED)


def judge_extreme(against: Contrasts, side: str, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Is every first member of the pairs the lower ("lowest") or higher ("highest") one? Verdicts (...) and the places
    (...) of the nearest pair, the one that speaks most against it.

    reproduced: every contrast excludes 0 on that side at 95 % (intersection-union, so no correction is due);
    not reproduced: one excludes 0 on the other side at 99 %; tie: the interval of the nearest pair lies inside
    +-margin; undecided: the rest. In this order: a difference that is certain and small is a difference.
    """
    sign = {"lowest": 1, "highest": -1}[side]
    ends, strict = (np.sort(sign * np.stack(against.interval(c)), 0) for c in (USUAL, STRICT))
    nearest = np.where(np.isfinite(against.estimate), sign * against.estimate, -np.inf).argmax(-1)
    inside = (ends[0] > -margin) & (ends[1] < margin)
    tie = np.take_along_axis(inside, nearest[..., None], -1)[..., 0] & np.isfinite(against.estimate).all(-1)
    return decide((ends[1] < 0).all(-1), (strict[0] > 0).any(-1), tie), nearest


def judge_half(found: Cells, half: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple]]:
    """Verdicts (...) on "X lowest" (or highest), places of the nearest pair, p of its heterogeneity over sizes, and for
    every size its contrasts, verdicts and places.

    Where the nearest pair differs between sizes (p <= ALIKE), no mean stands for them: the verdict is that of every
    size where they agree, else undecided.
    """
    pairs = pairs_of(found, half)
    verdict, place = judge_extreme(contrast(found, pairs), half["side"], half["margin"])
    each = [contrast(found.at(size), pairs) for size in found.sizes]
    nearest = [
        np.stack([np.take_along_axis(getattr(c, part), place[..., None], -1)[..., 0] for c in each], -1)
        for part in ("estimate", "error", "dof")
    ]
    p = heterogeneity(*nearest)
    sizes = [(c, *judge_extreme(c, half["side"], half["margin"])) for c in each]
    first = sizes[0][1]
    agreed = np.where(np.all([at == first for _, at, _ in sizes], 0), first, UNDECIDED)
    return np.where(p <= ALIKE, agreed, verdict), place, p, sizes


def pairs_of(found: Cells, half: dict) -> list[tuple[str, str]]:
    return [(who, rival) for who in half["who"] for rival in found.optimizers if rival not in half["who"]]


def whole(parts: Sequence[Finding], comment: str = "") -> list[Finding]:
    """The findings of a claim whose parts must all hold, the whole first: one that fails is enough; an open part leaves
    it open. A claim of one part is that part."""
    if len(parts) == 1:
        return [replace(parts[0], part=WHOLE)]
    verdicts = [part.verdict for part in parts]
    order = (NOT_REPRODUCED, NOT_MEASURED, UNDECIDED, TIE, REPRODUCED)
    said = comment or "; ".join(f"{label(part.part)}: {part.verdict}" for part in parts)
    runs = parts[0].runs if len({part.runs for part in parts}) == 1 else ""
    return [Finding(next(v for v in order if v in verdicts), said, runs=runs), *parts]


def runs_of(found: Cells) -> str:
    return "/".join(str(n) for n in found.n.min(0))


def or_open(part: str, judge: Callable[..., Finding], *arguments) -> Finding:
    """The finding on a part, or why it is open."""
    try:
        return judge(*arguments)
    except Open as reason:
        return Finding(reason.verdict, str(reason), part)


# ------------------------------------------------------------------- who is lowest, who is highest: C1 3 4 5 11 13


def extreme(found: Cells, data: Evidence, rule: dict) -> list[Finding]:
    """ "X lowest" or "X highest", in every half of the rule, by contrasts with every rival; its trend over sizes."""
    parts, by_size = [], []
    for half in rule["half"]:
        pairs = pairs_of(found, half)
        verdict, place, p, sizes = judge_half(found, half)
        who, rival = pairs[int(place)]
        named = rival if len(half["who"]) == 1 else f"{rival} (of {who})"
        estimate, trend = difference(found, who, rival), Estimate()
        if len(found.sizes) > 1:
            doublings = slope_weights(np.log2([data.sizes[size] for size in found.sizes]))
            trend = contrast(found, [(who, rival)], doublings).one()
        comment = f"{label(who)} minus {label(rival)}, its nearest rival."
        if p <= ALIKE:  # no mean over sizes: each speaks for itself
            estimate, told = Estimate(n=estimate.n), []
            for size, (of, at, near) in zip(found.sizes, sizes, strict=True):
                runs, rival_here = runs_of(found.at(size)), pairs[int(near)][1]
                told.append(f"{size} {at}")
                by_size.append(Finding(str(at), f"Nearest: {label(rival_here)}.", f"{half['name']}, {size}",
                                       of.one(int(near), int(runs)), runs, rival_here))  # fmt: skip
            comment = f"Sizes differ (p {p:.2g}), each by itself: {'; '.join(told)}"
        parts.append(Finding(str(verdict), comment, half["name"], estimate, runs_of(found), named, trend, float(p)))
    return [*whole(parts), *by_size]


def extreme_of(data: Evidence, rule: dict, column: str, log: bool = True) -> list[Finding]:
    """`extreme` of a column of the rule's table, or of its logarithm; intervals know the tuning of that column."""
    return extreme(data.cells(data.rows(rule["table"], column), column, log=log, tuning=column), data, rule)


def C1(data: Evidence, rule: dict) -> list[Finding]:
    """Muon reaches the lowest loss in full precision."""
    return extreme_of(data, rule, "loss", log=False)


def C3(data: Evidence, rule: dict) -> list[Finding]:
    """Muon has the lowest MMR at the end of training, Shampoo the highest."""
    return extreme_of(data, rule, "mmr")


def C4(data: Evidence, rule: dict) -> list[Finding]:
    """At equal loss, rounding to W4A4 hurts Shampoo least."""
    return extreme_of(data, rule, "increase")


def C5(data: Evidence, rule: dict) -> list[Finding]:
    """At equal loss, rounding to W4A4 hurts Muon most."""
    return extreme_of(data, rule, "increase")  # the same numbers as C4, another side


def C11(data: Evidence, rule: dict) -> list[Finding]:
    """Muon has the highest mean gain of the linear layers, AdamW and Shampoo the lowest."""
    return extreme_of(data, rule, "gain")


def C13(data: Evidence, rule: dict) -> list[Finding]:
    """Quantization-aware training raises Shampoo's loss least, in percent of its loss in full precision."""
    rows = data.rows("runs", "loss", "qat_loss")
    percent = 100 / rows.loss.mean()  # what a nat is, so that the rates' part is in percentage points, too
    found = data.cells(rows.assign(drop=100 * (rows.qat_loss - rows.loss) / rows.loss), "drop", tuning="loss")
    return extreme(replace(found, tuning=found.tuning * percent**2), data, rule)


# ----------------------------------------------------------------------------- what goes with what: C2, C6, C7


def C2(data: Evidence, rule: dict) -> list[Finding]:
    """MMR rises with the learning rate, for every optimizer."""
    rows = data.rows("sweep", "lr", "mmr")
    return whole([_slope(rows[rows.optimizer == name], name, rule) for name in data.optimizers])


def _slope(rows: pd.DataFrame, name: str, rule: dict) -> Finding:
    """Slope of log MMR on log rate, common to the lines of one size, seed and auxiliary rate."""
    lines = [(np.log(own.lr), np.log(own.mmr)) for _, own in rows.groupby(["size", "seed", "auxiliary"], dropna=False)]
    slope, strict = common_slope(lines), common_slope(lines, STRICT)
    counts = "/".join(str(n) for n in rows.groupby("size", sort=False).size())
    tie = -rule["margin"] < slope.low and slope.high < rule["margin"]
    verdict = str(decide(slope.low > 0, strict.high < 0, tie))
    unsure = "The interval has 0."
    if not slope.certain:
        unsure = f"Undecided: {len(rows)} tuning runs leave nothing for a spread."
    said = {REPRODUCED: "Rises.", NOT_REPRODUCED: "Falls, at 99 %.", TIE: "Flat.", UNDECIDED: unsure}
    return Finding(verdict, said[verdict], name, slope, counts)


def judge_prediction(r, others, low, high, rule: dict) -> np.ndarray:
    """Verdicts (...) on a metric from r (...), its leave-one-out values `others` (..., n) and its interval over seeds.

    The metric predicts: r at least `predicts`, every other and the lower end above `still`. It is silent: r at most
    `silent`, every other and the upper end below `predicts`. `rule["claim"]` says which of the two is claimed.
    """
    predicts = (r >= rule["predicts"]) & (others > rule["still"]).all(-1) & (low > rule["still"])
    silent = (r <= rule["silent"]) & (others < rule["predicts"]).all(-1) & (high < rule["predicts"])
    return decide(predicts, silent) if rule["claim"] == "predicts" else decide(silent, predicts)


def _prediction(data: Evidence, table: str, metric: str, part: str, rule: dict) -> Finding:
    """Pearson correlation of log metric with log damage over optimizers (or recipes), size-centred means."""
    rows = data.rows(table, metric, "increase")
    if table == "recipes":
        data = replace(data, optimizers=tuple(dict.fromkeys(rows.optimizer)))
    x, y = (data.cells(rows, name, log=True) for name in (metric, "increase"))
    total = data.cells(rows.assign(both=rows[metric] * rows.increase), "both", log=True)
    u, v = points(x.mean), points(y.mean)
    r, n, runs = float(pearson(u, v)), len(u), runs_of(x)
    if n < LEAST_POINTS:
        return Finding(UNDECIDED, f"Undecided: {n} optimizers cannot say.", part, Estimate(r, n=n), runs)
    others = leave_one_out(u, v)
    low, high = _over_seeds(x, y, (total.variance - x.variance - y.variance) / 2, rule["draws"])
    verdict = str(judge_prediction(r, others, low, high, rule))
    said = f"{n} {'recipes' if table == 'recipes' else 'optimizers'} cannot say."
    if verdict != UNDECIDED:
        predicts = (verdict == REPRODUCED) == (rule["claim"] == "predicts")
        said = "It predicts." if predicts else "It does not predict."
    place = int(np.abs(others - r).argmax())  # the one that the correlation hangs on most
    said += f" Without one of them: {others.min():.2f} to {others.max():.2f}."
    return Finding(verdict, said, part, Estimate(r, low, high, n), runs, data.optimizers[place])


def _over_seeds(x: Cells, y: Cells, covariance: np.ndarray, draws: int, seed: int = 0) -> tuple[float, float]:
    """95 % interval of r when the means of all cells are drawn anew with the spread that their seeds show."""
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, draws, *x.mean.shape))
    spread = np.sqrt(x.variance)
    slope = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0)
    rest = np.sqrt(np.clip(y.variance - slope**2, 0, None))
    u = x.mean + spread * first / np.sqrt(x.n)
    v = y.mean + (slope * first + rest * second) / np.sqrt(x.n)
    low, high = np.nanquantile(pearson(points(u), points(v)), [0.025, 0.975])
    return float(low), float(high)


def C6(data: Evidence, rule: dict) -> list[Finding]:
    """MMR and kurtosis do not predict the damage."""
    return whole([or_open(m, _prediction, data, "common", m, m, rule) for m in rule["metrics"]])


def C7(data: Evidence, rule: dict) -> list[Finding]:
    """R at the network's end predicts the damage: the paper's literal one, and the one that softmax can see."""
    points_of = (
        {"six optimizers": "common", "twelve recipes": "recipes"} if len(data.optimizers) > 3 else {"": "common"}
    )
    parts = [(f"{name}{', ' * bool(over)}{over}", table, m) for name, m in rule["metrics"].items()
             for over, table in points_of.items()]  # fmt: skip
    return whole([or_open(part, _prediction, data, table, metric, part, rule) for part, table, metric in parts])


# ---------------------------------------------------------------------------------------- inside the network: C8 to C10


def C8(data: Evidence, rule: dict) -> list[Finding]:
    """Inherited error dominates new error in almost every module that adds one."""
    rows = data.rows("modules", "R_in", "A", "B", "C")
    rows = rows[(rows.B > 0) & (rows.R_in > 0)]
    hits = (rows.A > rows.B) & (rows.A > rows.C.abs())
    return _share(data, hits.groupby([rows["size"], rows.optimizer, rows.seed]).mean().reset_index(name="share"), rule)


def C9(data: Evidence, rule: dict) -> list[Finding]:
    """The relative error falls at the RMSNorms behind the sublayers."""
    return _share(data, data.rows("norms", "falls").rename(columns={"falls": "share"}), rule)


def _share(data: Evidence, runs: pd.DataFrame, rule: dict) -> list[Finding]:
    """A mean share against a threshold. Its unit is an optimizer: runs of one are too alike to count."""
    found = data.cells(runs, "share")
    of_optimizers = found.mean.mean(-1)  # over sizes
    estimate = t_interval(of_optimizers)
    verdict = str(decide(estimate.low > rule["threshold"], estimate.high < rule["threshold"]))
    least = data.optimizers[int(of_optimizers.argmin())]
    comment = f"{len(of_optimizers)} optimizers, the lowest {label(least)} with {of_optimizers.min():.2f}."
    return [Finding(verdict, comment, WHOLE, estimate, runs_of(found), least)]


def C10(data: Evidence, rule: dict) -> list[Finding]:
    """The spectral ratio of the linear layers is close to 1."""
    rows = data.rows("linear", "spectral_ratio")
    rows = rows.assign(distance=(rows.spectral_ratio - 1).abs())
    found = data.cells(rows.groupby(["size", "optimizer", "seed"]).distance.mean().reset_index(), "distance")
    over = contrast(found, [(name, None) for name in data.optimizers])
    parts, strict = [], over.interval(STRICT)[0]
    for place, name in enumerate(data.optimizers):
        estimate = over.one(place, int(found.n[place].sum()))
        verdict = decide(estimate.high < rule["threshold"], strict[place] > rule["threshold"])
        largest = rows.distance[rows.optimizer == name].max()
        parts.append(Finding(str(verdict), f"Largest layer: {largest:.3f}.", name, estimate, runs_of(found)))
    return whole(parts, f"Largest of all layers: {rows.distance.max():.3f}.")


# ---------------------------------------------------------------------------- quantization-aware training: C12, C14


def judge_reversal(full: Cells, qat: Cells, comparisons: int) -> tuple[np.ndarray, np.ndarray]:
    """At one size: verdict (...) and the place (...) of the optimizer with the lowest mean full-precision loss.

    reproduced: a rival is worse than it in full precision (95 %) and better under QAT, by an interval corrected for
    `comparisons` (Bonferroni); not reproduced: under QAT it is lower than every rival (95 %, intersection-union).
    """
    names, pairs = full.optimizers, [(a, b) for a in full.optimizers for b in full.optimizers]
    shape = (*full.mean.shape[:-2], len(names), len(names))  # best, rival
    fp, after = contrast(full, pairs), contrast(qat, pairs)
    worse = (fp.interval(USUAL)[1] < 0).reshape(shape)
    better = (after.interval(1 - (1 - USUAL) / comparisons)[0] > 0).reshape(shape)
    lower = (after.interval(USUAL)[1] < 0).reshape(shape) | np.eye(len(names), dtype=bool)
    best = np.nan_to_num(full.mean[..., 0], nan=np.inf).argmin(-1)
    row = best[..., None]
    holds, fails = (np.take_along_axis(c, row, -1)[..., 0] for c in ((worse & better).any(-1), lower.all(-1)))
    return decide(holds, fails), best


def C12(data: Evidence, rule: dict) -> list[Finding]:
    """At some size the best optimizer in full precision is not the best under quantization-aware training."""
    rows = data.rows("runs", "loss", "qat_loss")
    full, qat = (data.cells(rows, value, tuning="loss") for value in ("loss", "qat_loss"))
    comparisons, parts = (len(data.optimizers) - 1) * len(full.sizes), []
    for size in full.sizes:
        here, there = full.at(size), qat.at(size)
        verdict, best = (values.item() for values in judge_reversal(here, there, comparisons))
        name = data.optimizers[best]
        rival = min((mean, one) for mean, one in zip(there.mean[:, 0], data.optimizers, strict=True) if one != name)[1]
        against, n = contrast(there, [(name, rival)]), int(there.n.min())
        low, high = (end.item() for end in against.interval(1 - (1 - USUAL) / comparisons))
        comment = f"{label(name)}, best in full precision, minus {label(rival)}; corrected {low:.4f} to {high:.4f}."
        parts.append(Finding(verdict, f"Under QAT {comment}", size, against.one(n=n), str(n), rival))
    verdicts = {part.verdict for part in parts}  # it holds if it does somewhere, and fails only if it does everywhere
    verdict = REPRODUCED if REPRODUCED in verdicts else NOT_REPRODUCED if verdicts == {NOT_REPRODUCED} else UNDECIDED
    return [Finding(verdict, "; ".join(f"{p.part}: {p.verdict}" for p in parts), runs=runs_of(qat)), *parts]


def C14(data: Evidence, rule: dict) -> list[Finding]:
    """A 4-bit parameter is worth most under Shampoo."""
    rows = data.rows("scaling", "N", "bits", "loss")
    if {4, 16} - set(rows.bits):
        raise Open(NOT_MEASURED, "Not measured: a law needs runs in full precision and under QAT.")
    full, qat = (data.cells(rows[rows.bits == bits], "loss") for bits in (16, 4))
    runs, sizes = runs_of(qat), [size for size in full.sizes if size in qat.sizes]
    if len(sizes) < LEAST_SIZES:
        raise Open(UNDECIDED, f"Undecided: {len(sizes)} sizes with enough runs, and a law needs {LEAST_SIZES}.")
    kept = rows[rows["size"].isin(sizes) & rows.optimizer.isin(data.optimizers)]
    estimate, draws = log_rho_draws(kept, rule["draws"])
    if unknown := [label(name) for name in data.optimizers if not np.isfinite(estimate[name])]:
        raise Open(UNDECIDED, f"Undecided: the runs do not bound rho of {listed(unknown)}.")
    half = rule["half"][0]
    (who,), rivals = half["who"], [name for name in data.optimizers if name not in half["who"]]
    against = Drawn(*(np.stack([of[who] - of[rival] for rival in rivals], -1) for of in (estimate, draws)))
    verdict, near = judge_extreme(against, half["side"], half["margin"])
    comment = ", ".join(f"{label(name)} {np.exp(estimate[name]):.3f}" for name in data.optimizers)
    return [Finding(str(verdict), f"rho: {comment}.", WHOLE, against.one(int(near), len(rows)), runs, rivals[near])]


# --------------------------------------------------------------------------------------------------------- all of them

CLAIMS: dict[str, Callable[[Evidence, dict], list[Finding]]] = {
    rule.__name__: rule for rule in (C1, C2, C3, C4, C5, C6, C7, C8, C9, C10, C11, C12, C13, C14)
}


def evaluate(
    tables: Mapping[str, pd.DataFrame],
    rules: dict,
    sizes: Mapping[str, int],
    optimizers: Sequence[str] = PAPER_OPTIMIZERS,
    planned: str = "",
    tolerance: float = 0.0,
) -> pd.DataFrame:
    """Every rule on one set of optimizers: one row a claim, condition and part (`part` "whole" for the claim).

    Columns: id, condition, part, verdict, value, low, high (95 %), unit, n (runs behind the number), runs (fewest of an
    optimizer at each size), rival (the nearest, or the optimizer that decides), trend, trend_low, trend_high (per
    doubling of the size), heterogeneity (p), complete (as many runs as `planned`, "12/8/4"), comment.
    Other optimizers and sizes than the given ones are left out, so a seventh optimizer changes nothing. ValueError for
    a claim without a function here.
    """
    rows = []
    for claim, rule in rules.items():
        choose("claim", claim, CLAIMS)
        for condition in rule.get("conditions", [""]):
            data = Evidence(tables, tuple(optimizers), sizes, condition, tolerance)
            try:
                findings = CLAIMS[claim](data, rule)
            except Open as reason:
                findings = [Finding(reason.verdict, str(reason))]
            for of in findings:
                value, trend = of.estimate, of.trend
                rows.append((claim, condition, of.part, of.verdict, *value.interval, rule["unit"], value.n, of.runs,
                             of.rival, *trend.interval, of.heterogeneity, bool(planned) and of.runs == planned,
                             of.comment))  # fmt: skip
    columns = "id condition part verdict value low high unit n runs rival trend trend_low trend_high heterogeneity"
    return pd.DataFrame(rows, columns=[*columns.split(), "complete", "comment"])
