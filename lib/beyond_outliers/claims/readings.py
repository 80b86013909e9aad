"""What is read off a study's tables: one definition a quantity, for rules, predictors, figures and notebooks alike.

A reading is a function of a study, or of rows that another reading gave; it computes and never writes. `study` is
anything with the methods `runs`, `measured` and `table` of `beyond_outliers.study.Study` and, where a format is judged,
its `protocol`.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from beyond_outliers import paths
from beyond_outliers.claims.estimates import Estimate, as_table, of_the_paper, t_interval
from beyond_outliers.config.parsing import choose
from beyond_outliers.metrics import without_down
from beyond_outliers.scaling.fit import IdentificationWarning, ScalingLaw, fit_scaling_law
from beyond_outliers.study.tables import read_table

RUN = ["run", "size", "optimizer", "lr", "seed"]
CELL = ["size", "optimizer", "seed"]
MACHINES = ["pair", "device_name_here", "device_name_there", "scheme"]


def measured(study, table: str, purpose: str = "full_precision", checkpoint: str | None = "final") -> pd.DataFrame:
    """Rows of a measured table at a checkpoint: "final", "common" (the first that reaches the Common Loss), None: both.

    ValueError for another checkpoint.
    """
    choose("checkpoint", checkpoint, ["final", "common", None])
    rows = study.measured(table, purpose)
    return rows if checkpoint is None else rows[rows.checkpoint == checkpoint]


def _run_means(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """One row a run: RUN and the mean of a column."""
    return rows.groupby(RUN, sort=False)[column].mean().reset_index()


# ------------------------------------------------------------------------------------------------------------ training


def full_precision(study) -> pd.DataFrame:
    """The main runs in full precision, one row each, as in the table `runs`."""
    return study.runs("full_precision")


def finished(study) -> pd.DataFrame:
    """Those of `full_precision` that did not diverge."""
    return full_precision(study).query("status == 'finished'")


def spread(study) -> pd.DataFrame:
    """Final losses of the main runs in full precision over seeds, one row a size and optimizer.

    mean, lowest, highest and standard deviation `between_seeds` of n_seeds runs (NaN of one), `of_the_text`: the mean
    standard error over validation sequences; rank within the size.
    """
    runs = full_precision(study).groupby(["size", "optimizer"], sort=False)
    table = runs.agg(
        n_seeds=("seed", "nunique"),
        mean=("val_loss", "mean"),
        lowest=("val_loss", "min"),
        highest=("val_loss", "max"),
        between_seeds=("val_loss", "std"),
        of_the_text=("val_standard_error", "mean"),
    )
    return table.assign(rank=table.groupby("size")["mean"].rank(method="min").astype("Int64")).reset_index()


def _made_twice(study) -> pd.DataFrame:
    """Rows of `machines` with what the runs are; `pair` counts pairs of machines; `signed`: there minus here."""
    runs = study.table("machines").merge(study.table("runs")[["run", "size", "optimizer", "scheme"]], on="run")
    pair = runs.groupby(["device_name_here", "device_name_there"], sort=False).ngroup() + 1
    return runs.assign(pair=pair, signed=runs.val_loss_there - runs.val_loss_here)


def machine_shift(study) -> pd.DataFrame:
    """Whether the same runs end lower or higher elsewhere, a row a pair of machines and scheme of training.

    Over its n runs the mean of the loss there minus that here (nats), and its 95 % t interval (NaN of one run).
    """
    runs = _made_twice(study).groupby(MACHINES, sort=False).signed
    return as_table({key: t_interval(values) for key, values in runs}, MACHINES)


def machine_effect(study) -> pd.DataFrame:
    """How far the same run ends elsewhere: |difference| of final losses, a row a pair of machines, scheme, size and
    optimizer; `pair` as in `machine_shift`.

    n runs, their median and largest difference, and the standard deviation `between_seeds` of the main runs beside it.
    """
    keys, runs = ["scheme", "size", "optimizer"], _made_twice(study)
    effect = runs.groupby(["pair", *keys], sort=False).difference.agg(n="size", median="median", largest="max")
    main = pd.concat([full_precision(study), study.runs("qat")])
    between = main.groupby(keys).val_loss.std().rename("between_seeds")
    return effect.reset_index().merge(between.reset_index(), on=keys, how="left")


def validation_curves(study, runs: pd.DataFrame, columns: Sequence[str] = ("size", "optimizer")) -> pd.DataFrame:
    """The evaluations of `runs` after the first step (tokens, val_loss, ...), with these `columns` of the runs, in the
    order of `runs`."""
    curves = runs[["run", *columns]].merge(study.table("curves").dropna(subset="val_loss"), on="run")
    return curves[curves.tokens > 0]


def common_loss(study) -> pd.DataFrame:
    """The table common_loss, and two columns on how far its checkpoints can be compared.

    share: the part of its training that a run needed to reach the Common Loss. undershoot: how far (nats) its first
    checkpoint that does lies below; evaluations are some steps apart.
    """
    table = study.table("common_loss")
    return table.assign(share=table.step / table.final_step, undershoot=table.common_loss - table.val_loss)


def ranking(rows: pd.DataFrame, value: str, by: Sequence[str] = ("size",)) -> pd.Series:
    """Optimizers from the lowest to the highest mean of `value`, "soap < muon < ...", one text a value of `by`."""
    means = rows.groupby([*by, "optimizer"], sort=False)[value].mean().reset_index().sort_values(value)
    order = rows.drop_duplicates(list(by)).set_index(list(by)).index
    return means.groupby(list(by), sort=False).optimizer.agg(" < ".join).loc[order]


# -------------------------------------------------------------------------------------------------------------- tuning


def swept(study) -> pd.DataFrame:
    """Finished tuning runs, as in the table `runs`; `auxiliary`: the rate of the embedding, NaN where it has none."""
    runs = study.runs("sweep").query("status == 'finished'").reset_index(drop=True)
    return runs.assign(auxiliary=[json.loads(text).get("embedding_lr", np.nan) for text in runs.hyper])


def rate_line(study) -> pd.DataFrame:
    """Those of `swept` on one line of learning rates an optimizer and size.

    Of a scale that is tuned by a search: those at the chosen auxiliary rate, and none before it is chosen. Of a scale
    with grids: every one of the sweep.
    """
    if not study.protocol.tuned:
        return swept(study)
    chosen = study.table("learning_rates")[["size", "optimizer", "auxiliary"]].dropna()
    return swept(study).merge(chosen.astype({"auxiliary": float}))


def before_and_after(study) -> pd.DataFrame:
    """Loss `before` and `after` quantization in the primary spec, a row a size, optimizer and rate of `rate_line`.

    Means over seeds, both on the text that quantized models are measured on; `damage` is their difference.
    """
    rows = damage(study, "sweep", checkpoint="final")
    rows = rows[rows.run.isin(rate_line(study).run)]
    rows = rows.assign(before=rows.val_loss - rows.increase, after=rows.val_loss)
    found = rows.groupby(["size", "optimizer", "lr"], sort=False).agg(
        before=("before", "mean"), after=("after", "mean"), damage=("increase", "mean"), seeds=("run", "size")
    )
    return found.reset_index()


# Rates that the searches of scale confirm at 0.08M did not try, asked for after the data (2026-11-25 and 2026-11-29);
# tests/benchmarks/wider_rates.py and low_rates.py make the tables.
FOUND = paths.RESULTS / "confirm_low_rates.csv"
TRIED_SINCE = [paths.RESULTS / "confirm_adamw_rates.csv", paths.RESULTS / "confirm_wider_rates.csv"]


def tried_since(study) -> pd.DataFrame:
    """Finished runs of confirm's tuning seed at 0.08M at the chosen auxiliary rate, of the search and since."""
    every = pd.concat([rate_line(study).query("size == '0.08M'"), *map(read_table, TRIED_SINCE)])
    return every[every.status == "finished"].reset_index(drop=True)


