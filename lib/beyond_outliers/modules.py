"""Walking a model: evaluation mode, a forward pass, which modules are linear layers, the head, replacing a layer.

Every other module that looks into a model goes through here, so that each of these has one implementation.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from beyond_outliers.passes import same_tensors, text_tokens


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode, no gradients and no key/value cache inside; everything as it was afterwards.

    torch's fused transformer kernels, which read weights past the layers that own them, are off too. Yields the device
    of the first model's parameters.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    configs = [config for model in models for config in caching_configs(model)]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for model in models:
            model.eval()
        for config in configs:
            config.use_cache = False
        # no inference tensors, the caller's mode or not: what a module caches on first use must stay usable in training
        with torch.inference_mode(False), torch.no_grad():
            yield device_of(models[0])
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes:
            module.training = mode
        for config in configs:
            config.use_cache = True


def caching_configs(model: nn.Module) -> list[Any]:
    """Configurations that switch a key/value cache on: of any module, for generation, and nested in another one."""
    found: dict[int, Any] = {}
    waiting = [vars(module).get(name) for module in model.modules() for name in ("config", "generation_config")]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        if vars(config).get("use_cache"):
            found[id(config)] = config
        waiting += [v for v in vars(config).values() if "config" in type(v).__name__.lower() or hasattr(v, "to_dict")]
    return list(found.values())


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies (quantized layers have buffers only), else the CPU."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def forward(model: nn.Module, batch):
    """Output for one batch: a tensor, a tuple or list of positional or a mapping of keyword arguments.

    The model gets copies, on its device: what it changes in place stays its own. Raises ValueError for a batch with a
    key/value cache, and for a model that draws random numbers in evaluation mode so that another pass differs.
    """
    device = device_of(model)

    def call():
        if isinstance(batch, Mapping):
            return model(**{key: move(value) for key, value in batch.items()})
        return model(*map(move, batch)) if isinstance(batch, (tuple, list)) else model(move(batch))

    def move(value):
        return value.to(device, copy=True) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        from beyond_outliers.anymodel.checks import check_batch

        check_batch(batch)
    states = [] if model.training else random_states(device)
    output = call()
    if states and not same_tensors(states, random_states(device)):
        from beyond_outliers.anymodel.checks import check_draws

        check_draws(model, call)
    return output


def random_states(device: torch.device) -> list[Tensor]:
    """What torch's generators will draw next."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def as_batches(batches) -> Iterable:
    """A lone tensor or mapping is one batch; anything else is iterated."""
    return [batches] if isinstance(batches, (Tensor, Mapping)) else batches


def text_batches(model: nn.Module, batches) -> Iterator:
    """`as_batches`; of a model with experts, a padded batch sequence by sequence, without its padding.

    No mask tells which of the rows that a router sends to an expert are padding.
    """
    names = {type(module).__name__.lower() for module in model.modules()}
    routes = any(word in name for name in names for word in ("expert", "router", "moe"))
    for batch in as_batches(batches):
        text = text_tokens(batch, model) if routes else None
        for row, kept in enumerate([] if text is None else text):

            def cut(value, row=row, kept=kept, shape=None if text is None else text.shape):
                is_ours = isinstance(value, Tensor) and value.shape[:2] == shape
                return value[row : row + 1, kept.to(value.device)] if is_ours else value

            if kept.any():
                is_mapping = isinstance(batch, Mapping)
                yield {key: cut(value) for key, value in batch.items()} if is_mapping else tuple(map(cut, batch))
        if text is None:
            yield batch


# --------------------------------------------------------------------------------------------------- linear layers


