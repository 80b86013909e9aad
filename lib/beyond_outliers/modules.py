"""Walking a model: evaluation mode, a forward pass, which modules are linear layers, the head, replacing a layer.

Every other module that looks into a model goes through here, so that each of these has one implementation.
"""

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from beyond_outliers.passes import mapped, same_tensors, text_tokens


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

    def look(config: Any):
        if config is not None and id(config) not in found and hasattr(config, "__dict__"):
            found[id(config)] = config
            for value in vars(config).values():
                if "config" in type(value).__name__.lower() or hasattr(value, "to_dict"):
                    look(value)

    for module in model.modules():
        look(vars(module).get("config"))
        look(vars(module).get("generation_config"))
    return [config for config in found.values() if vars(config).get("use_cache")]


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
        given = mapped(lambda x: x.to(device, copy=True), batch)
        if isinstance(given, dict):
            return model(**given)
        return model(*given) if isinstance(given, (tuple, list)) else model(given)

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
    routes = re.search("expert|router|moe", " ".join(type(module).__name__.lower() for module in model.modules()))
    for batch in as_batches(batches):
        text = text_tokens(batch, model) if routes else None
        if text is None:
            yield batch
            continue
        for row, kept in enumerate(text):

            def cut(x: Tensor, row=row, kept=kept, shape=text.shape) -> Tensor:
                return x[row : row + 1, kept.to(x.device)] if x.shape[:2] == shape else x

            if kept.any():
                yield mapped(cut, batch)


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


# --------------------------------------------------------------------------------------------- modules and their names


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """All modules of a model, with the first name of each."""
    return {module: name for name, module in model.named_modules()}


def check_registered(model: nn.Module):
    """ValueError for layers that a plain attribute holds (a Python list): no state_dict, `.to` or `.eval` sees them."""
    held = [
        f"{name}.{attribute}".lstrip(".")
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute != "_modules"
        and any(any(True for _ in x.parameters()) for x in tree_leaves(value) if isinstance(x, nn.Module))
    ]
    if held:
        raise ValueError(f"layers in Python lists are in no state_dict: {', '.join(held)}; valid: nn.ModuleList")


@contextmanager
def hooked(
    modules: Iterable[nn.Module], before: Callable | None = None, after: Callable | None = None
) -> Iterator[None]:
    """Inside, `before(module, args, kwargs)` and `after(module, args, kwargs, output)` run around every call.

    Other hooks of the modules run between the two.
    """
    with ExitStack() as stack:
        for module in modules:
            if before:
                stack.enter_context(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            if after:
                stack.enter_context(module.register_forward_hook(after, with_kwargs=True))
        yield


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules that keep a computed tensor, as torch's old weight_norm and pruning do."""
    kept = (value for module in model.modules() for value in vars(module).values())
    computed = [value for value in kept if isinstance(value, Tensor) and value.grad_fn is not None]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})


def substitute(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts made[module] in place of every `module` of `model`, under all of its names; hooks go on running around it.

    Returns `model`, or what stands for it.
    """
    for module, replacement in made.items():
        for attribute, hooks in vars(module).items():
            if "hook" in attribute and "state_dict" not in attribute and hooks:
                vars(replacement)[attribute] = hooks
    for module in list(model.modules()):
        module._modules.update({name: made.get(child, child) for name, child in module._modules.items()})  # type: ignore[arg-type]  # a child may be None
    return made.get(model, model)
