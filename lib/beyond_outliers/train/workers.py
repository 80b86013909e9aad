"""The processes that train one run under torchrun: who this one is, and what they do together.

The global batch is shared among them: every worker has the whole model, the gradients are averaged, and the matrix
optimizers' work is divided (`optimizers/sharing.py`). A plain run is its only worker.
"""

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from beyond_outliers.optimizers.stacking import StackedOptimizer
from beyond_outliers.train.machine import LossModule

Loss = Callable[[Tensor, Tensor], Tensor]  # of token ids and targets, (B, T) each


def place() -> tuple[int, int]:
    """Number of workers, and which of them this is."""
    return int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


class Workers:
    """`count` of them, of which this is number `rank`, on its device."""

    def __init__(self, device: torch.device):
        self.count, self.rank = place()
        self.device = device
        if self.count > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def join(self, loss: LossModule, optimizer: torch.optim.Optimizer) -> Loss:
        """The loss whose gradients are the mean over all workers; shares the optimizer's work, if it can be shared."""
        if self.count == 1:
            return loss
        if isinstance(optimizer, StackedOptimizer):
            optimizer.share()
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(loss, device_ids=ids)

    def apart(self, loss: Loss) -> AbstractContextManager:
        """While gradients are only added up, and not exchanged yet."""
        return loss.no_sync() if isinstance(loss, DistributedDataParallel) else contextlib.nullcontext()

    def agree(self, number: Tensor, *asked: bool) -> tuple[Tensor, list[bool]]:
        """The mean of a number over the workers, and whether any of them asked for each of several things."""
        if self.count == 1:
            return number, list(asked)
        shared = torch.stack([number, *(torch.full_like(number, one) for one in asked)])
        dist.all_reduce(shared, op=dist.ReduceOp.SUM)
        return shared[0] / self.count, [bool(one) for one in shared[1:].tolist()]

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()
