"""From noise to a frame: Euler steps along the velocity, and guidance."""

from collections.abc import Callable
from itertools import pairwise

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


def noise_levels(num_steps: int) -> list[float]:
    """The T noise levels of a rollout, evenly from 1 down to 0.001, then 0."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(num_steps)
    return [float(sigma) for sigma in scheduler.sigmas]


def euler(velocity: Callable[[Tensor, int], Tensor], noise: Tensor, levels: list[float]) -> Tensor:
    """Integrate dx/dσ = v(x, σ) from σ = levels[0] to levels[-1]; `velocity` takes step numbers."""
    x = noise
    for step, (sigma, following) in enumerate(pairwise(levels)):
        x = x + (following - sigma) * velocity(x, step)
    return x


def guide(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """v = v⁻ + w·(v⁺ − v⁻)."""
    return negative + scale * (positive - negative)
