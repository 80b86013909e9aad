"""Weights divided among the workers, for a model that does not fit one of them (FSDP2).

Every worker keeps a share of each weight and of its gradient, and gathers a block's weights while it computes with
them. AdamW and SGD update every entry by itself, so that they work on the shares, with a share of their state. The
matrix optimizers need whole matrices: every parameter has a worker that keeps a whole copy and its state, gathers its
gradient, and hands out the new shares (`WholeMatrices`). What is saved is whole, so that a run goes on with any number
of workers, sharded or not. Imported where it is used: what it needs of torch takes most of a second.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from beyond_outliers.model.decoder import Decoder
from beyond_outliers.optimizers.groups import gathered
from beyond_outliers.optimizers.sharing import Sharing
from beyond_outliers.optimizers.stacking import Stack, StackedOptimizer


def shard(model: Decoder, device: torch.device) -> None:
    """Divides a model's parameters among the workers, block by block."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "loss")


class WholeMatrices(Sharing):
    """Who updates which divided parameters, on whole copies that the others never hold.

    A worker keeps the copies and the state of its own parameters, about a share of both. A step gathers one stack's
    gradients at a time: on every worker, since that is what DTensor offers, but only the owner keeps them.
    """

    def cost(self, role: str, params: list[Tensor], state: dict[str, Any]) -> int:
        """As where weights are whole, but elementwise updates are owned, too: they take memory."""
        return super().cost(role, params, state) or sum(p.numel() for p in params)

    def updated(self, params: list[Tensor], mine: bool) -> list[Tensor]:
        copies = (gathered(p.detach()) for p in params)
        return [copy.clone() if mine else copy.to("meta") for copy in copies]

    def bring(self, stack: Stack) -> None:
        for p, copy in zip(stack.members, stack.params, strict=True):
            assert p.grad is not None, "a stack's parameters have gradients"
            gradient = gathered(p.grad)
            if self.mine(stack.owner):
                copy.grad = gradient

    def exchange(self, stacks: list[Stack]) -> None:
        for stack in stacks:
            assert stack.owner is not None, "every divided parameter has an owner"
            for p, copy in zip(cast(list[DTensor], stack.members), stack.params, strict=True):
                source = copy if self.mine(stack.owner) else torch.empty(p.shape, dtype=p.dtype, device=p.device)
                p.copy_(distribute_tensor(source, p.device_mesh, p.placements, src_data_rank=stack.owner))
                copy.grad = None


def whole(state: Any) -> Any:
    """The same with every divided tensor gathered, on the CPU. All workers call it."""
    return tree_map(lambda value: value.full_tensor().cpu() if isinstance(value, DTensor) else value, state)


def divided(value: Any, like: Tensor) -> Any:
    """A whole tensor of the shape of a divided one, divided like it; anything else as it is."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def load_whole(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads a whole state of model and optimizer into divided ones."""
    parameters = model.state_dict()
    model.load_state_dict({name: divided(value, parameters[name]) for name, value in state["model"].items()})
    if isinstance(optimizer, StackedOptimizer):  # keeps of the whole states those of its own parameters
        return optimizer.load_state_dict(state["optimizer"])
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        index: {key: divided(value, ours[index]) for key, value in kept.items()}
        for index, kept in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**state["optimizer"], "state": states})