def named_rates(study) -> pd.Series:
    """Optimizer -> the rate that the study's rule names among all of `tried_since`."""
    within = tried_since(study)
    best = within.groupby("optimizer").val_loss.transform("min")
    within = within[within.val_loss <= best + study.protocol.tuning.tolerance]
    return within.groupby("optimizer", sort=False).lr.min()


def found_rates() -> pd.DataFrame:
    """AdamW and PSGD at those rates, one row an optimizer and main seed; val_loss_qat: of the run under QAT."""
    table = read_table(FOUND)
    full, qat = table[table.scheme == "none"], table[table.scheme != "none"]
    ends = qat[["optimizer", "seed", "val_loss"]].rename(columns={"val_loss": "val_loss_qat"})
    both = full.merge(ends, on=["optimizer", "seed"])
    return both.assign(increase_qat=both.val_loss_qat - both.val_loss)


# ------------------------------------------------------------------------------------------------------------ outliers


def mmr(study, purpose: str = "full_precision", checkpoint: str = "final") -> pd.DataFrame:
    """MMR, one row a run: mean over the inputs of linear layers, without `down`."""
    return _run_means(without_down(measured(study, "outliers", purpose, checkpoint)), "mmr")


# -------------------------------------------------------------------------------------------------- error propagation


def modules(study, attention: str | None = "unit", **where) -> pd.DataFrame:
    """Rows of propagation, one a run and module; attention as one module ("unit"), opened up ("open"), None: both.

    where: purpose and checkpoint, as in `measured`, here and below.
    """
    rows = measured(study, "propagation", **where)
    return rows if attention is None else rows[rows.attention == attention]


