"""Hooks that hand over the calls of a model's modules, with their inputs and outputs."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from beyond_outliers.modules import forward
from beyond_outliers.passes import tensors


def clones(value):
    """The same nested structure with every tensor copied."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        copies = [clones(item) for item in value]
        return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same class, with what it has beside its items
        for key, item in value.items():
            copied[key] = clones(item)
        return copied
    return value


@contextmanager
def opened_attention(attention: str, *models: nn.Module) -> Iterator[None]:
    """Lets the attention mixing of this project's model run as visible modules, if asked to."""
    mixers: list[Any] = [m for model in models for m in model.modules() if getattr(m, "opened", None) is False]
    try:
        for mixer in mixers if attention == "open" else ():
            mixer.opened = True
        yield
    finally:
        for mixer in mixers:
            mixer.opened = False


# ------------------------------------------------------------------------------------------------ recording calls


@dataclass
class Call:
    """One call of a module: what went in, what came out, and the tensors' version counters."""

    args: tuple
    kwargs: dict
    output: object = None
    versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def note(self, *values):
        self.versions += [(x, x._version) for x in tensors(*values) if not x.is_inference()]


class Tape:
    """Hooks that hand every finished call of the watched modules to `finish(name, number, call)`.

    Tensors are kept by reference. `clone` is set once a model has been caught changing one in place; then copies are.
    """

    def __init__(self, model: nn.Module, names, finish):
        self.model, self.names, self.finish = model, names, finish
        self.clone = False
        self.paused = False  # while modules are evaluated on other inputs, their children's hooks keep still
        self.open: list[Call] = []
        self.count: Counter = Counter()

    def run(self, batch):
        self.count.clear()
        handles = []
        for name in self.names:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaver(name), with_kwargs=True))
        try:
            forward(self.model, batch)
        finally:
            self.open.clear()
            for handle in handles:
                handle.remove()

    def _enter(self, module, args, kwargs):
        if not self.paused:
            call = Call(*clones((args, kwargs))) if self.clone else Call(args, kwargs)
            call.note(args, kwargs)
            self.open.append(call)

    def _leaver(self, name):
        def leave(module, args, kwargs, output):
            if self.paused:
                return
            call = self.open.pop()
            call.output = clones(output) if self.clone else output
            call.note(output)
            self.count[name] += 1
            self.paused = True
            try:
                self.finish(name, self.count[name], call)
            finally:
                self.paused = False

        return leave


def record(tape: Tape, calls: dict, batch):
    """Fills `calls` with one forward pass; a second time, on copies, if the first shows tensors changed in place."""
    calls.clear()
    tape.run(batch)
    if not tape.clone and any(x._version != version for call in calls.values() for x, version in call.versions):
        tape.clone = True
        record(tape, calls, batch)
