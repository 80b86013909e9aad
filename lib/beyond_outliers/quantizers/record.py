"""What of a model was rounded, and what was left alone, for which reason: one row for every weight of a matrix product.

`quantize_model` and `prepare_qat` leave the record on their result, as `model.quantization`. Without an input they go
by what layers are; with one (`example`, `calibration`, or `coverage(model, batch)`) a forward pass is watched, which
finds what no list of layers can: weights read past their layers, tables that serve as heads, parameters in products.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pandas as pd
from torch import nn

from beyond_outliers.modules import hooked, module_names
from beyond_outliers.quantizers.spec import QuantSpec

HEAD = "head"  # the only reason that a specification itself asks for


class CoverageWarning(UserWarning):
    """Weights of matrix products were left in full precision."""


@dataclass(frozen=True)
class Weight:
    """A weight of a matrix product. `rounded`: treated as the specification says, the operand that it meets as well."""

    name: str
    kind: str
    entries: int
    rounded: bool
    reason: str = ""


@dataclass
class Quantization:
    """What was done to a model: `print(model.quantization)`.

    stage: "ptq" (rounded after training), "qat" (trains through quantizers), "frozen" (a trained one, rounded once).
    never_ran: layers that got no input in the last measurement, such as idle experts.
    """

    spec: QuantSpec
    stage: str = "ptq"
    scheme: str | None = None
    weights: list[Weight] = field(default_factory=list)
    never_ran: list[str] = field(default_factory=list)
    first_pass: bool = field(default=False, compare=False)  # whether the next pass is to say which layers did not run

    @property
    def share(self) -> float:
        """Share of the entries of matrix-multiply weights that were rounded; NaN without any."""
        entries = sum(weight.entries for weight in self.weights)
        return sum(w.entries for w in self.weights if w.rounded) / entries if entries else float("nan")

    @property
    def left_alone(self) -> list[Weight]:
        """What is in full precision although the specification does not say so."""
        return [weight for weight in self.weights if not weight.rounded and weight.reason != HEAD]

    def table(self) -> pd.DataFrame:
        """One row a weight: name, kind, entries, rounded, reason. `table.attrs["share"]` is `share`."""
        columns = ["name", "kind", "entries", "rounded", "reason"]
        table = pd.DataFrame([[getattr(w, c) for c in columns] for w in self.weights], columns=columns)
        table.attrs["share"] = self.share
        return table

    def __str__(self) -> str:
        lines = [f"{self.spec.name}: {self.share:.1%} of the entries of matrix-multiply weights are rounded"]
        lines += [
            f"  left alone  {w.name} ({w.kind}, {w.entries:,} entries): {w.reason}"
            for w in self.weights
            if not w.rounded
        ]
        lines += [f"  note  {w.name}: {w.reason}" for w in self.weights if w.rounded and w.reason]
        return "\n".join(lines + [f"  never ran  {name}" for name in self.never_ran])

    def report(self, strict: bool):
        """CoverageWarning that lists what was left alone, or with `strict` a ValueError."""
        if not self.left_alone:
            return
        shown = ", ".join(f"{w.name} ({w.reason})" for w in self.left_alone[:8])
        more = f" and {len(self.left_alone) - 8} more" if len(self.left_alone) > 8 else ""
        text = (
            f"{self.share:.1%} of the matrix-multiply weight entries are rounded; left in full precision: {shown}{more}"
        )
        if strict:
            raise ValueError(f"{text}; valid: strict=False, which goes on with a warning")
        warnings.warn(text, CoverageWarning, stacklevel=4)  # past the decorator of its caller


def record_of(quantized: nn.Module) -> Quantization:
    record = vars(quantized).get("quantization")
    if not isinstance(record, Quantization):
        raise ValueError(
            f"{type(quantized).__name__} has no record; valid: what quantize_model, prepare_qat, freeze_qat return"
        )
    return record


def rounding_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that round, with their names."""
    return {
        module: name
        for module, name in module_names(model).items()
        if getattr(module, "rounds_operands", False) or "operand_rounding" in module._modules
    }


class Runs:
    """Counts the runs of the layers that round, while a measurement goes on.

    `check(batch)`, once it is over: layers that never ran are put into the record as such and named in a warning; if
    one pass of `batch` shows that some module reads such a layer's weight without calling it, that is a ValueError.
    """

    def __init__(self, quantized: nn.Module):
        self.model, self.layers = quantized, rounding_layers(quantized)
        self.record: Quantization | None = vars(quantized).get("quantization")
        self.counts: Counter[nn.Module] = Counter()

    @property
    def idle(self) -> dict[nn.Module, str]:
        return {layer: name for layer, name in self.layers.items() if not self.counts[layer]}

    @contextmanager
    def counted(self) -> Iterator["Runs"]:
        if self.record is not None:
            self.record.first_pass = False  # `check` says it better
        with hooked(self.layers, lambda layer, *_: self.counts.update([layer])):
            yield self

    def check(self, batch):
        if self.record is not None:
            self.record.never_ran = list(self.idle.values())
        if self.idle:
            from beyond_outliers.anymodel.coverage import check_idle

            check_idle(self.model, self.idle, batch)