def with_error(rows: pd.DataFrame) -> pd.DataFrame:
    """Modules whose output has an error."""
    return rows[rows.R > 0]


def with_input_error(rows: pd.DataFrame) -> pd.DataFrame:
    """Modules whose input has an error, and whose output has one: in those before, nothing can accumulate."""
    return with_error(rows[rows.R_in > 0])


def accumulated_dominates(rows: pd.DataFrame) -> pd.Series:
    """Whether the accumulated error A of a module exceeds both the new error B and the interaction |C|."""
    return (rows.A > rows.B) & (rows.A > rows.C.abs())


def error_by(rows: pd.DataFrame, by: str | pd.Series) -> pd.DataFrame:
    """What modules do to the error that reaches them, one row a value of `by`, over those whose input has one.

    modules: how many; factor: geometric mean of R / R_in; falls: share at which R falls; new: mean of B / R, the share
    of the output's error that is new.
    """
    rows = with_input_error(rows)
    each = rows.assign(factor=np.log(rows.R / rows.R_in), falls=rows.R < rows.R_in, new=rows.B / rows.R)
    found = each.groupby(by, sort=False).agg(
        modules=("R", "size"), factor=("factor", "mean"), falls=("falls", "mean"), new=("new", "mean")
    )
    return found.assign(factor=np.exp(found.factor))


def output_error(study, **where) -> pd.DataFrame:
    """R_L, one row a run: the relative error behind the last module."""
    rows = modules(study, **where).sort_values("index", kind="stable")
    return rows.groupby(RUN, sort=False).R.last().rename("R_L").reset_index()


def new_error(study, **where) -> pd.DataFrame:
    """mean_B, one row a run: mean new error B over the modules, attention as one."""
    return _run_means(modules(study, **where), "B").rename(columns={"B": "mean_B"})


def block_linears(study, head: bool = False, **where) -> pd.DataFrame:
    """Linear layers of the blocks that have a gain, attention opened up; none whose input is exact. head: that, too."""
    rows = modules(study, "open", **where)
    return rows[(rows.kind == "linear") & (head | (rows.name != "head"))].dropna(subset="gain")


def linear_gain(study, **where) -> pd.DataFrame:
    """Mean linear gain, one row a run: mean of `gain` over `block_linears`."""
    return _run_means(block_linears(study, **where), "gain")


# -------------------------------------------------------------------------------------------------------- quantization


def primary(study) -> str:
    """The format in which a scale is judged: "W4A4", or "W4A4+head" where the tied head counts as a linear layer."""
    return study.protocol.measure.primary


def damage(
    study, purpose: str = "full_precision", checkpoint: str | None = "common", spec: str | None = None
) -> pd.DataFrame:
    """Rows of ptq in one format (None: primary); `increase` is the damage: nats over the same weights unquantized."""
    rows = measured(study, "ptq", purpose, checkpoint)
    return rows[rows.spec == (spec or primary(study))]


def accuracy(study, specs: Sequence[str] = ("none",), **where) -> pd.DataFrame:
    """Rows of zero_shot in these formats: "none", "W4A4", ..., or "QAT" for the purpose qat."""
    rows = measured(study, "zero_shot", **where)
    return rows[rows.spec.isin(specs)]


