"""Hooks that hand over the calls of a model's modules, with their inputs and outputs."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from beyond_outliers.modules import forward


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

    While `finish` evaluates modules on other inputs, the hooks of their children keep still.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], finish: Callable[[str, int, Call], None]):
        self.model, self.names, self.finish = model, names, finish
        self.paused = False
        self.open: list[Call] = []
        self.count: Counter[str] = Counter()

    def kept(self, values: Any) -> Any:
        """What is kept of inputs or outputs: the tensors themselves."""
        return values

    def run(self, batch):
        self.count.clear()
        self.open.clear()
        with ExitStack() as stack:
            for name in self.names:
                module = self.model.get_submodule(name)
                stack.enter_context(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(self._leaver(name), with_kwargs=True))
            forward(self.model, batch)

    def _enter(self, module, args, kwargs):
        if not self.paused:
            self.open.append(Call(*self.kept((args, kwargs))))

    def _leaver(self, name: str):
        def leave(module, args, kwargs, output):
            if self.paused:
                return
            call = self.open.pop()
            call.output = self.kept(output)
            self.count[name] += 1
            self.paused = True
            try:
                self.finish(name, self.count[name], call)
            finally:
                self.paused = False

        return leave
