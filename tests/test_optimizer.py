"""Muon for the matrices of the blocks, AdamW for the rest, and the rates of both."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from scd.models.scd import SCD
from scd.options import OptimOptions, Options
from scd.training.optimizer import AdamWithMuon, OptimizedModel, lr_multiplier, make_optimizer
from scd.training.world_model_task import MATRICES, parameter_groups


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Linear(32, 64), nn.Linear(32, 64)


def groups(layers):
    matrices = [layer.weight for layer in layers]
    return [
        {"params": [layer.bias for layer in layers], "lr": 0.02},
        {"params": matrices, "lr": 0.01, "muon": [1, 1]},
    ]


def fill_gradients(layers, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for p in layer.parameters():
            p.grad = torch.randn(p.shape, generator=generator)


def test_each_optimizer_has_its_parameters(layers):
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


def test_weights_decay_in_each_optimizer(layers):
    """By lr times `weight_decay`; without gradients nothing else moves them (1e-6)."""
    given = groups(layers)
    optimizer = make_optimizer(given, OptimOptions(muon_lr=0.01, weight_decay=0.5), True)
    before = [[p.detach().clone() for p in group["params"]] for group in given]
    for layer in layers:
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, old in zip(given, before, strict=True):
        for p, was in zip(group["params"], old, strict=True):
            torch.testing.assert_close(p, was * (1 - 0.5 * group["lr"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("limit", "left"), [(2.0, 2.0), (20.0, 10.0)])
def test_a_gradient_is_clipped_and_its_norm_before_that_is_told(limit, left):
    """One of 6 and 8, over two parameters (1e-5)."""
    network = nn.Linear(1, 1)
    options = Options(optim=OptimOptions(max_grad_norm=limit))
    model = OptimizedModel(network, [{"params": list(network.parameters())}], options, True)
    network.weight.grad, network.bias.grad = torch.full((1, 1), 6.0), torch.full((1,), -8.0)
    clip = torch.nn.utils.clip_grad_norm_
    norm = model.clip_gradient(SimpleNamespace(device=torch.device("cpu"), clip_grad_norm_=clip))
    assert float(norm) == pytest.approx(10)
    clipped = torch.cat([network.weight.grad[0], network.bias.grad])
    torch.testing.assert_close(clipped, torch.tensor([0.6, -0.8]) * left, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bf16", [True, False])
def test_each_matrix_of_a_stack_is_orthogonalized(bf16):
    """Queries, keys and values with gradients a thousand times apart all move as far: by lr in
    each of 32 directions, times 0.7 to 1.2. As one matrix, the smallest would hardly move."""
    torch.manual_seed(0)
    qkv = torch.zeros(96, 32, requires_grad=True)
    sizes = torch.tensor([1e-3, 1.0, 1e-6])
    qkv.grad = torch.randn(96, 32) * sizes.repeat_interleave(32)[:, None]
    given = [{"params": [qkv], "lr": 0.01, "muon": [3]}]
    make_optimizer([{"params": [], "lr": 1.0}, *given], OptimOptions(), bf16).step()
    for matrix in qkv.detach().chunk(3):
        assert 0.7 < matrix.norm() / (0.01 * 32**0.5) < 1.2


def test_groups_know_what_each_parameter_is(layers):
    """Of an SCD: three matrices in qkv, one in the others; in the order in which the moments of
    runs from before this was known are saved."""
    model = SCD(channels=8, heads=1, encoder_layers=2, decoder_layers=1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimOptions(muon_lr=0.02, decoder_lr_scale=1.0))
    adamw, muon = ([names[p] for p in group["params"]] for group in groups)
    assert [groups[0]["muon"], len(muon)] == [[], len(groups[1]["muon"])]
    assert muon == [name for name in names.values() if name.endswith(tuple(MATRICES))]
    assert adamw == [name for name in names.values() if name not in muon]
    for name, count in zip(muon, groups[1]["muon"], strict=True):
        assert count == (3 if "qkv" in name else 1)


def test_schedule_and_saved_state_reach_both(layers):
    """What is saved, loaded into a new optimizer, goes on to the bit; a rate of 0 stops all."""
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


# Rates


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_the_warm_up_wastes_no_step(schedule):
    """Its steps take 1/4, 2/4, 3/4 and all of the rate."""
    options = OptimOptions(schedule=schedule, warmup_steps=4, decay_steps=3)
    assert [lr_multiplier(done, options, 20) for done in range(5)] == [0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_runs_past_their_warm_up_go_on_with_the_rates_they_had(schedule):
    """Those of diffusers' schedules, to the bit."""
    parameter = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=0.3)
    name = "cosine" if schedule == "cosine" else "constant_with_warmup"
    theirs = get_scheduler(name, sgd, num_warmup_steps=5, num_training_steps=37)
    options = OptimOptions(schedule=schedule, warmup_steps=5)
    for done in range(37):
        if done >= 5:
            assert theirs.get_last_lr()[0] == 0.3 * lr_multiplier(done, options, 37)
        sgd.step()
        theirs.step()


def test_wsd_is_stable_then_falls_as_one_minus_the_root():
    """And a longer run has the same rates until its own decay."""
    options = OptimOptions(schedule="wsd", warmup_steps=2, decay_steps=4, min_lr_ratio=0.1)
    rates = [lr_multiplier(done, options, 10) for done in range(11)]
    assert rates[:6] == [0.5, 1, 1, 1, 1, 1]
    fallen = [1 - (x / 4) ** 0.5 for x in range(5)]
    assert rates[6:] == pytest.approx([0.1 + 0.9 * share for share in fallen])
    assert [lr_multiplier(done, options, 20) for done in range(6)] == rates[:6]


def test_cosine_falls_to_its_minimum():
    options = OptimOptions(schedule="cosine", warmup_steps=2, min_lr_ratio=0.2)
    rates = [lr_multiplier(done, options, 12) for done in (2, 7, 12)]
    assert rates == pytest.approx([1, 0.6, 0.2])
