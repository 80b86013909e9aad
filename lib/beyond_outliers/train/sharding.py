"""Weights divided among the workers, for a model that does not fit one of them (FSDP2).

Every worker keeps a share of each weight, of its gradient and of the optimizer's state, and gathers a block's weights
while it computes with them. Only optimizers that update every entry by itself can work on shares. What is saved is
whole, so that a run goes on with any number of workers, sharded or not. Imported where it is used: what it needs of
torch takes most of a second.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from beyond_outliers.decoder import Decoder


def shard(model: Decoder, device: torch.device) -> None:
    """Divides a model's parameters among the workers, block by block."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "loss")


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
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        index: {key: divided(value, ours[index]) for key, value in kept.items()}
        for index, kept in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**state["optimizer"], "state": states})
