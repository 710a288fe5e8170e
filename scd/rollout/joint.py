"""Generate all new frames of a clip at once, with a bidirectional model."""

import torch
from torch import Tensor

from scd.errors import ScdError
from scd.flow.sampler import Generators, frame_noise, guide, integrate, noise_levels
from scd.models.world_model import MAX_TIMESTEP, WorldModel
from scd.options import RolloutOptions, check_rollout
from scd.utils.precision import float32_products, precision_for, with_weights_in


@torch.no_grad()
def denoise_jointly(
    model: WorldModel,
    settings: RolloutOptions,
    context: Tensor,
    num_frames: int,
    actions: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    generator: Generators = None,
) -> Tensor:
    """Continue videos by `num_frames` frames, which are denoised together.

    Args and returns as `scd.rollout.continue_videos`; every frame takes its noise from the
    generator in turn, as in a rollout.

    Raises:
        ScdError: settings that the model cannot follow, or no context.
    """
    check_rollout(settings)
    if settings.guidance == "context" and settings.guidance_scale != 1.0:
        raise ScdError("a bidirectional model has no separate context to perturb")
    if settings.first_frame_steps:
        raise ScdError("a bidirectional model denoises all frames at once: first_frame_steps is 0")
    batch, known = context.shape[:2]
    first = model.first_predicted
    if known < first:
        raise ScdError("a bidirectional model needs at least one context frame")
    precision = precision_for(model, settings.precision)
    model = with_weights_in(model, precision)
    conditions = model.frame_conditions((batch, known + num_frames), actions, labels)
    model.check_conditions(conditions)
    conditions = None if conditions is None else conditions.to(model.device)
    guided = settings.guidance == "condition" and settings.guidance_scale != 1.0
    if guided:
        if conditions is None:
            raise ScdError("condition guidance needs a model with a condition")
        conditions = torch.cat([conditions, model.null_conditions(conditions.shape[:2])])
    shape, steps = (batch, *context.shape[2:]), settings.steps
    solver, temperature = settings.solver, settings.temperature
    noises = [
        frame_noise(shape, steps, solver, temperature, generator, model.device, initial)
        for initial in ([None] * num_frames if noise is None else noise.unbind(dim=1))
    ]
    start, *fresh = torch.stack(noises, dim=2).unbind(dim=1)  # (B, num_frames, C, H, W) each
    context = context.to(model.device)
    clip = torch.cat([context, torch.zeros_like(start).to(context)], dim=1)  # (B, F, C, H, W)
    levels = noise_levels(steps, settings.spacing, settings.shift)

    def velocity(x: Tensor, step: int) -> Tensor:
        """Predict the velocities of the new frames (B, num_frames, C, H, W)."""
        lowest, highest = settings.guidance_interval
        copies = 2 if guided and lowest <= levels[step] <= highest else 1
        times = torch.full((batch, 1, num_frames), levels[step] * MAX_TIMESTEP, device=x.device)
        parts = (torch.cat([part] * copies) for part in (clip, x[:, None], times))
        given = None if conditions is None else conditions[: copies * batch]
        velocities = model(*parts, given)[:, 0]  # (copies·B, num_frames, C, H, W)
        if copies == 1:
            return velocities
        positive, negative = velocities.chunk(2)
        return guide(positive, negative, settings.guidance_scale)

    with float32_products(precision):
        return integrate(velocity, start, levels, solver, fresh)
