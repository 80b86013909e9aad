"""GPTQ: weights rounded column by column, the error of each column made up for by the columns that are still to come.

Source: Frantar et al., arXiv 2210.17323. Of all Q on the grid it looks for a small

    tr((W - Q) H (W - Q)^T),  H = 2/n sum_x x x^T  over n calibration inputs x: twice the mean of ||(W - Q) x||^2

With the upper triangular U of H^-1 = U^T U, column j is rounded to q_j, and every later column k moves by
-(w_j - q_j) U_jk / U_jj: the best answer to q_j that the columns still free can give.

What the paper leaves open, or what differs here:
    scales     "row" and "tensor": those of round-to-nearest, from the weights before any moved; moved weights that lie
               beyond the largest level go to it. Blocks (granularity "block", mxfp4, nvfp4): a block's scale is set
               from the moved weights when its first column is reached; nvfp4's tensor scale is the original weights'.
    order      "activation": columns of large H_jj first, None: as they stand. Blocks stay whole: they are ordered by
               the sum of their H_jj, and columns within their block.
    dead       inputs that are zero in all of the calibration: their columns are rounded to nearest, not set to zero.
    fallback   rows for which rounding to nearest has the smaller objective are rounded to nearest, so that no row is
               ever worse (rows are independent: they share nothing but scales that are set beforehand).
    inputs     of a layer are what its rounded weights will multiply: activations rounded and rotated as the spec says,
               all layers before it rounded already. Padding is none (see `text_tokens`).
"""

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from beyond_outliers.config.parsing import choose
from beyond_outliers.modules import evaluating, forward, hooked, text_batches
from beyond_outliers.passes import plain_settings, text_rows, text_tokens
from beyond_outliers.quantizers.formats import (
    FORMATS,
    check_block,
    check_width,
    format_named,
    group_scale,
    quantize_tensor,
    round_to_scale,
)

ORDERS = ("activation", None)
LAZY = 128  # columns between two updates of all that come later: one large product in place of many small ones

# --------------------------------------------------------------------------------------------------- of one weight


@plain_settings()
def gptq_weight(
    weight: Tensor,
    hessian: Tensor,
    format: str,
    granularity: str = "row",
    block: int | None = None,
    damping: float = 0.01,
    order: str | None = "activation",
) -> Tensor:
    """`weight` (out, in) rounded to `format` by GPTQ: the dequantized tensor, of the same shape and dtype.

    hessian: (in, in), symmetric, up to a factor (see `Hessian`). format, granularity, block: as in `quantize_tensor`.
    damping: this share of the mean of the diagonal's entries other than zero is added to the diagonal.
    Computed in float64. No row's objective is larger than that of `quantize_tensor`, under the Hessian as given.

    Raises ValueError for unknown names, blocks that do not divide the width, a Hessian of another shape, anything that
    is not finite, and a Hessian that is not positive definite after damping.
    """
    block_size = format_named(format).block
    if format == "none":
        choose("format", format, [name for name in FORMATS if name != "none"])
    choose("order", order, ORDERS)
    check_block(granularity, block)
    width = weight.shape[-1]
    check_width(width, format, granularity, block)
    if hessian.shape != (width, width):
        raise ValueError(f"hessian of shape {tuple(hessian.shape)}; valid: {(width, width)}, for this weight")
    if not (weight.isfinite().all() and hessian.isfinite().all()):
        raise ValueError("weight or hessian holds NaN or an infinity; valid: finite numbers")
    if not damping >= 0:
        raise ValueError(f"damping must be a share from 0, not {damping}")

    hessian = hessian.double()
    size = block_size or block
    columns = _column_order(hessian.diagonal(), size) if order else torch.arange(width, device=weight.device)
    factor = _inverse_factor(hessian[columns][:, columns], damping)
    compensated = torch.empty_like(weight)
    compensated[:, columns] = _compensate(weight[:, columns], factor, _Scales(weight, format, granularity, size))
    nearest = quantize_tensor(weight, format, granularity, block)
    better = objective(weight, compensated, hessian) < objective(weight, nearest, hessian)
    return torch.where(better[:, None], compensated, nearest)


