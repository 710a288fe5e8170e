"""Gather sharded tensors (FSDP2) into whole ones, and shard whole ones again.

Tensors that are not sharded pass through. Gathering is collective: every process calls it, for the
same tensors in the same order.

`torch.distributed.checkpoint.state_dict` does this for modules and their optimizers. Averages of
weights are neither, and where an optimizer has no state yet, its functions take a step with zero
gradients: a checkpoint after skipped steps would hold moments that no gradient has made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def unsharded(network: nn.Module) -> Iterator[None]:
    """Hold all weights of a network in full within the block, for what no forward pass gathers.

    Collective. A rollout calls parts of a network, and some of them before their own forward pass.
    """
    shards = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Shard a tensor that every process holds in full the way a parameter is sharded."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        # No source rank: each process cuts its shard from its own copy.
        return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)
    return tensor


def gather_on_cpu(state: Any, keep: bool = True) -> Any:
    """Copy a state dict, nested or not, to the CPU with full tensors.

    Args:
        keep: False: this process only takes part in gathering, and gets None for every tensor.
    """
    if isinstance(state, Tensor):
        gathered = full_tensor(state.detach())
        return gathered.to("cpu", copy=True) if keep else None
    if isinstance(state, dict):
        return {key: gather_on_cpu(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gather_on_cpu(value, keep) for value in state]
    return state


def shard_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Shard a state dict that `gather_on_cpu` made of an optimizer like the parameters it has."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {
            name: shard_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}
