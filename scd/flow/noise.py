"""All randomness of a training step, drawn clip by clip as a function of the clip's number."""

from typing import NamedTuple

import torch
from torch import Tensor

from scd.models.world_model import MAX_TIMESTEP, FirstLook
from scd.options import FlowOptions
from scd.utils.seeding import normal_per_sample, uniform_per_sample

LOOK_RANGE = 0.2  # a first look has a noise level in the highest part of 0..1 (arXiv 2602.10095)


class FlowDraws(NamedTuple):
    """The random numbers of a training step, for B clips of F frames and K draws."""

    level: Tensor  # (B, K, F), normal: the logit of the noise level before mean and spread
    noise: Tensor  # (B, K, F, C, H, W), ε
    context_noise: Tensor | None  # (B, F, N, D), ζ
    drop_condition: Tensor  # (B,), bool
    clean_frame: Tensor  # (B, F), bool: frames the mixed encoder input leaves clean
    history_noise: Tensor  # (B,), σ of the noise in the history
    prefix: Tensor  # (B, K), in [0, 1): where in its range the number of given frames lies
    look_level: Tensor  # (B, F), σ of the first looks, above 0.8 and at most 1
    look_noise: Tensor | None  # (B, F, C, H, W), in the first looks

    def first_look(self, latents: Tensor, first: int) -> FirstLook | None:
        """Noise the frames from `first` on, (B, F, C, H, W), as an encoder sees them in training.

        None where nothing was drawn for it.
        """
        if self.look_noise is None:
            return None
        sigma = self.look_level[:, first:, None, None, None]
        noisy = sigma * self.look_noise[:, first:] + (1 - sigma) * latents[:, first:]
        return FirstLook(noisy, MAX_TIMESTEP * self.look_level[:, first:])

    def pure_look(self, first: int) -> FirstLook | None:
        """Look at the frames from `first` on as in a rollout; None where nothing was drawn."""
        return None if self.look_noise is None else FirstLook.pure(self.look_noise[:, first:])


def draw_noise(
    options: FlowOptions,
    seed: int,
    samples: list[int],
    latents: Tensor,
    context_shape: tuple[int, int] | None,
    looks: bool = False,
) -> FlowDraws:
    """Draw the random numbers of clips (B, F, C, H, W) with the given sample numbers.

    Args:
        context_shape: tokens in a frame and width, (N, D); None: no context is perturbed. Its
            noise is by far the largest draw.
        looks: whether an encoder sees the frames to predict.
    """
    frames, picture = latents.shape[1], tuple(latents.shape[2:])
    k = options.noise_draws
    where = latents.device
    dropout = options.condition_dropout
    mixed, history_noise = options.encoder_input == "mixed", options.history_noise_max

    def normal(stream: str, *shape: int) -> Tensor:
        return normal_per_sample(shape, samples, where, seed, stream)

    def uniform(stream: str, *shape: int, used: bool = True) -> Tensor:
        if not used:  # each draw makes a generator for every clip
            return torch.zeros(len(samples), *shape, device=where)
        return uniform_per_sample(shape, samples, where, seed, stream)

    return FlowDraws(
        level=normal("level", k, frames),
        noise=normal("noise", k, frames, *picture),
        context_noise=None if context_shape is None else normal("context", frames, *context_shape),
        drop_condition=uniform("drop", 1, used=dropout > 0)[:, 0] < dropout,
        clean_frame=uniform("clean", frames, used=mixed) < options.clean_fraction,
        history_noise=history_noise * uniform("history", 1, used=history_noise > 0)[:, 0],
        prefix=uniform("prefix", k),
        look_level=1 - LOOK_RANGE * uniform("look level", frames, used=looks),
        look_noise=normal("look", frames, *picture) if looks else None,
    )