def is_linear(module: nn.Module) -> bool:
    """A linear layer of full precision (GPT-2's Conv1D is one too), or one of this project's quantized ones."""
    if isinstance(module, nn.Linear):  # its weight is not looked at: computing a parametrized one may change it
        stored = module._parameters.get("weight")
        if stored is not None and stored.is_complex():
            return False
        if getattr(module, "rounds_operands", False) or type(module) is nn.Linear:
            return True
        from beyond_outliers.anymodel.linears import computes_linear

        return computes_linear(module)
    return is_conv1d(module) or ("Linear" in type(module).__name__ and _has_matrix(module))


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored transposed, (in, out)."""
    return type(module).__name__ == "Conv1D" and _has_matrix(module)


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def linear_weight(module: nn.Module) -> Tensor:
    """Weight of what `is_linear` accepts as (out, in); torch types the attributes of modules as Tensor or Module."""
    weight = cast(Tensor, module.weight)
    return weight.T if is_conv1d(module) else weight


HEAD_NAMES = ("head", "lm_head", "output", "embed_out", "decoder", "score")


def find_head(model: nn.Module) -> str | None:
    """Name of the output head, None without one.

    In this order: what `get_output_embeddings()` gives; the linear layer that shares an embedding's weight; the last
    one named as in `HEAD_NAMES` (the general words only outside of lists of blocks); the last of all, outside of such
    lists, where it has as many outputs as the vocabulary has entries.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    shared = {id(table.weight) for table in tables}
    linears = [(name, module) for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    head = declared(model, "get_output_embeddings")
    found = [name for name, module in linears if module is head]
    found += [name for name, module in linears if id(module._parameters.get("weight")) in shared]
    if found:
        return found[0]
    outside = [(name, module) for name, module in linears if not any(part.isdigit() for part in name.split("."))]
    certain = [name for name, _ in linears if name.rpartition(".")[2] in HEAD_NAMES[:2]]
    named = certain or [name for name, _ in outside if name.rpartition(".")[2] in HEAD_NAMES]
    if named:
        return named[-1]
    entries = declared(model, "get_input_embeddings")
    entries = entries if isinstance(entries, nn.Embedding) else next(iter(tables), None)
    if entries is not None and outside and outside[-1][1].out_features == entries.num_embeddings:
        return outside[-1][0]
    return None


def declared(model: nn.Module, method: str) -> nn.Module | None:
    """What a `transformers` model says of itself; None where it does not."""
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


# --------------------------------------------------------------------------------------------- layers in containers

_INTERNAL = frozenset(vars(nn.Module()))


def _held(value, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules in nested lists, tuples and dicts, with names that say where."""
    if isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _held(item, f"{name}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _held(item, f"{name}[{key!r}]")


def hidden_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that only a plain attribute holds (a Python list of layers): `model.modules()` does not see them.

    With names such as "blocks.0.parts[1].up"; neither `state_dict` nor `.to` nor `.eval()` reaches them.
    """
    seen, found = set(model.modules()), {}
    waiting = list(model.named_modules())
    while waiting:
        owner, module = waiting.pop(0)
        for attribute, value in vars(module).items():
            if attribute in _INTERNAL:
                continue
            for name, root in _held(value, f"{owner}.{attribute}" if owner else attribute):
                for inner, part in root.named_modules() if root not in seen else ():
                    if part not in seen:
                        seen.add(part)
                        found[part] = f"{name}.{inner}" if inner else name
                        waiting.append((found[part], part))
    return found


def every_module(model: nn.Module) -> dict[nn.Module, str]:
    """All modules that the model can call, registered or hidden, with the first name of each."""
    return {module: name for name, module in model.named_modules()} | hidden_modules(model)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules that keep a computed tensor, as torch's old weight_norm and pruning do."""
    kept = (value for module in every_module(model) for value in vars(module).values())
    computed = [value for value in kept if isinstance(value, Tensor) and value.grad_fn is not None]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})


def substitute(model: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """Puts made[module] in place of every `module` below `model` or held in its attributes, under all of its names.

    Returns `model`, or what stands for it.
    """

    def swap(value):
        if isinstance(value, nn.Module):
            return made.get(value, value)
        if isinstance(value, list):
            value[:] = map(swap, value)
        elif isinstance(value, tuple):
            swapped = map(swap, value)
            return type(value)(*swapped) if hasattr(value, "_fields") else type(value)(swapped)
        elif isinstance(value, dict):
            value.update({key: swap(item) for key, item in value.items()})
        return value

    for module in list(every_module(model)):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = made.get(child, child)
        for attribute, value in list(vars(module).items()):
            if attribute not in _INTERNAL and any(True for _ in _held(value, "")):
                vars(module)[attribute] = swap(value)
    return made.get(model, model)


def take_hooks(source: nn.Module, target: nn.Module):
    """Hooks on a layer that is replaced go on running around its replacement."""
    for attribute in _INTERNAL:
        if "hook" in attribute and "state_dict" not in attribute and vars(source)[attribute]:
            vars(target)[attribute] = vars(source)[attribute]
