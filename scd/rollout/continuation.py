"""Continue videos by a number of frames: one after another, or jointly, as the model does."""

import torch
from torch import Tensor

from scd.errors import ScdError
from scd.flow.sampler import Generators
from scd.models.world_model import CausalWorldModel, WorldModel
from scd.options import Guidance, RolloutOptions
from scd.rollout.engine import Rollout
from scd.rollout.joint import denoise_jointly


def generate(
    model: WorldModel,
    context: Tensor,
    *,
    actions: Tensor | None = None,
    labels: Tensor | None = None,
    num_frames: int,
    num_steps: int,
    guidance_scale: float = 1.0,
    guidance: Guidance = "context",
    noise: Tensor | None = None,
    generator: Generators = None,
) -> Tensor:
    """Continue videos with the default settings, but without guidance unless its scale is given.

    See `continue_videos`, which takes all settings of `scd.options.RolloutOptions`.
    """
    settings = RolloutOptions(num_steps, guidance=guidance, guidance_scale=guidance_scale)
    return continue_videos(
        model, settings, context, num_frames, actions, labels, noise=noise, generator=generator
    )


def continue_videos(
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
    """Continue videos by `num_frames` frames: one after another, or jointly, as the model does.

    Args:
        context: latents (B, K, C, H, W) of the context frames; see `Rollout.reset` for K = 0.
        actions: (B, K + num_frames) or (B, K + num_frames, V), of the context and the new frames.
        labels: (B,).
        noise: (B, num_frames, C, H, W), initial noise of the new frames.

    Returns:
        The new frames, (B, num_frames, C, H, W).

    Raises:
        ScdError: shapes that do not fit together.
    """
    known = context.shape[1]
    if num_frames < 1:
        raise ScdError(f"num_frames is {num_frames}: at least one frame is generated")
    expected = model.actions_shape(context.shape[0], known + num_frames)
    if actions is not None and tuple(actions.shape) != expected:
        raise ScdError(
            f"actions are {tuple(actions.shape)}, expected {expected}: one a context frame and one "
            f"a new frame"
        )
    if noise is not None and noise.shape[:2] != (context.shape[0], num_frames):
        raise ScdError(f"noise is {tuple(noise.shape)}, expected (batch, {num_frames}, C, H, W)")
    if not isinstance(model, CausalWorldModel):
        return denoise_jointly(
            model, settings, context, num_frames, actions, labels, noise=noise, generator=generator
        )
    rollout = Rollout(model, settings, known + num_frames)
    rollout.reset(context, None if actions is None else actions[:, :known], labels, generator)
    frames = [
        rollout.step(
            None if actions is None else actions[:, known + i],
            None if noise is None else noise[:, i],
        )
        for i in range(num_frames)
    ]
    return torch.stack(frames, dim=1)
