"""Stacks of same-shaped parameters: the base of the matrix optimizers, which update a whole stack in one call."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beyond_outliers.optimizers.groups import RoleGroups
from beyond_outliers.optimizers.sharing import Sharing, shape_alone

CPU_STACK_ELEMENTS = 2**18  # of the largest stacked tensor: 1 MiB in float32


class Stack:
    """Same-shaped parameters of one group that have taken equally many steps, and their state, stacked along dim 0.

    `state[key]` is (N, ...); each parameter's own entry in the optimizer's state is a view of its slice, so that
    writing in place here keeps `state_dict` right. Counts are plain integers, equal for all N. `derived` is free for
    what can be recomputed from the state. `owner` is the worker that updates it, None for every one.
    """

    def __init__(self, params: list[Tensor], per_parameter: list[dict], owner: int | None = None):
        self.owner = owner
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

    def __init__(self, params, given: dict, role_defaults: dict[str, dict] | None = None, beside: tuple[str, ...] = ()):
        """given: `locals()` of a subclass, whose arguments are settings of its groups, but for those `beside` them."""
        given = {name: given[name] for name in given if name not in ("self", "params", "__class__", *beside)}
        self.role_defaults = role_defaults or {}
        self._stacks: dict[int, tuple[list[tuple[int, int]], list[Stack]]] = {}
        self._sharing = Sharing()
        super().__init__(params, given)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._stacks = {}  # their views are stale: loading (and copying) gives every parameter new tensors
        self.__dict__.setdefault("_sharing", Sharing())  # of a copy

    def share(self) -> None:
        """From now on the workers of torch.distributed divide the stacks among them, and each keeps its own's state.

        The numbers stay what they are (on CUDA PSGD draws other probes). All workers must call `step` and `state_dict`
        together, with the same gradients; the first one's state_dict is the whole state, the same for any number of
        workers, and what each of them loads.
        """
        self._sharing = Sharing(dist.get_rank(), dist.get_world_size())
        self._stacks = {}

    def init_state(self, group: dict, parameter: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def state_shapes(self, group: dict, parameter: Tensor) -> dict[str, torch.Size]:
        state = self.init_state(group, shape_alone(parameter))
        return {key: value.shape for key, value in state.items() if isinstance(value, Tensor)}

    def update(self, group: dict, stack: Stack) -> None:
        raise NotImplementedError

    def skip(self, group: dict, stack: Stack) -> None:
        """What a worker does for a stack that another one updates: counts, and random numbers drawn for all."""
        stack.advance()

    def state_dict(self) -> dict:
        state = super().state_dict()
        index = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        stacks = [stack for _, stacks in self._stacks.values() for stack in stacks]
        state["state"] = {index[p]: entry for p, entry in self._sharing.gather(stacks, self.state).items()}
        return state

    def stacks(self, group: dict) -> list[Stack]:
        """The group's stacks over the parameters that have a gradient; rebuilt only when that set changes."""
        live = [p for p in group["params"] if p.grad is not None and p.numel()]
        cached = self._stacks.get(id(group))
        # the states, too: whoever clears them, or puts others in their place, must find that it has an effect
        if cached is None or cached[0] != [(id(p), id(self.state.get(p))) for p in live]:
            stacks = self._build(group, live)
            self._stacks[id(group)] = cached = ([(id(p), id(self.state[p])) for p in live], stacks)
        return cached[1]

    def _build(self, group: dict, live: list[Tensor]) -> list[Stack]:
        """New parameters get their state; of what another worker updates, states are shapes, on the meta device."""
        buckets: dict[tuple, list[Tensor]] = {}
        workers, stacks = self._sharing.workers, []
        for p in live:
            if not self.state[p]:  # of several workers a shape alone, until it is known whose it is
                self.state[p] = {"step": 0, **self.init_state(group, p if workers == 1 else shape_alone(p))}
            counts = [value for value in self.state[p].values() if not isinstance(value, Tensor)]
            buckets.setdefault((p.shape, p.dtype, p.device, *counts), []).append(p)
        parts = [part for same in buckets.values() for part in cut_to_cache(same, self.state[same[0]], workers)]
        for part, owner in zip(parts, self._sharing.owners(group, parts, self.state), strict=True):
            for p in part:
                self._keep_or_drop(group, p, self._sharing.mine(owner))
            stacks.append(Stack(part, [self.state[p] for p in part], owner))
        return stacks

    def _keep_or_drop(self, group: dict, parameter: Tensor, mine: bool) -> None:
        state = self.state[parameter]
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        if not mine:
            state.update({key: value.to("meta") for key, value in tensors.items()})
        elif any(value.is_meta for value in tensors.values()):
            if state["step"]:
                raise RuntimeError(
                    "which parameters have a gradient has changed, and with it which worker keeps a state; valid with "
                    "several workers: a loss that always uses the same parameters"
                )
            state.update(self.init_state(group, parameter))

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update. Returns the closure's loss. NonFiniteGradientError before anything is changed."""
        loss = self.evaluated(closure)
        updated = []
        with self.precisely():
            for group in self.param_groups:
                for stack in self.stacks(group):
                    if self._sharing.mine(stack.owner):
                        self.update(group, stack)
                    else:
                        self.skip(group, stack)
                    updated.append(stack)
        self._sharing.exchange(updated)
        return loss


def cut_to_cache(params: list[Tensor], state: dict, workers: int = 1) -> list[list[Tensor]]:
    """Same-shaped parameters in parts that are worth stacking: one for every worker, but on CPUs what stays in cache.

    There, stacking saves the overhead of many small calls; temporaries beyond the cache cost more than that, and the
    parts are the same for any number of workers. `state` is one parameter's: its largest tensor counts.
    """
    count = -(-len(params) // workers)
    if params[0].device.type == "cpu":
        largest = max([1] + [value.numel() for value in state.values() if isinstance(value, Tensor)])
        count = max(1, CPU_STACK_ELEMENTS // largest)
    return [params[start : start + count] for start in range(0, len(params), count)]
