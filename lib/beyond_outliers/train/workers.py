"""The processes that train one run under torchrun: who this one is, and what they do together.

The global batch is shared among them: every worker has the whole model, the gradients are averaged, and the matrix
optimizers' work is divided (`optimizers/sharing.py`); or each has a share of the weights alone (`sharding`). A plain
run is its only worker.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from beyond_outliers.model.decoder import Decoder
from beyond_outliers.optimizers.stacking import StackedOptimizer
from beyond_outliers.train.machine import LossModule

Loss = Callable[[Tensor, Tensor], Tensor]  # of token ids and targets, (B, T) each


def place() -> tuple[int, int]:
    """Number of workers, and which of them this is."""
    return int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


class Workers:
    """`count` of them, of which this is number `rank`, on its device; `shard`: each has a share of the weights."""

    def __init__(self, device: torch.device, shard: bool):
        self.count, self.rank = place()
        self.device, self.shard = device, shard
        if self.count > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def take(self, model: Decoder) -> None:
        """Moves a model, or this worker's share of it, to the worker's device."""
        if self.shard:
            from beyond_outliers.train import sharding

            sharding.shard(model, self.device)
        model.to(self.device)

    def join(self, loss: LossModule, optimizer: torch.optim.Optimizer) -> Loss:
        """The loss whose gradients are the mean over all workers; shares the optimizer's work, if it can be shared."""
        if self.count == 1:
            return loss
        if self.shard:
            if isinstance(optimizer, StackedOptimizer):
                from beyond_outliers.train import sharding

                optimizer.share(sharding.WholeMatrices())
            return loss.model.loss
        if isinstance(optimizer, StackedOptimizer):
            optimizer.share()
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(loss, device_ids=ids)

    @contextlib.contextmanager
    def apart(self, model: Decoder, loss: Loss) -> Iterator[None]:
        """While gradients are only added up, and not exchanged yet."""
        if self.shard:
            cast(Any, model).set_requires_gradient_sync(False)
            yield
            cast(Any, model).set_requires_gradient_sync(True)
        else:
            with loss.no_sync() if isinstance(loss, DistributedDataParallel) else contextlib.nullcontext():
                yield

    def agree(self, number: Tensor, *asked: bool) -> tuple[Tensor, list[bool]]:
        """The mean of a number over the workers, and whether any of them asked for each of several things."""
        if self.count == 1:
            return number, list(asked)
        shared = torch.stack([number, *(torch.full_like(number, one) for one in asked)])
        dist.all_reduce(shared, op=dist.ReduceOp.SUM)
        return shared[0] / self.count, [bool(one) for one in shared[1:].tolist()]

    def whole(self, state: Any) -> Any:
        """The same with every shared tensor gathered. All workers call it."""
        if self.shard:
            from beyond_outliers.train import sharding

            return sharding.whole(state)
        return state

    def load(self, model: Decoder, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Loads what `whole` gave: the states of model and optimizer."""
        if self.shard:
            from beyond_outliers.train import sharding

            sharding.load_whole(model, optimizer, state)
        else:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()
