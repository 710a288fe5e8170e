"""From noise to a frame: noise levels, solvers of dx/dσ = v(x, σ), and guidance."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

Generators = torch.Generator | list[torch.Generator] | None
"""One for a batch, or one for each of its samples."""


def noise_levels(num_steps: int, spacing: str = "diffusers", shift: float = 1.0) -> list[float]:
    """List the T + 1 noise levels between T steps, from 1 to 0.

    Args:
        spacing: `diffusers`: T levels evenly from 1 down to 0.001, then 0, so that the last of the
            T steps does next to nothing; `even`: T steps of equal size.
        shift: s in σ -> s·σ / (1 + (s - 1)·σ); more than 1 takes smaller steps where there is much
            noise (arXiv 2403.03206, section 5.3.2).
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    lowest = 1 / num_steps if spacing == "even" else 0.001
    scheduler.set_timesteps(sigmas=np.linspace(1, lowest, num_steps).tolist())
    return [float(sigma) for sigma in scheduler.sigmas]


def integrate(
    velocity: Callable[[Tensor, int], Tensor], noise: Tensor, levels: list[float], solver: str
) -> Tensor:
    """Solve dx/dσ = v(x, σ) from σ = levels[0] to levels[-1]; `velocity` takes step numbers.

    Args:
        solver: `euler`, of first order, or `multistep`, of second order (Adams and Bashforth's of
            two steps: it extends the line through this velocity and the last). Either takes one
            velocity a step.
    """
    x = noise
    last: Tensor | None = None
    last_size = 0.0
    for step, (sigma, following) in enumerate(pairwise(levels)):
        v, size = velocity(x, step), following - sigma
        if solver == "multistep" and last is not None:
            x = x + size * (v + size / (2 * last_size) * (v - last))
        else:
            x = x + size * v
        last, last_size = v, size
    return x


def guide(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Guide velocities: v = v⁻ + w·(v⁺ − v⁻)."""
    return negative + scale * (positive - negative)
