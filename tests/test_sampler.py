"""Noise levels and solvers."""

import math

import pytest
import torch
from diffusers import FlowMatchLCMScheduler

from scd.flow.sampler import frame_noise, integrate, noise_levels


def test_noise_levels():
    assert noise_levels(4) == pytest.approx([1, 0.667, 0.334, 0.001, 0], abs=1e-6)
    assert noise_levels(1) == pytest.approx([1, 0])
    assert noise_levels(4, "even") == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-6)
    shifted = [3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25, 0)]
    assert noise_levels(4, "even", 3.0) == pytest.approx(shifted, abs=1e-6)
    shifted = [3 * s / (1 + 2 * s) for s in (1, 0.667, 0.334, 0.001, 0)]
    assert noise_levels(4, shift=3.0) == pytest.approx(shifted, abs=1e-6)
    assert noise_levels(1, "even", 2.0) == pytest.approx([1, 0])
    # Self-Forcing's list (arXiv 2506.08009).
    few = [1, 0.9375, 5 / 6, 0.625, 0]
    assert noise_levels(4, "even", 5.0) == pytest.approx(few, abs=1e-6)


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


def test_consistency_is_diffusers_sampler_of_distilled_models():
    """Against its scheduler, with one frame of noise a step from a generator of the same seed."""
    levels = noise_levels(4, "even", 5.0)

    def velocity(x, step):
        return torch.tanh(3 * x) + levels[step]

    noise = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchLCMScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    expected, seed = noise, torch.Generator().manual_seed(1)
    for step, timestep in enumerate(scheduler.timesteps):
        v = velocity(expected, step)
        expected = scheduler.step(v, timestep, expected, generator=seed, return_dict=False)[0]
    seed = torch.Generator().manual_seed(1)
    fresh = [torch.randn(noise.shape, generator=seed) for _ in range(3)]
    found = integrate(velocity, noise, levels, "consistency", fresh)
    assert (found - expected).abs().max() < 1e-5


def test_consistency_up_to_a_level_ends_in_noise_of_that_level():
    """x̂ is where the velocity of a single clean frame points to; the rest is the fresh noise."""
    clean, levels = torch.full((1,), 3.0), [1.0, 0.8, 0.5, 0.0]
    noise, *fresh = torch.randn(3, 1, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2):
        end = integrate(
            lambda x, step: (x - clean) / levels[step],
            noise,
            levels[: steps + 1],
            "consistency",
            fresh,
        )
        sigma = levels[steps]
        assert torch.allclose(end, (1 - sigma) * clean + sigma * fresh[steps - 1])


@pytest.mark.parametrize(("solver", "fresh"), [("euler", 0), ("multistep", 0), ("consistency", 3)])
def test_noise_that_a_frame_takes(solver, fresh):
    """Drawn in one order, by each sample's own generator; nothing that is not needed."""
    shape, device = (2, 3, 4, 4), torch.device("cpu")

    def seeds():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    used, plain = seeds(), seeds()
    noise = frame_noise(shape, 4, solver, 1.0, used, device)
    assert noise.shape == (2, 1 + fresh, 3, 4, 4)
    for sample, generator in enumerate(plain):
        initial = torch.randn(1, 3, 4, 4, generator=generator)
        rest = torch.randn(1, fresh, 3, 4, 4, generator=generator)
        assert torch.equal(noise[sample], torch.cat([initial[:, None], rest], dim=1)[0])
        assert torch.equal(generator.get_state(), used[sample].get_state())
    given = frame_noise(shape, 4, solver, 0.5, seeds(), device, noise[:, 0])
    assert torch.equal(given[:, 0], noise[:, 0])
    drawn = torch.randn(1, fresh, 3, 4, 4, generator=seeds()[1])
    assert torch.equal(given[1:, 1:], 0.5 * drawn)
    assert torch.equal(frame_noise(shape, 4, solver, 0.5, seeds(), device), 0.5 * noise)
