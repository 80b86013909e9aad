"""Hooks that hand over the calls of a model's modules, with their inputs and outputs."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from beyond_outliers.modules import forward, hooked


@contextmanager
def opened_attention(attention: str, *models: nn.Module) -> Iterator[None]:
    """Lets the attention mixing of this project's model run as visible modules, if asked to."""
    mixers: list[Any] = [m for model in models for m in model.modules() if getattr(m, "opened", None) is False]
    try:
        for mixer in mixers:
            mixer.opened = attention == "open"
        yield
    finally:
        for mixer in mixers:
            mixer.opened = False


@dataclass
class Call:
    """One call of a module: what went in, and what came out."""

    args: tuple
    kwargs: dict
    output: object = None


class Tape:
    """Hooks that hand every finished call of the watched modules to `finish(name, number, call)`.

    kept: what is kept of inputs or outputs, by default the tensors themselves.
    While `finish` evaluates modules on other inputs, the hooks of their children keep still.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        finish: Callable[[str, int, Call], None],
        kept: Callable[[Any], Any] = lambda values: values,
    ):
        self.model, self.finish, self.kept = model, finish, kept
        self.names = {model.get_submodule(name): name for name in names}
        self.paused = False
        self.open: list[Call] = []
        self.count: Counter[str] = Counter()

    def run(self, batch):
        self.count.clear()
        self.open.clear()
        with hooked(self.names, self._enter, self._leave):
            forward(self.model, batch)

    def _enter(self, module, args, kwargs):
        if not self.paused:
            self.open.append(Call(*self.kept((args, kwargs))))

    def _leave(self, module, args, kwargs, output):
        if self.paused:
            return
        call, name = self.open.pop(), self.names[module]
        call.output = self.kept(output)
        self.count[name] += 1
        self.paused = True
        try:
            self.finish(name, self.count[name], call)
        finally:
            self.paused = False