def cloze(study, spec: str = "none", **where) -> pd.DataFrame:
    """Accuracy on `cloze`, the task that models of these sizes can do, one row a run and checkpoint."""
    rows = accuracy(study, (spec,), **where)
    return rows[rows.task == "cloze"]


def chance(rows: pd.DataFrame) -> pd.DataFrame:
    """How well accuracies are known, a row a task: questions (the fewest of a run), chance, mean standard error."""
    tasks = rows.groupby("task", sort=False)
    return tasks.agg(n=("n", "min"), chance=("chance", "mean"), standard_error=("standard_error", "mean"))


def damage_and_error(study) -> pd.DataFrame:
    """Damage at the Common Loss beside R_L there, one row a run: RUN, increase, R_L."""
    rows = damage(study)[[*RUN, "increase"]]
    return rows.merge(output_error(study, checkpoint="common")[["run", "R_L"]], on="run")


def _with_qat(full: pd.DataFrame, qat: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """`columns` of both, by size, optimizer and seed, with _fp and _qat behind their names."""
    return full[[*CELL, *columns]].merge(qat[[*CELL, *columns]], on=CELL, suffixes=("_fp", "_qat"))


def qat_losses(study) -> pd.DataFrame:
    """Losses of full precision beside QAT, one row a size, optimizer and seed that has both.

    val_loss_fp, val_loss_qat, status_qat; increase (nats per token); relative_increase: increase over val_loss_fp.
    """
    both = _with_qat(full_precision(study), study.runs("qat"), ["val_loss", "status"]).drop(columns="status_fp")
    increase = both.val_loss_qat - both.val_loss_fp
    return both.assign(increase=increase, relative_increase=increase / both.val_loss_fp)


def finished_qat(study) -> pd.DataFrame:
    """Those of `qat_losses` whose run under QAT did not diverge."""
    return qat_losses(study).query("status_qat == 'finished'")


def qat_accuracies(study) -> pd.DataFrame:
    """Cloze accuracies of full precision beside QAT, one row a size, optimizer and seed that has both.

    relative_drop: (fp - qat) / fp, the paper's definition; drop_error: its standard error, from the two standard errors
    as if independent.
    """
    both = _with_qat(cloze(study), cloze(study, "QAT", purpose="qat"), ["accuracy", "standard_error"])
    drop = (both.accuracy_fp - both.accuracy_qat) / both.accuracy_fp
    errors = (both.standard_error_fp / both.accuracy_fp) ** 2 + (both.standard_error_qat / both.accuracy_qat) ** 2
    return both.assign(relative_drop=drop, drop_error=both.accuracy_qat / both.accuracy_fp * errors**0.5)


# ------------------------------------------------------------------------------------- what optimizers are compared by

NATS, TIMES = "nats", "times"  # how a difference is told: as it is, or as a ratio


@dataclass(frozen=True)
class Quantity:
    """What optimizers are compared by: rows with size, optimizer, seed and `value`, one a run, read off a study."""

    title: str  # {spec}: the format in which the scale is judged
    unit: str
    rows: Callable
    value: str

    def read(self, study) -> pd.DataFrame:
        """The rows of the paper's optimizers, and `compared`: what differences are taken of."""
        rows = of_the_paper(self.rows(study))
        return rows.assign(compared=self.scaled(rows[self.value]))

    def scaled(self, values: pd.Series) -> pd.Series:
        """The values, or their logarithms where ratios are told (TIMES)."""
        return np.log(values) if self.unit == TIMES else values

    def told(self, difference: Estimate) -> Estimate:
        """A difference of `compared` in the unit: of ratios, how many times."""
        return difference.map(np.exp) if self.unit == TIMES else difference

    @property
    def digits(self) -> int:
        return 3 if self.unit == NATS else 2


QUANTITIES = {
    "loss": Quantity("loss in full precision", NATS, finished, "val_loss"),
    "common": Quantity("{spec} increase at the Common Loss", NATS, damage, "increase"),
    "final": Quantity("{spec} increase at the end", NATS, lambda study: damage(study, checkpoint="final"), "increase"),
    "loss_qat": Quantity("loss after training in 4 bits (QAT)", NATS, finished_qat, "val_loss_qat"),
    "qat": Quantity("increase by training in 4 bits (QAT)", NATS, finished_qat, "increase"),
    "R_L": Quantity("R_L at the end", TIMES, output_error, "R_L"),
    "gain": Quantity("mean linear gain at the end", TIMES, linear_gain, "gain"),
    "mmr": Quantity("MMR at the end", TIMES, mmr, "mmr"),
}


def titles(study, names: Sequence[str] = tuple(QUANTITIES)) -> dict[str, tuple[str, str]]:
    """Quantity -> what a reader calls it at this scale, and its unit."""
    return {name: (QUANTITIES[name].title.format(spec=primary(study)), QUANTITIES[name].unit) for name in names}


# ------------------------------------------------------------------------------------------- what predicts the damage

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
    """One row a run: size, optimizer, lr, seed, every candidate and both targets, those of the primary format."""
    where: dict = {"purpose": purpose, "checkpoint": checkpoint}
    inputs = measured(study, "outliers", **where)
    averages = inputs.groupby(RUN, sort=False)[["mmr", "kurtosis", "noise_gain", "expected_error"]].mean()
    table = averages.rename(columns={"mmr": "mmr_all"}).reset_index()
    readings = {"mmr": mmr(study, **where), "mean_B": new_error(study, **where), "R_L": output_error(study, **where)}
    readings |= {"gain": linear_gain(study, **where), "increase": damage(study, **where)}
    for name, rows in (readings | {"accuracy": cloze(study, primary(study), **where)}).items():
        table[name] = table.run.map(rows.set_index("run")[name])
    return table.rename(columns={"gain": "mean_gain"})[[*RUN, *CANDIDATES, *TARGETS]]


def at_loss(trajectory: pd.DataFrame, threshold: float) -> dict[str, float]:
    """A run's rows of one format at the validation loss `threshold` (nats), by linear interpolation in that loss.

    `trajectory`: step, base_loss (unquantized), increase, ... in the order of steps. Between the first checkpoint at or
    below the threshold and the one before it; at that checkpoint itself where it is the first of the run. Returns every
    numeric column at that point. ValueError when no checkpoint reaches the threshold.
    """
    reached = np.flatnonzero(trajectory.base_loss.to_numpy() <= threshold)
    if not len(reached):
        raise ValueError(
            f"no checkpoint reaches the loss {threshold:.4f}; the lowest is {trajectory.base_loss.min():.4f}"
        )
    after = trajectory.iloc[reached[0]]
    before = trajectory.iloc[max(reached[0] - 1, 0)]
    gap = before.base_loss - after.base_loss
    share = (before.base_loss - threshold) / gap if gap > 0 else 1.0
    numeric = trajectory.select_dtypes("number").columns
    return {name: float(before[name] + share * (after[name] - before[name])) for name in numeric}


# --------------------------------------------------------------------------------------------------------- scaling law


def scaling_runs(study) -> pd.DataFrame:
    """Finished main runs for `fit_scaling_law`: N, D, bits (16, or 4 for QAT), loss, optimizer, size, seed, run."""
    parts = [full_precision(study).assign(bits=16), study.runs("qat").assign(bits=4)]
    runs = pd.concat(parts).query("status == 'finished'").reset_index(drop=True)
    runs = runs.rename(columns={"n_parameters": "N", "tokens": "D", "val_loss": "loss"})
    return runs[["N", "D", "bits", "loss", "optimizer", "size", "seed", "run"]]


def scaling_laws(runs: pd.DataFrame) -> dict[str, ScalingLaw]:
    """One law an optimizer, fitted to its `scaling_runs`. What they do not identify stands in the law's `warnings`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdentificationWarning)
        return {str(name): fit_scaling_law(rows) for name, rows in runs.groupby("optimizer", sort=False)}


def efficiencies(laws: dict[str, ScalingLaw]) -> pd.DataFrame:
    """The parameter efficiency at 4 bits, a row a law that has one: optimizer, rho, low, high, identified."""
    rows = [law.table().query("bits == 4").assign(optimizer=name) for name, law in laws.items()]
    return pd.concat(rows, ignore_index=True).rename(columns={"value": "rho"})[
        ["optimizer", "rho", "low", "high", "identified"]
    ]
