"""Muon for the matrices of the blocks, AdamW for the rest."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from scd.options import OptimOptions
from scd.training.optimizer import AdamWithMuon, make_optimizer


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Linear(32, 64), nn.Linear(32, 64)


def groups(layers):
    matrices = [layer.weight for layer in layers]
    return [
        {"params": [layer.bias for layer in layers], "lr": 0.02, "muon": False},
        {"params": matrices, "lr": 0.01, "muon": True},
    ]


def fill_gradients(layers, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for p in layer.parameters():
            p.grad = torch.randn(p.shape, generator=generator)


def test_each_optimiser_has_its_parameters(layers):
    """A bias moves as with AdamW alone; a matrix by lr sqrt(64 / 32) in each of its 32 directions,
    whatever its gradient's size: times 0.7 to 1.2, which five Newton-Schulz iterations leave."""
    optimizer = make_optimizer(groups(layers), OptimOptions(muon_lr=0.01), True)
    assert isinstance(optimizer, AdamWithMuon)
    biases = [layer.bias.detach().clone().requires_grad_() for layer in layers]
    alone = make_optimizer([{"params": biases, "lr": 0.02}], OptimOptions(), True)
    fill_gradients(layers, 1)
    layers[0].weight.grad *= 1e-3
    before = [layer.weight.detach().clone() for layer in layers]
    for bias, layer in zip(biases, layers, strict=True):
        bias.grad = layer.bias.grad.clone()
    optimizer.step()
    alone.step()
    for bias, layer, weight in zip(biases, layers, before, strict=True):
        assert torch.equal(bias, layer.bias)
        moved = torch.linalg.svdvals(layer.weight - weight) / (0.01 * 2**0.5)
        assert moved.min() > 0.6 and moved.max() < 1.3


def test_schedule_and_saved_state_reach_both(layers):
    """What is saved, loaded into a new optimiser, goes on to the bit; a rate of 0 stops all."""
    optimizer = make_optimizer(groups(layers), OptimOptions(muon_lr=0.01), True)
    fill_gradients(layers, 1)
    optimizer.step()
    saved = deepcopy(optimizer.state_dict())
    kept = [set(values) for _, values in sorted(saved["state"].items())]
    assert kept == 2 * [{"step", "exp_avg", "exp_avg_sq"}] + 2 * [{"momentum_buffer"}]
    twins = [nn.Linear(32, 64), nn.Linear(32, 64)]
    for twin, layer in zip(twins, layers, strict=True):
        twin.load_state_dict(layer.state_dict())
    other = make_optimizer(groups(twins), OptimOptions(muon_lr=0.01), True)
    other.load_state_dict(saved)
    for pair, its in ((layers, optimizer), (twins, other)):
        fill_gradients(pair, 2)
        its.step()
    for twin, layer in zip(twins, layers, strict=True):
        assert torch.equal(twin.weight, layer.weight) and torch.equal(twin.bias, layer.bias)
    torch.optim.lr_scheduler.LambdaLR(other, lambda step: 0.0)
    before = [p.detach().clone() for twin in twins for p in twin.parameters()]
    other.step()
    after = [p for twin in twins for p in twin.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
