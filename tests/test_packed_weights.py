"""Packed weights against plain products."""

import pytest
import torch

from scd.models.cpu import Linear, PackedWeights
from scd.utils.precision import has_bf16


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return torch.nn.Sequential(Linear(96, 160))


EMULATED = not has_bf16(torch.device("cpu"))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-5),
        pytest.param(
            torch.bfloat16,
            0.02,
            marks=pytest.mark.skipif(EMULATED, reason="this processor only emulates bf16"),
        ),
    ],
)
@pytest.mark.parametrize("gelu", [False, True])
@torch.no_grad()
def test_packed_equals_plain(layer, dtype, tolerance, gelu):
    layer = layer.to(dtype)[0]
    for rows in (1, 16, 300):
        x = torch.randn(2, rows, 96).to(dtype)
        expected = layer(x, gelu)
        with PackedWeights(layer).in_use():
            packed = layer(x, gelu)
        assert packed.dtype == dtype and packed.shape == (2, rows, 160)
        assert (packed - expected).abs().max() <= tolerance
        reference = torch.nn.functional.linear(x, layer.weight, layer.bias)
        if gelu:
            reference = torch.nn.functional.gelu(reference, approximate="tanh")
        assert torch.equal(expected, reference)


@torch.no_grad()
def test_packed_weights_are_those_of_their_time(layer):
    x = torch.randn(4, 96)
    old = layer(x)
    packed = PackedWeights(layer)
    layer[0].weight.data.zero_()
    with packed.in_use():
        assert (layer(x) - old).abs().max() < 1e-5
    assert torch.equal(layer(x), layer[0].bias.expand(4, -1))
    with PackedWeights(layer).in_use():
        assert torch.equal(layer(x), layer[0].bias.expand(4, -1))


def test_training_and_other_types_are_left_alone(layer):
    x = torch.randn(4, 96)
    with PackedWeights(layer).in_use():
        layer(x).sum().backward()  # a packed product has no gradient
        layer.double()
        with torch.no_grad():
            expected = torch.nn.functional.linear(x.double(), layer[0].weight, layer[0].bias)
            assert torch.equal(layer(x.double()), expected)
    assert layer[0].weight.grad is not None
