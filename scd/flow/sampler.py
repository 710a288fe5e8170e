"""From noise to a frame: noise levels, noise, solvers of dx/dσ = v(x, σ), and guidance."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from scd.errors import ScdError

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


def frame_noise(
    shape: tuple[int, ...],
    num_steps: int,
    solver: str,
    temperature: float,
    generator: Generators,
    device: torch.device,
    initial: Tensor | None = None,
) -> Tensor:
    """Draw all noise that the steps of a frame take, (B, 1 + fresh, C, H, W), the initial first.

    Args:
        shape: (B, C, H, W), of the frame.
        solver: `consistency` takes fresh noise at every step but the last, the others none.
        temperature: standard deviation of what is drawn.
        initial: (B, C, H, W), instead of drawing it.

    Raises:
        ScdError: initial noise of another shape, or another number of generators than samples.
    """
    if isinstance(generator, list) and len(generator) not in (1, shape[0]):
        raise ScdError(f"{len(generator)} generators for {shape[0]} samples")
    if initial is not None and tuple(initial.shape) != tuple(shape):
        raise ScdError(f"noise has shape {tuple(initial.shape)}, expected {tuple(shape)}")
    if initial is None:
        initial = temperature * randn_tensor(shape, generator, device)
    noise = initial.to(device, torch.float32)[:, None]
    if solver != "consistency":
        return noise
    fresh = randn_tensor((shape[0], num_steps - 1, *shape[1:]), generator, device)
    return torch.cat([noise, temperature * fresh], dim=1)


def integrate(
    velocity: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    levels: list[float],
    solver: str,
    fresh: Sequence[Tensor] = (),
) -> Tensor:
    """Solve dx/dσ = v(x, σ) from σ = levels[0] to levels[-1]; `velocity` takes step numbers.

    Args:
        solver: takes one velocity a step. `euler` is of first order, `multistep` of second (Adams
            and Bashforth's of two steps: it extends the line through this velocity and the last).
            `consistency` is for models that were distilled to few steps: it jumps to the end,
            x̂ = x - σ·v, and back to the next level, (1 - σ')·x̂ + σ'·ε (arXiv 2303.01469,
            algorithm 1).
        fresh: ε of `consistency`, as `noise`, for every step that does not end at 0.
    """
    x = noise
    last: Tensor | None = None
    last_size = 0.0
    for step, (sigma, following) in enumerate(pairwise(levels)):
        v, size = velocity(x, step), following - sigma
        if solver == "consistency":
            x = x - sigma * v
            if following > 0:
                x = (1 - following) * x + following * fresh[step]
        elif solver == "multistep" and last is not None:
            x = x + size * (v + size / (2 * last_size) * (v - last))
        else:
            x = x + size * v
        last, last_size = v, size
    return x


def guide(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Guide velocities: v = v⁻ + w·(v⁺ − v⁻)."""
    return negative + scale * (positive - negative)
