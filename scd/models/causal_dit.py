"""The dense baseline: every layer sees all past frames at every denoising step."""

from functools import partial

import torch
from diffusers import ModelMixin  # noqa: F401 (diffusers' pipelines look for it beside the class)
from torch import Tensor

from scd.models.dit import DiT
from scd.models.layers import precompute_modulation
from scd.models.teacher_forcing import clean_and_noisy
from scd.models.world_model import (
    CLEAN_TIMESTEP,
    Cache,
    CausalWorldModel,
    FirstLook,
    FrameDenoiser,
    PrecomputedModulation,
    repeat_steps,
)


class CausalDiT(DiT, CausalWorldModel):
    """A causal diffusion transformer, trained and rolled out under clean context.

    One stack of blocks runs over clean frames (timestep -1) and noisy ones alike. A clean frame
    sees itself and the clean frames before it; a noisy frame sees itself and the clean frames
    before it. In a rollout the keys and values of a finished frame are written by one more pass
    over it, now clean.

    Args: as `SCD`, with one number of `layers`.
    """

    noisy_slots = 1

    @property
    def cached_layers(self) -> int:
        return self.config.layers

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
        """Predict velocities from one sequence [clean ‖ noisy draw 1 ‖ … ‖ noisy draw K]."""
        self.refuse_unused(perturbation, first_look, text)
        clean = latents[:, :-1]  # (B, F - 1, C, H, W): no frame follows the last
        n = self.tokens_per_frame(*latents.shape[-2:])
        sequence = clean_and_noisy(clean, noisy, timesteps, conditions, n, history_gradient)
        e = self.conditioning(sequence.timesteps, sequence.conditions)  # (B, F - 1 + K·F', D)
        attends = [sequence.attend] * len(self.blocks)
        prediction = self._predict(sequence.frames, e, sequence.positions, attends)
        prediction = prediction[:, clean.shape[1] :].unflatten(1, noisy.shape[1:3])
        return self.as_velocity(prediction, noisy, timesteps)  # (B, K, F', C, H, W)

    def precompute_modulation(self, conditions: Tensor, timesteps: Tensor) -> PrecomputedModulation:
        """Modulate clean frames and every denoising step under all conditions."""
        times = torch.full(conditions.shape[:1], CLEAN_TIMESTEP, device=conditions.device)  # (R,)
        layers = [*self.blocks, self.norm_out]
        clean = precompute_modulation(layers, self.conditioning(times, conditions))
        times = timesteps.expand(len(conditions), -1)  # (R, T)
        e = self.conditioning(times, repeat_steps(conditions, len(timesteps)))  # (R, T, D)
        return PrecomputedModulation(clean, precompute_modulation(layers, e), timesteps)

    def prefill(
        self,
        latents: Tensor,
        condition_ids: Tensor,
        next_condition_ids: Tensor,
        cache: Cache,
        modulation: PrecomputedModulation,
    ) -> None:
        """Run clean frames through all layers, each under its own condition, into the cache."""
        if latents.shape[1]:
            self._predict_cached(latents, modulation.clean[condition_ids], cache)
            cache.advance(latents.shape[1])

    def begin_frame(
        self,
        newest: Tensor,
        condition_ids: Tensor,
        next_condition_ids: Tensor,
        cache: Cache,
        modulation: PrecomputedModulation,
        perturbation: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> FrameDenoiser:
        """Prefill the newest frame; all layers then run at every denoising step of the next.

        The noisy frame's keys and values lie where the clean frame's will be written.
        """
        self.prefill(newest, condition_ids, next_condition_ids, cache, modulation)
        inputs = (modulation.noisy[next_condition_ids[:, 0]],)  # (B, T, 6·L + 2, D)
        velocity = partial(self._step_velocity, cache, modulation.timesteps)
        return FrameDenoiser(velocity, inputs, capturable=False)

    def _step_velocity(
        self, cache: Cache, timesteps: Tensor, noisy: Tensor, step: int, modulation: Tensor
    ) -> Tensor:
        """Predict a step's velocities for the first of a batch's frames; see `FrameDenoiser`."""
        batch = len(noisy)
        modulation = modulation[:batch, step : step + 1]  # (B, 1, 6·L + 2, D)
        prediction = self._predict_cached(noisy, modulation, cache)  # (B, 1, C, H, W)
        return self.as_velocity(prediction, noisy, timesteps[step].expand(batch, 1))

    def _predict_cached(self, frames: Tensor, modulation: Tensor, cache: Cache) -> Tensor:
        """Predict frames (B, F, C, H, W) that follow those in the cache, and write their keys."""
        positions = torch.arange(frames.shape[1], device=frames.device) + cache.frames
        attends = [partial(cache.attend, layer) for layer in range(len(self.blocks))]
        return self._predict(frames, modulation, positions, attends)
