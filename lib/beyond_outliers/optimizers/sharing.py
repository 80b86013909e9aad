"""The matrix optimizers' work divided among the workers of a run: each updates its stacks, and all get the results.

Every worker has the same gradients, and would compute the same updates. Shared is what takes matrix products; what is
elementwise costs less than sending it, and every worker does all of it. A worker keeps the state of its own stacks.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from beyond_outliers.optimizers.stacking import Stack


def cost(role: str, params: list[Tensor], state: dict[str, Any]) -> int:
    """Of the update of same-shaped parameters with states like `state`, in about multiplications; 0: elementwise."""
    matrices = [v for v in state.values() if isinstance(v, Tensor) and v.ndim == 2]
    sides = [v.shape[0] for v in matrices if v.shape[0] == v.shape[1]]
    if role == "matrix" and not sides:
        sides = [min(params[0].shape)]  # Newton-Schulz
    return len(params) * sum(params[0].numel() * side + side**3 for side in sides)


def shape_alone(parameter: Tensor) -> Tensor:
    """A tensor like it without numbers, on the meta device."""
    return torch.empty_like(parameter, device="meta")


class Sharing:
    """Who updates which parameters: the heaviest first, each part to the worker that has least to do so far.

    Of one worker, everything.
    """

    def __init__(self, rank: int = 0, workers: int = 1) -> None:
        self.rank, self.workers = rank, workers
        self.loads: dict[int, list[int]] = {}  # by group: what it gives every worker to do

    def owners(self, group: dict, parts: list[list[Tensor]], states: Mapping[Tensor, dict]) -> list[int | None]:
        """The worker that updates a part, None for all of them. Every worker comes to the same."""
        self.loads[id(group)] = load = [0] * self.workers
        costs = [cost(group["role"], part, states[part[0]]) for part in parts]
        owners: list[int | None] = [None] * len(parts)
        for i in sorted(range(len(parts)), key=lambda i: -costs[i]):
            if costs[i]:
                totals = [sum(loads) for loads in zip(*self.loads.values(), strict=True)]
                owners[i] = owner = totals.index(min(totals))
                load[owner] += costs[i]
        return owners

    def mine(self, owner: int | None) -> bool:
        return owner in (None, self.rank)

    def exchange(self, stacks: list["Stack"]) -> None:
        """Sends every shared parameter from its owner to the others."""
        waiting = []
        for owner in range(self.workers if self.workers > 1 else 0):
            params = [p for stack in stacks if stack.owner == owner for p in stack.params]
            for dtype in sorted({p.dtype for p in params}, key=str):
                part = [p for p in params if p.dtype == dtype]
                flat = torch.cat([p.flatten() for p in part])
                waiting.append((owner, part, flat, dist.broadcast(flat, owner, async_op=True)))
        for owner, part, flat, work in waiting:
            work.wait()
            if owner != self.rank:
                pieces = flat.split([p.numel() for p in part])
                torch._foreach_copy_(part, [piece.view_as(p) for p, piece in zip(part, pieces, strict=True)])

    def gather(self, stacks: list["Stack"], states: Mapping[Tensor, dict]) -> Mapping[Tensor, dict]:
        """The whole state on the first worker, on the CPU what others keep; elsewhere as it is. All workers call it."""
        whole = dict(states)
        for stack in stacks:
            if not stack.owner:  # everybody's, or the first worker's own
                continue
            for p in stack.params:
                for key, value in states[p].items():
                    if not isinstance(value, Tensor):
                        continue
                    if self.rank == stack.owner:
                        dist.send(value.contiguous(), 0)
                    elif self.rank == 0:
                        received = torch.empty(value.shape, dtype=value.dtype, device=p.device)
                        dist.recv(received, stack.owner)
                        whole[p] = {**whole[p], key: received.cpu()}
        return whole
