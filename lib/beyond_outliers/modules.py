"""Walking a model: evaluation mode, a forward pass, which modules are linear layers, the head, replacing a layer.

Every other module that looks into a model goes through here, so that each of these has one implementation.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode, no gradients and no key/value cache inside; everything as it was afterwards.

    Yields the device of the first model's parameters.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    found: list[Any] = [getattr(model, "config", None) for model in models]
    configs = [config for config in found if getattr(config, "use_cache", False)]
    try:
        for model in models:
            model.eval()
        for config in configs:
            config.use_cache = False
        # not inference_mode: a buffer that a module caches on first use must stay usable in training
        with torch.no_grad():
            yield device_of(models[0])
    finally:
        for module, mode in modes:
            module.training = mode
        for config in configs:
            config.use_cache = True


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies (quantized layers have buffers only), else the CPU."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def forward(model: nn.Module, batch):
    """Output for one batch: a tensor, a tuple of positional or a mapping of keyword arguments, moved to the model."""
    device = device_of(model)

    def move(value):
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{key: move(value) for key, value in batch.items()})
    return model(*map(move, batch)) if isinstance(batch, tuple) else model(move(batch))


def as_batches(batches) -> Iterable:
    """A lone tensor or mapping is one batch; anything else is iterated."""
    return [batches] if isinstance(batches, (Tensor, Mapping)) else batches


def is_linear(module: nn.Module) -> bool:
    """A linear layer of full precision, or one of this project's quantized ones."""
    weight = getattr(module, "weight", None)
    return "Linear" in type(module).__name__ and isinstance(weight, Tensor) and weight.ndim == 2


def weight_of(linear: nn.Module) -> Tensor:
    """The weight (out, in) of what `is_linear` accepts; torch types the attributes of modules as Tensor or Module."""
    return cast(Tensor, linear.weight)


def find_head(model: nn.Module) -> str | None:
    """Name of the output head: the linear layer that shares an embedding's weight, else the last one named head or
    lm_head; None without either."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    tied = [name for name, module in linears if id(module.weight) in tables]
    named = [name for name, _ in linears if name.rpartition(".")[2] in ("head", "lm_head")]
    return (tied or named[-1:] or [None])[0]


def replace_linears(model: nn.Module, head: bool, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A deep copy of `model`, every linear layer replaced in place of its name; the head only where asked for."""
    model = copy.deepcopy(model)
    kept = None if head else find_head(model)
    made: dict[nn.Module, nn.Module] = {}  # a layer that is used under two names stays one layer
    for name, module in list(model.named_modules(remove_duplicate=False)):
        # torch's attention reads its out_proj's weight without calling it: activations could not be rounded there
        if not isinstance(module, nn.Linear) or type(module).__name__ == "NonDynamicallyQuantizableLinear":
            continue
        if name == kept or (kept and module is model.get_submodule(kept)):
            continue
        if module not in made:
            try:
                made[module] = make(module).train(module.training)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        if not name:
            return made[module]
        model.set_submodule(name, made[module])
    if not made:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantize beside its head")
    return model
