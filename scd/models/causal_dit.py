"""The dense baseline: every layer sees all past frames at every denoising step."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from diffusers import ModelMixin  # noqa: F401 (diffusers' pipelines look for it beside the class)
from diffusers.configuration_utils import register_to_config
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scd.models.attention import (
    clean_context_attention,
    clean_context_blocks,
    needs_blocks,
)
from scd.models.layers import (
    HEAD_DIM,
    Attend,
    Block,
    BlockModulation,
    Conditioning,
    Modulated,
    Modulations,
    OutputNorm,
    initialise,
    patchify,
    rotary_positions,
    unpatchify,
)
from scd.models.linear import Float32Linear
from scd.models.world_model import (
    CLEAN_TIMESTEP,
    Cache,
    VelocityField,
    WorldModel,
    check_condition,
    repeat_steps,
)


class CausalDiT(WorldModel):
    """A causal diffusion transformer, trained and rolled out under clean context.

    One stack of blocks runs over clean frames (timestep -1) and noisy ones alike. A clean frame
    sees itself and the clean frames before it; a noisy frame sees itself and the clean frames
    before it. In a rollout the keys and values of a finished frame are written by one more pass
    over it, now clean.

    Args: as `SCD`, with one number of `layers`.
    """

    noisy_places = 1

    @register_to_config
    def __init__(
        self,
        channels: int = 32,
        patch_size: int = 1,
        heads: int = 16,
        layers: int = 12,
        condition: str = "none",
        num_conditions: int = 0,
        first_frame: bool = False,
        modulate_output: bool = True,
        prediction: str = "velocity",
        sigma_min: float = 0.05,
    ):
        super().__init__()
        check_condition(condition, num_conditions)
        width = heads * HEAD_DIM
        self.gradient_checkpointing = False
        self.embed = nn.Linear(channels * patch_size**2, width)
        self.conditioning = Conditioning(width, num_conditions)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm_out = OutputNorm(width, modulate_output)
        self.unembed = Float32Linear(width, channels * patch_size**2)
        initialise(self)
        nn.init.zeros_(self.unembed.weight)

    @property
    def cached_layers(self) -> int:
        return self.config.layers

    def forward(
        self,
        latents: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Tensor | None,
        perturbation: Tensor | None = None,
    ) -> Tensor:
        """See `WorldModel.forward`: one sequence [clean ‖ noisy draw 1 ‖ … ‖ draw K]."""
        draws, first = noisy.shape[1], self.first_predicted
        clean = latents[:, :-1]  # the last frame is nobody's history
        count = clean.shape[1]
        frames = torch.cat([clean, rearrange(noisy, "b k f c h w -> b (k f) c h w")], dim=1)
        of_noisy = rearrange(timesteps, "b k f -> b (k f)")
        times = torch.cat(
            [torch.full_like(of_noisy[:, :1], CLEAN_TIMESTEP).expand(-1, count), of_noisy], 1
        )
        if conditions is not None:
            of_draws = repeat(conditions[:, first:], "b f ... -> b (k f) ...", k=draws)
            conditions = torch.cat([conditions[:, :-1], of_draws], dim=1)
        positions = torch.arange(count + 1, device=latents.device)
        positions = torch.cat([positions[:-1], *[positions[first:]] * draws])
        n = self.tokens_per_frame(*latents.shape[-2:])
        blocks = None
        if needs_blocks(tokens := frames.shape[1] * n, latents.device):
            blocks = clean_context_blocks(n, count, first, tokens, latents.device)
        attend = partial(
            clean_context_attention,
            tokens_per_frame=n,
            clean_frames=count,
            first=first,
            blocks=blocks,
        )
        e = self.conditioning(times, conditions)  # (B, all frames, D)
        depth = len(self.blocks)
        prediction = self._predict(frames, [e] * depth, e, positions, [attend] * depth)
        prediction = rearrange(prediction[:, count:], "b (k f) c h w -> b k f c h w", k=draws)
        return self._as_velocity(prediction, noisy, timesteps)

    def conditioned(self, conditions: Tensor, timesteps: Tensor) -> "DenseConditioned":
        """See `WorldModel.conditioned`."""
        clean = torch.full(conditions.shape[:1], CLEAN_TIMESTEP, device=conditions.device)
        times = timesteps.expand(len(conditions), -1)  # (R, T)
        return DenseConditioned(
            self._modulations(clean, conditions).values,
            self._modulations(times, repeat_steps(conditions, len(timesteps))).values,
            timesteps,
        )

    def take_in(
        self,
        latents: Tensor,
        own: Tensor,
        following: Tensor,
        cache: Cache,
        conditioned: "DenseConditioned",
    ) -> None:
        """See `WorldModel.take_in`; a clean frame has its own condition, not the following."""
        if latents.shape[1]:
            self._predict_cached(latents, Modulations(conditioned.clean[own]), cache)
            cache.advance(latents.shape[1])

    def next_frame(
        self,
        newest: Tensor,
        own: Tensor,
        following: Tensor,
        cache: Cache,
        conditioned: "DenseConditioned",
        perturbation: Tensor | None = None,
    ) -> VelocityField:
        """See `WorldModel.next_frame`: all layers run at every step.

        The noisy frame's keys and values lie where the clean frame's will be written.
        """
        self.take_in(newest, own, following, cache, conditioned)
        of_steps = conditioned.steps[following[:, 0]]  # (B, T, ...)
        timesteps = conditioned.timesteps

        def field(noisy: Tensor, step: int, /) -> Tensor:
            batch = len(noisy)
            of_step = Modulations(of_steps[:batch, step : step + 1])
            prediction = self._predict_cached(noisy, of_step, cache)
            return self._as_velocity(prediction, noisy, timesteps[step].expand(batch, 1))

        return field

    def _modulations(self, timesteps: Tensor, conditions: Tensor) -> Modulations:
        return Modulations.of(self.blocks, self.norm_out, self.conditioning(timesteps, conditions))

    def _predict_cached(
        self,
        frames: Tensor,
        modulations: Modulations,
        cache: Cache,
    ) -> Tensor:
        positions = torch.arange(frames.shape[1], device=frames.device) + cache.frames
        attends = [partial(cache.attend, layer) for layer in range(len(self.blocks))]
        return self._predict(frames, *modulations.by_layer(len(attends)), positions, attends)

    def _predict(
        self,
        frames: Tensor,
        of_blocks: Sequence[Tensor | BlockModulation],
        of_norm_out: Tensor | Modulated | None,
        positions: Tensor,
        attends: Sequence[Attend],
    ) -> Tensor:
        """The network: frames (B, F, C, H, W) at positions (F,) -> prediction, as the frames."""
        height, width = frames.shape[-2:]
        patch = self.config.patch_size
        rotary = rotary_positions(positions, height // patch, width // patch)
        x = self.embed(patchify(frames, patch).to(self.embed.weight.dtype))  # (B, F, N, D)
        if self.config.prediction == "data":  # it is divided by σ, which magnifies its rounding
            x = x.float()
        for block, e, attend in zip(self.blocks, of_blocks, attends, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, e, rotary, attend, use_reentrant=False)
            else:
                x = block(x, e, rotary, attend)
        x = self.unembed(self.norm_out(x.float(), of_norm_out))  # (B, F, N, C·p·p)
        return unpatchify(x, patch, height, width)


class DenseConditioned(NamedTuple):
    """See `WorldModel.conditioned`; values of `Modulations`, T timesteps."""

    clean: Tensor  # (R, ...)
    steps: Tensor  # (R, T, ...)
    timesteps: Tensor