def objective(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """(W - Q) H (W - Q)^T of every row, (out,) float64."""
    error = weight.double() - rounded.double()
    return (error @ hessian.double() * error).sum(-1)


def _column_order(diagonal: Tensor, size: int | None) -> Tensor:
    """Blocks of `size` columns (None: all are one) by falling sum of the diagonal, columns within them likewise."""
    groups = diagonal.unflatten(0, (-1, size or len(diagonal)))
    within = groups.argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(len(groups), device=diagonal.device)[:, None] * groups.shape[1]
    return (starts + within)[groups.sum(1).argsort(dim=0, descending=True, stable=True)].flatten()


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U = (H + damping)^-1, float64.

    H is factored from its last row up, H = R R^T with R upper triangular, so that U = R^-1: no inverse of H is formed.
    """
    diagonal = hessian.diagonal()
    alive = diagonal != 0
    added = torch.where(alive, damping * diagonal.sum() / alive.sum().clamp(min=1), 1.0)
    lower, failed = torch.linalg.cholesky_ex((hessian + added.diag()).flip(0, 1))
    if failed:
        raise ValueError(f"the hessian is not positive definite with damping {damping}; valid: a larger share")
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


class _Scales:
    """Scale and largest magnitude for the next columns: fixed by the original weight, or anew for every block."""

    def __init__(self, weight: Tensor, format: str, granularity: str, size: int | None):
        self.format, self.size, self.dtype = format, size, weight.dtype
        self.wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        original = weight.to(self.wide).contiguous()
        self.whole = original.abs().amax()
        if size is None:
            found = group_scale(original, format, 2 if granularity == "tensor" else 1)
            self.current = [part.flatten() for part in found]  # (out,), or (1,) for a tensor

    def start_block(self, moved: Tensor):
        """Sets the scales of a block from its columns as they are now, `moved` (size, out)."""
        found = group_scale(moved.T.to(self.wide).contiguous(), self.format, whole=self.whole)
        self.current = [part.flatten() for part in found]

    def round(self, column: Tensor) -> Tensor:
        """(out,) float64 -> rounded as it will be stored, in the weight's dtype."""
        return round_to_scale(column.to(self.wide), self.format, *self.current).to(self.dtype)


def _compensate(weight: Tensor, factor: Tensor, scales: _Scales) -> Tensor:
    """Rounds the columns of `weight` (out, in) in order of their position, moving those that follow."""
    free = weight.T.double().contiguous()  # (in, out): a column of the weight is a row here, all outputs at once
    rounded = torch.empty_like(free, dtype=weight.dtype)
    width, size = len(free), scales.size
    lazy = size * max(1, LAZY // size) if size else LAZY  # whole blocks, whose columns are up to date when they start
    for start in range(0, width, lazy):
        stop = min(start + lazy, width)
        errors = torch.empty_like(free[start:stop])
        for j in range(start, stop):
            if size and j % size == 0:
                scales.start_block(free[j : j + size])
            rounded[j] = scales.round(free[j])
            errors[j - start] = (free[j] - rounded[j]) / factor[j, j]
            free[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
        free[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return rounded.T


# ---------------------------------------------------------------------------------------------------- of a model


class Hessian:
    """2/n sum x x^T over what `add` was given, (in, in) float64; the products of one call in at least float32."""

    def __init__(self):
        self.total, self.rows = torch.zeros((), dtype=torch.float64, device="cpu"), 0

    def add(self, x: Tensor):
        """x: (..., in)."""
        x = x.reshape(-1, x.shape[-1])
        x = x if x.dtype == torch.float64 else x.float()
        self.total = self.total + (x.T @ x).double()
        self.rows += len(x)

    def value(self) -> Tensor:
        if not self.rows:
            raise ValueError("it got no input any more once the layers before it were rounded; valid: more calibration")
        return self.total * (2 / self.rows)


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def round_in_order(model: nn.Module, layers: dict[nn.Module, str], batches, round_layer: Callable):
    """Calls `round_layer(layer, hessian)` for every layer, in the order in which they first run in `model`.

    layers: linear layers whose weights are not rounded yet, with their names; `layer.operand(x)` is what the weight
    multiplies. batches: an iterable of inputs (see `forward`), or one tensor or mapping. A layer's Hessian is over all
    its runs in all batches, with the layers before it rounded.

    Costs one pass to see the order; then one more in all if there is one batch and every layer runs once, else one up
    to that layer for every layer. Keeps one Hessian. Raises ValueError without a batch, for a layer that never runs,
    and, with the layer's name, where `round_layer` does. Warns of layers in whose inputs padding cannot be told apart.
    """
    batches = list(text_batches(model, batches))
    if not batches:
        raise ValueError("there is no batch in calibration")
    with evaluating(model):
        runs = [_count_runs(model, layers, batch) for batch in batches]
        order = _merge(runs)
        if missing := [name for layer, name in layers.items() if layer not in order]:
            raise ValueError(f"layers that never ran in calibration: {', '.join(missing)}")
        padded = _Walk(order, layers, runs, round_layer).go(model, batches)
    if padded:
        warnings.warn(f"padding is in the calibration of {', '.join(padded)}: no row a token there", stacklevel=3)


def _count_runs(model: nn.Module, layers: dict[nn.Module, str], batch) -> Counter:
    """How often each layer runs for one batch, in order of the first run."""
    counts: Counter[nn.Module] = Counter()
    with hooked(layers, lambda layer, *_: counts.update([layer])):
        forward(model, batch)
    return counts


def _merge(runs: list[Counter]) -> list[nn.Module]:
    """One order of all layers; those that run for some batches only come before what follows them there."""
    order: list[nn.Module] = []
    for counts in runs:
        place = len(order)
        for layer in reversed(counts):
            if layer in order:
                place = order.index(layer)
            else:
                order.insert(place, layer)
    return order


class _Walk:
    """Goes through the layers in `waiting`: the first of them is the one whose Hessian is being summed up.

    runs: of each layer for each batch. left: runs of the first layer still to come in this pass. tokens: which of this
    pass are text. padded: names of the layers whose rows are not these tokens, such as an expert's.
    """

    def __init__(self, order: list[nn.Module], names: dict, runs: list[Counter], round_layer: Callable):
        self.waiting, self.names, self.runs, self.round_layer = order, names, runs, round_layer
        self.hessian, self.left = Hessian(), 0
        self.tokens: Tensor | None = None
        self.padded: dict[str, None] = {}

    def go(self, model: nn.Module, batches: list) -> list[str]:
        with ExitStack() as stack:
            for layer in self.waiting:  # behind other hooks: the weight multiplies what these make of the input
                stack.enter_context(layer.register_forward_pre_hook(self.watch, with_kwargs=True))
            while self.waiting:
                for batch, counts in zip(batches, self.runs, strict=True):
                    self.left = counts[self.waiting[0]]
                    if self.left:
                        self.tokens = text_tokens(batch, model)
                        with suppress(_Stop):
                            forward(model, batch)
                if self.waiting:
                    self.finish()
        return list(self.padded)

    def watch(self, layer: Any, args: tuple, kwargs: dict):
        """Before each run of each layer, a module with `operand`."""
        if layer is not self.waiting[0]:
            return
        x: Tensor = layer.operand((*args, *kwargs.values())[0])  # type: ignore[operator]  # narrowed to Module by the line before
        rows = text_rows(x, self.tokens)
        if self.tokens is not None and rows is x and x.shape[:-1].numel() > len(self.tokens):  # fewer: pooled states
            self.padded[self.names[layer]] = None
        self.hessian.add(rows)
        self.left -= 1
        if self.left:
            return
        if len(self.runs) > 1 or self.runs[0][layer] > 1:
            raise _Stop
        self.finish()  # nothing in this pass has seen the layer unrounded: it can go on
        if not self.waiting:
            raise _Stop
        self.left = self.runs[0][self.waiting[0]]

    def finish(self):
        layer = self.waiting.pop(0)
        try:
            self.round_layer(layer, self.hessian.value())
        except ValueError as error:
            raise ValueError(f"layer {self.names[layer]!r}: {error}") from error
        self.hessian = Hessian()
