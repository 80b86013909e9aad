"""What a pass in evaluation mode must be: a function of its input alone, with nothing kept for the next pass."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# ---------------------------------------------------------------------------------------------- tensors in structures


def tensors(*values) -> Iterator[Tensor]:
    """Tensors anywhere in nested tuples, lists and mappings, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(*value)
        elif isinstance(value, Mapping):
            yield from tensors(*value.values())


def mapped(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with `function(x)` for every tensor x in it, however nested; a mapping comes back as a dict."""
    return tree_map_only(Tensor, function, dict(batch) if isinstance(batch, Mapping) else batch)


def floats(*values) -> list[Tensor]:
    """Those of `tensors` that hold real or complex numbers, not integers."""
    return [x for x in tensors(*values) if x.is_floating_point() or x.is_complex()]


def reals(*values) -> list[Tensor]:
    """`floats`, the complex ones as pairs of real numbers: (..., n) as (..., 2 n), so that rows stay rows."""
    return [
        torch.view_as_real(x.resolve_conj()).flatten(-2 if x.ndim else 0) if x.is_complex() else x
        for x in floats(*values)
    ]


def main_output(output) -> list[Tensor]:
    """The tensors in which a model answers, without the loss, hidden states, pooled states and caches beside them.

    Of a mapping, such as the outputs of `transformers`: the logits, else the last hidden state, else all of it but
    what lists the layers' states. Of a tuple or list: its first tensor. Complex numbers come as pairs of real ones.
    """
    if isinstance(output, Mapping):
        beside = ("hidden_states", "attentions", "past_key_values", "mems", "loss")
        chosen = [key for key in output if "logits" in str(key)]
        chosen = chosen or [key for key in output if key == "last_hidden_state"]
        chosen = chosen or [key for key in output if not str(key).endswith(beside)]
        return reals(*(output[key] for key in chosen))
    is_first = isinstance(output, (tuple, list)) and isinstance(output[0] if output else None, Tensor)
    return reals(output)[:1] if is_first else reals(output)


# ---------------------------------------------------------------------------------------------------------- padding


def text_tokens(batch, model: torch.nn.Module) -> Tensor | None:
    """Which tokens of a batch are text and not padding: bool (B, T); None where all are, or the batch does not say.

    A mapping, or arguments of `model` in their order, says so by `attention_mask` (B, T), 0 for padding, as in
    `transformers`, or by `src_key_padding_mask` (B, T), True for padding, as in torch. Masks of other shapes say which
    token sees which, not what is text.
    ValueError for a batch of padding alone.
    """
    if isinstance(batch, (tuple, list)):
        with suppress(TypeError, ValueError):  # more than `model` takes, as its pass will say; no signature
            batch = inspect.signature(model.forward).bind_partial(*batch).arguments
    masks = batch if isinstance(batch, Mapping) else {}
    text, padding = masks.get("attention_mask"), masks.get("src_key_padding_mask")
    if padding is not None and text is None:
        text = ~padding if padding.dtype == torch.bool else padding == 0  # a float one is added to the scores
    if not isinstance(text, Tensor) or text.ndim != 2 or bool((text != 0).all()):
        return None
    if not bool((text != 0).any()):
        raise ValueError("the batch is padding alone by its mask; valid: a batch with text in it")
    return text != 0


def text_rows(x: Tensor, tokens: Tensor | None) -> Tensor:
    """The rows of x (B, T, ...), (B T, ...) or (B, heads, T, n) at the text's tokens: `tokens` is of `text_tokens`.

    x itself where `tokens` is None, and where x has other rows than one a token (a pooled state, an expert's share).
    """
    if tokens is not None:
        by_head = x.transpose(1, -2) if x.ndim == 4 else x
        for rows, of in ((tokens, x), (tokens.flatten(), x), (tokens, by_head)):
            if of.shape[: rows.ndim] == rows.shape:
                return of[rows.to(x.device)]
    return x


# ------------------------------------------------------------------------------------- what a thread has switched on


@contextmanager
def plain_settings(training: bool = False) -> Iterator[None]:
    """No autocast, no inference tensors and no gradients inside, whatever the caller has set.

    For what makes tensors that outlive the call, such as rounded weights: they are the same ones anywhere. Also a
    decorator, `@plain_settings()`. With `training`, gradients are kept, and torch makes float32 tensors by default;
    without it the default dtype stays what it is, for modules of others may count on theirs: all of this project name
    their own.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32 if training else dtype)
        for device in {"cpu", getattr(torch.accelerator.current_accelerator(), "type", "cpu")}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(training))
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's CPU threads set to one inside, and back to what they were.

    For decompositions of matrices (`torch.linalg.eigh`, `eigvalsh`, `svdvals`): their small steps wait for each other
    between threads, on a busy machine seconds for what one thread does in milliseconds. Also a decorator.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


# -------------------------------------------------------------------------------------------- tensors made only once


def keeps_tensors() -> bool:
    """Whether a tensor made here is a real one, that a cache may keep: not while a program is traced on fake ones."""
    return type(torch.empty(0)) is Tensor and not torch.compiler.is_exporting()


def made_once(cache: dict, key, make: Callable):
    """cache[key], made by `make()` at the first call, so that training can use what an inference made.

    Under fake tensors (torch.export, FakeTensorMode) it is made anew and not kept. So it is in a compiled pass
    without gradients, which inference_mode is one of: a program cannot leave that mode, so that what it makes is its.
    """
    if not keeps_tensors():
        return make()
    if key not in cache:
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return make()
        with torch.inference_mode(False):
            cache[key] = make()
    return cache[key]


def same_tensors(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(one, other, strict=True)
    )
