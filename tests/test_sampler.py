"""Noise levels and solvers."""

import math

import pytest
import torch

from scd.flow.sampler import integrate, noise_levels


def test_noise_levels():
    assert noise_levels(4) == pytest.approx([1, 0.667, 0.334, 0.001, 0], abs=1e-6)
    assert noise_levels(1) == pytest.approx([1, 0])
    assert noise_levels(4, "even") == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-6)
    shifted = [3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25, 0)]
    assert noise_levels(4, "even", 3.0) == pytest.approx(shifted, abs=1e-6)
    shifted = [3 * s / (1 + 2 * s) for s in (1, 0.667, 0.334, 0.001, 0)]
    assert noise_levels(4, shift=3.0) == pytest.approx(shifted, abs=1e-6)
    assert noise_levels(1, "even", 2.0) == pytest.approx([1, 0])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("multistep", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_the_solvers(solver, order, shift):
    """Halving the steps divides the error of dx/ds = x by 2 to the order; x(0) = x(1)/e."""

    def error(steps):
        levels = noise_levels(steps, "even", shift)
        end = integrate(lambda x, step: x, torch.ones(1, dtype=torch.float64), levels, solver)
        return abs(float(end) - 1 / math.e)

    assert error(64) / error(128) == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("solver", ["euler", "multistep"])
def test_straight_paths_need_one_step(solver):
    """A constant velocity is integrated exactly, and asked for once a step."""
    steps = []

    def velocity(x, step):
        steps.append(step)
        return torch.full_like(x, 2.0)

    end = integrate(velocity, torch.ones(3), noise_levels(5, "even"), solver)
    assert torch.allclose(end, torch.full((3,), -1.0)) and steps == list(range(5))
