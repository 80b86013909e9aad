"""Stacks of same-shaped parameters: the base of the matrix optimizers, which update a whole stack in one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from beyond_outliers.optimizers.groups import RoleGroups

CPU_STACK_ELEMENTS = 2**18  # of the largest stacked tensor: 1 MiB in float32


class Stack:
    """Same-shaped parameters of one group that have taken equally many steps, and their state, stacked along dim 0.

    `state[key]` is (N, ...); each parameter's own entry in the optimizer's state is a view of its slice, so that
    writing in place here keeps `state_dict` right. Counts are plain integers, equal for all N. `derived` is free for
    what can be recomputed from the state.
    """

    runs = 1  # whose parameters are stacked; `RunsStack` has several

    def __init__(self, params: list[Tensor], per_parameter: list[dict]):
        self.params = params
        self.per_parameter = per_parameter
        self.state: dict[str, Tensor] = {}
        self.derived: dict[str, Any] = {}
        for key, value in per_parameter[0].items():
            if isinstance(value, Tensor):
                self.state[key] = torch.stack([entry[key] for entry in per_parameter])
                for entry, view in zip(per_parameter, self.state[key].unbind(), strict=True):
                    entry[key] = view

    def __len__(self) -> int:
        return len(self.per_parameter)

    @property
    def shape(self) -> torch.Size:
        """Of one parameter."""
        return self.params[0].shape

    def advance(self) -> int:
        """Count a step and return its number, from 1."""
        self.put("step", self.count("step") + 1)
        return self.count("step")

    def count(self, key: str) -> int:
        return self.per_parameter[0][key]

    def put(self, key: str, value: int) -> None:
        """Sets a count."""
        for entry in self.per_parameter:
            entry[key] = value

    def gradient(self) -> Tensor:
        """(N, *shape). May alias `p.grad`: never write to it."""
        gradients = [p.grad for p in self.params if p.grad is not None]  # all have one, see `stacks`
        return gradients[0].unsqueeze(0) if len(gradients) == 1 else torch.stack(gradients)

    def descend(self, update: Tensor, lr: float) -> None:
        """p <- p - lr * update, with `update` (N, *shape)."""
        torch._foreach_add_(self.params, update.unbind(), alpha=-lr)

    def decay(self, lr: float, rate: float) -> None:
        """p <- (1 - lr rate) p."""
        if 1 - lr * rate != 1.0:
            torch._foreach_mul_(self.params, 1 - lr * rate)


class StackedOptimizer(RoleGroups):
    """Base of the matrix optimizers: finds the stacks and calls `update(group, stack)` for each.

    A subclass gives `init_state(group, parameter) -> dict of tensors` and `update(group, stack)`. Parameters without
    gradient are left alone; which ones have a gradient may change from step to step.
    """

    def __init__(self, params, defaults: dict, role_defaults: dict[str, dict] | None = None):
        self.role_defaults = role_defaults or {}
        self._stacks: dict[int, tuple[list[tuple[int, int]], list[Stack]]] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._stacks = {}  # their views are stale: loading (and copying) gives every parameter new tensors

    def init_state(self, group: dict, parameter: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def state_shapes(self, group: dict, parameter: Tensor) -> dict[str, torch.Size]:
        state = self.init_state(group, parameter.detach().to("meta"))
        return {key: value.shape for key, value in state.items() if isinstance(value, Tensor)}

    def update(self, group: dict, stack: Stack) -> None:
        raise NotImplementedError

    def stacks(self, group: dict) -> list[Stack]:
        """The group's stacks over the parameters that have a gradient; rebuilt only when that set changes."""
        live = [p for p in group["params"] if p.grad is not None]
        cached = self._stacks.get(id(group))
        # the states, too: whoever clears them, or puts others in their place, must find that it has an effect
        if cached is None or cached[0] != [(id(p), id(self.state.get(p))) for p in live]:
            buckets: dict[tuple, list[Tensor]] = {}
            for p in live:
                if not self.state[p]:
                    self.state[p] = {"step": 0, **self.init_state(group, p)}
                counts = [value for value in self.state[p].values() if not isinstance(value, Tensor)]
                key = (p.shape, p.dtype, p.device, *counts)
                buckets.setdefault(key, []).append(p)
            parts = [part for same in buckets.values() for part in cut_to_cache(same, self.state[same[0]])]
            found = [Stack(part, [self.state[p] for p in part]) for part in parts]
            self._stacks[id(group)] = cached = ([(id(p), id(self.state[p])) for p in live], found)
        return cached[1]

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update. Returns the closure's loss. NonFiniteGradientError before anything is changed."""
        loss = self.evaluated(closure)
        for group in self.param_groups:
            for stack in self.stacks(group):
                self.update(group, stack)
        return loss


def cut_to_cache(params: list[Tensor], state: dict) -> list[list[Tensor]]:
    """Same-shaped parameters in parts that are worth stacking: all at once, but on CPUs only what stays in cache.

    There, stacking saves the overhead of many small calls; temporaries beyond the cache cost more than that.
    `state` is one parameter's: its largest tensor counts.
    """
    if params[0].device.type != "cpu":
        return [params]
    largest = max([1] + [value.numel() for value in state.values() if isinstance(value, Tensor)])
    count = max(1, CPU_STACK_ELEMENTS // largest)
    return [params[start : start + count] for start in range(0, len(params), count)]
