"""The steps of a study and what each of them needs, written once.

    corpus -> sweep (train, or tune) -> choose -> train -> measure -> collect, size by size

`Study.ensure` does them one after the other, the Snakefile side by side: both ask `choices` and `needs`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from beyond_outliers.config.protocol import Protocol

# kind -> the file below data/runs/SCALE that says that a step is done; the fields in braces tell its steps apart
OUTPUTS = {
    "corpus": "corpus.json",
    "train": "{run}/result.json",  # one run
    "tune": "tuned-{optimizer}-{size}.json",  # all runs of a search, which decides from run to run
    "choose": "chosen-{size}.txt",
    "measure": "measured-{purpose}-{size}",
    "collect": "collected-{size}",
}


@dataclass(frozen=True)
class Step:
    """One step. `kind` is a key of OUTPUTS; of the other fields, those are set that its output names."""

    kind: str
    size: str = ""
    run: str = ""
    optimizer: str = ""
    purpose: str = ""

    @property
    def output(self) -> str:
        return OUTPUTS[self.kind].format(**vars(self))


def choices(protocol: "Protocol", step: Step) -> list[Step]:
    """The choices of learning rates that must have been made before `needs` can name what the step needs."""
    if step.kind == "measure" and step.purpose == "sweep":  # a sweep run that serves as a main run is measured there
        return [Step("choose", size=step.size)]
    if step.kind in ("measure", "collect"):
        at = protocol.tuning_size(step.size)
        return [Step("choose", size=at)] if "sweep" in protocol.purposes(at) else []  # else the rates are lent
    return []


def needs(protocol: "Protocol", step: Step) -> list[Step]:
    """The steps whose results a step takes, in the order in which they are best done.

    Tables that all sizes share are written in turn, smallest size first.
    """
    size = step.size
    if step.kind == "train":
        return [Step("corpus")]
    if step.kind == "tune":  # it starts where the size before ended
        return [Step("corpus"), *_before(step, protocol.sizes)]
    if step.kind == "choose":
        swept = [at for at in protocol.sizes if "sweep" in protocol.purposes(at)]
        return sweep(protocol, size) + _before(step, swept)
    if step.kind == "measure":
        return sweep(protocol, size) if step.purpose == "sweep" else main_runs(protocol, size, step.purpose)
    if step.kind == "collect":
        measured = [Step("measure", size=size, purpose=purpose) for purpose in protocol.purposes(size)]
        return main_runs(protocol, size) + measured + _before(step, protocol.sizes)
    return []


def sweep(protocol: "Protocol", size: str) -> list[Step]:
    """The steps from which the learning rates of a swept size are chosen: one a run, or, if tuned, one an optimizer."""
    if protocol.tuned:
        return [Step("tune", size=size, optimizer=name) for name in protocol.optimizers]
    return [Step("train", run=planned.config.name) for planned in protocol.sweep_runs(size)]


def main_runs(protocol: "Protocol", size: str, purpose: str | None = None) -> list[Step]:
    """The main runs of a size, or those of one purpose; none before its learning rates are chosen."""
    planned = protocol.runs(protocol.rates(), size)
    return [Step("train", run=p.config.name) for p in planned if purpose in (None, p.purpose)]


def _before(step: Step, sizes: list[str]) -> list[Step]:
    """The same step of the size before this one, if there is one."""
    place = sizes.index(step.size)
    return [Step(step.kind, size=sizes[place - 1], optimizer=step.optimizer)] if place else []
