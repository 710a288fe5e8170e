"""Whole tensors from sharded ones (FSDP2) and back; tensors that are not sharded pass through.

Gathering is collective: every process calls it, for the same tensors in the same order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every process has whole, cut and placed as a parameter is."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        # No source: each process takes its part of its own.
        return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)
    return tensor


def whole_on_cpu(state: Any, keep: bool = True) -> Any:
    """A state dict, nested or not, with whole tensors that share no memory with it.

    Args:
        keep: False: this process only takes part in gathering, and gets None for every tensor.
    """
    if isinstance(state, Tensor):
        gathered = whole(state.detach())
        return gathered.to("cpu", copy=True) if keep else None
    if isinstance(state, dict):
        return {key: whole_on_cpu(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [whole_on_cpu(value, keep) for value in state]
    return state


def sharded_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """What `whole_on_cpu` made of an optimiser's state dict, as its own parameters are sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {
            name: sharded_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}
