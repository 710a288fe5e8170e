"""Clips of a student, generated as in use, and computed once more with a gradient.

A rollout has no gradient. It records the noisy input of every frame at the denoising step where it
stopped; one parallel pass of the student over the finished clip, which is its ordinary training
forward, gives the same frames with a gradient, also through the generated history (arXiv
2607.20368). In an SCD, writing the history and denoising have parameters of their own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scd.distill.teacher import clean_frames
from scd.flow.sampler import noise_levels
from scd.models.world_model import MAX_TIMESTEP, CausalWorldModel, FirstLook
from scd.options import RolloutOptions
from scd.rollout import Rollout
from scd.utils.precision import without_autocast
from scd.utils.sharding import unsharded


class Generated(NamedTuple):
    """What a student generated after its context, and what every frame was made from."""

    frames: Tensor  # (B, F', C, H, W)
    history: Tensor  # (B, K + F', C, H, W): the clip whose earlier frames each frame saw
    noisy: Tensor  # (B, F', C, H, W): the last noisy input
    timesteps: Tensor  # (B, F')
    first_look: FirstLook | None = None  # what the student's encoder saw of them, if it does


@torch.no_grad()
def roll_out(
    model: CausalWorldModel,
    settings: RolloutOptions,
    context: Tensor,
    new_frames: int,
    exit_at: float,
    actions: Tensor | None,
    labels: Tensor | None,
    generators: list[torch.Generator],
    text: Tensor | None = None,
) -> Generated:
    """Continue videos as in use, but leave every frame's denoising after one of its steps.

    Args:
        settings: of the student's rollouts, with the consistency solver.
        context: (B, K, C, H, W).
        exit_at: the step, as a share of the frame's steps in [0, 1): the first new frame may have
            more steps than the others.
        actions: (B, K + new_frames) or (B, K + new_frames, V).
        labels: (B,).
        generators: one for each sample.
        text: (B, T, text_dim), for a student that `has_text`.
    """
    known = context.shape[1]
    with without_autocast(context.device), unsharded(model):
        rollout = Rollout(model, settings, known + new_frames)
        past = None if actions is None else actions[:, :known]
        rollout.reset(context, past, labels, generators, text)
        exits = []
        for frame in range(known, known + new_frames):
            action = None if actions is None else actions[:, frame]
            steps = settings.steps
            if frame == known and settings.first_frame_steps:
                steps = settings.first_frame_steps
            exits.append(rollout.step_to_exit(int(exit_at * steps), action))
    generated = torch.stack([each.frame for each in exits], dim=1)
    timesteps = MAX_TIMESTEP * torch.tensor([each.sigma for each in exits], device=context.device)
    looks = [each.first_look for each in exits if each.first_look is not None]
    return Generated(
        generated,
        torch.cat([context, generated], dim=1),
        torch.stack([each.noisy for each in exits], dim=1),
        timesteps.expand(len(context), -1),
        FirstLook.pure(torch.stack(looks, dim=1)) if looks else None,
    )


@torch.no_grad()
def teacher_forced(
    model: CausalWorldModel,
    settings: RolloutOptions,
    clip: Tensor,
    known: int,
    exit_at: float,
    conditions: Tensor | None,
    generators: list[torch.Generator],
    text: Tensor | None = None,
) -> Generated:
    """Generate every frame after `known` from real ones: its history, and itself under noise.

    The arguments are those of `roll_out`, with whole clips (B, K + F', C, H, W).
    """
    real = clip[:, known:]
    levels = noise_levels(settings.steps, settings.spacing, settings.shift)
    level = levels[int(exit_at * settings.steps)]
    noise, look = (
        torch.stack([torch.randn(real.shape[1:], generator=g) for g in generators]).to(real)
        for _ in range(2)
    )
    noisy = level * settings.temperature * noise + (1 - level) * real
    times = torch.full(real.shape[:2], MAX_TIMESTEP * level, device=real.device)
    first_look = FirstLook.pure(look) if model.takes_first_look else None
    generated = Generated(real, clip, noisy, times, first_look)
    generated = generated._replace(frames=replay(model, generated, conditions, text=text))
    # Before pytorch's #165068, autocast kept the weights that it had cast without gradients.
    torch.clear_autocast_cache()
    return generated


def replay(
    model: CausalWorldModel,
    generated: Generated,
    conditions: Tensor | None,
    history_gradient: bool = True,
    text: Tensor | None = None,
) -> Tensor:
    """Compute generated frames (B, F', C, H, W) once more, in parallel and with gradient.

    Args:
        conditions, text: of the whole clip.
        history_gradient: see `WorldModel.forward`.
    """
    noisy, times = generated.noisy[:, None], generated.timesteps[:, None]
    velocity = model(
        generated.history,
        noisy,
        times,
        conditions,
        history_gradient=history_gradient,
        first_look=generated.first_look,
        text=text,
    )  # (B, 1, F', C, H, W)
    return clean_frames(noisy, velocity, times)[:, 0]  # (B, F', C, H, W)
