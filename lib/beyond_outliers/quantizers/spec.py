"""`QuantSpec`: what of a model is rounded, and how, with a short name for tables."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from beyond_outliers.config.parsing import choose
from beyond_outliers.quantizers.formats import check_block, check_width, format_named

METHODS = ("rtn", "gptq")


@dataclass(frozen=True)
class QuantSpec:
    """What of a model is rounded, and how: names of `FORMATS`, or yours, for weights and for activations.

    granularity, block: see `quantize_tensor`. head: the output head too (its embedding lookup stays as it is).
    rotate: the input of every linear layer is rotated by block Hadamard matrices and the weights to match.
    method: how weights are rounded: "rtn", each to the nearest level, or "gptq" (see `gptq`), which needs calibration.
    Raises ValueError on construction for what is not valid, naming what is.
    """

    weights: str = "int4"
    activations: str = "int4"
    granularity: str = "row"
    head: bool = False
    rotate: bool = False
    block: int | None = None
    method: str = "rtn"

    def __post_init__(self):
        format_named(self.weights, "format of the weights")
        format_named(self.activations, "format of the activations")
        check_block(self.granularity, self.block)
        choose("method", self.method, METHODS)
        if self.method == "gptq" and self.weights == "none":
            raise ValueError("method 'gptq' with weights 'none'; valid: a format for the weights, or method 'rtn'")

    @property
    def name(self) -> str:
        """Short name for tables: W4A4, W4g128, A8, W4Afp8, W4A4+block32+rot+gptq+head; FP when nothing is rounded."""
        if self.weights == self.activations and not self.weights.startswith("int"):
            name = "FP" if self.weights == "none" else self.weights
        else:
            letters = zip("WA", (self.weights, self.activations), strict=True)
            name = "".join(letter + format.removeprefix("int") for letter, format in letters if format != "none")
        name += "" if self.granularity == "row" else f"+{self.granularity}{self.block or ''}"
        return name + "+rot" * self.rotate + "+gptq" * (self.method == "gptq") + "+head" * self.head

    @classmethod
    def named(cls, name: str) -> "QuantSpec":
        """The spec that calls itself `name`; ValueError for what is no such name."""
        start, *parts = name.split("+")
        options: dict = {"rotate": "rot" in parts, "head": "head" in parts}
        options["method"] = "gptq" if "gptq" in parts else "rtn"
        for part in parts:
            if found := re.fullmatch(r"(tensor|block)(\d*)", part):
                options |= {"granularity": found[1], "block": int(found[2]) if found[2] else None}
        for weights, activations in _formats_named(start):
            with contextlib.suppress(ValueError):
                if (spec := cls(weights=weights, activations=activations, **options)).name == name:
                    return spec
        raise ValueError(f"{name!r} names no quantization; valid: W4A4, W4, A8, mxfp4, ..., then +rot, +gptq, +head")

    def check_width(self, width: int) -> None:
        """ValueError unless both formats fit rows of `width` entries."""
        check_width(width, self.weights, self.granularity, self.block)
        check_width(width, self.activations, self.granularity, self.block)


def _formats_named(start: str) -> Iterator[tuple[str, str]]:
    """What the part of a spec's name before the first "+" may say: pairs of formats for weights and activations."""
    yield ("none", "none") if start == "FP" else (start, start)

    def full(short: str) -> str:
        return f"int{short}" if short[:1].isdigit() else short or "none"

    if start[:1] == "A":
        yield "none", full(start[1:])
    for place in [len(start), *(i for i, letter in enumerate(start) if letter == "A")]:
        if start[:1] == "W":
            yield full(start[1:place]), full(start[place + 1 :])
