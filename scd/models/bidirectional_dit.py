"""The bidirectional model: every frame sees every other, so a clip is denoised as a whole.

It cannot be streamed. It is what a causal student is distilled from.
"""

import torch
from diffusers import ModelMixin  # noqa: F401 (diffusers' pipelines look for it beside the class)
from einops import rearrange, repeat
from torch import Tensor

from scd.models.attention import full_attention
from scd.models.dit import DiT
from scd.models.world_model import CLEAN_TIMESTEP, FirstLook


class BidirectionalDiT(DiT):
    """A diffusion transformer with full attention among the clean and noisy frames of a clip.

    Frames before the noisy ones, and those whose timestep is -1, are given; the others are denoised
    together. Parameters and names are those of `CausalDiT`.

    Args: as `SCD`, with one number of `layers`.
    """

    def forward(
        self,
        latents: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Tensor | None,
        *,
        perturbation: Tensor | None = None,
        history_gradient: bool = True,
        first_look: FirstLook | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        """Predict velocities of K draws of a clip, each a sequence of its own.

        Args: as `WorldModel.forward`; where a timestep is -1, the frame of `latents` is seen.

        Returns:
            (B, K, F', C, H, W); of given frames, without meaning.
        """
        self.refuse_unused(perturbation, first_look, text)
        draws, first = noisy.shape[1], latents.shape[1] - noisy.shape[2]
        clean = repeat(latents, "b f c h w -> (b k) f c h w", k=draws)  # (B·K, F, C, H, W)
        noisy = rearrange(noisy, "b k f c h w -> (b k) f c h w")  # (B·K, F', C, H, W)
        times = rearrange(timesteps, "b k f -> (b k) f")  # (B·K, F')
        given = (times == CLEAN_TIMESTEP)[..., None, None, None]  # (B·K, F', 1, 1, 1)
        frames = torch.cat(
            [clean[:, :first], torch.where(given, clean[:, first:], noisy)], dim=1
        )  # (B·K, F, C, H, W)
        start = times.new_full((len(times), first), CLEAN_TIMESTEP)  # (B·K, F - F')
        if conditions is not None:
            conditions = repeat(conditions, "b f ... -> (b k) f ...", k=draws)  # (B·K, F, ...)
        e = self.conditioning(torch.cat([start, times], dim=1), conditions)  # (B·K, F, D)
        positions = torch.arange(frames.shape[1], device=frames.device)
        attends = [full_attention] * len(self.blocks)
        x = self._predict(frames, e, positions, attends)  # (B·K, F, C, H, W)
        velocity = self.as_velocity(x[:, first:], noisy, times)  # (B·K, F', C, H, W)
        return rearrange(velocity, "(b k) f c h w -> b k f c h w", k=draws)
