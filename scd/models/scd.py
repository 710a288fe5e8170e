"""Separable Causal Diffusion: the causal encoder and the frame decoder composed."""

from functools import partial

import torch
from diffusers import ModelMixin  # noqa: F401 (diffusers' pipelines look for it beside the class)
from diffusers.configuration_utils import register_to_config
from einops import rearrange, repeat
from torch import Tensor

from scd.errors import ScdError
from scd.models.config import check_config
from scd.models.decoder import FrameDecoder
from scd.models.encoder import CausalEncoder
from scd.models.layers import HEAD_DIM
from scd.models.world_model import (
    MAX_TIMESTEP,
    Cache,
    CausalWorldModel,
    FirstLook,
    FrameDenoiser,
    PrecomputedModulation,
    repeat_steps,
)


class SCD(CausalWorldModel):
    """A causal video diffusion model that runs its deep part once per frame (arXiv 2602.10095).

    Args:
        channels: of the latents (3 in pixel space).
        patch_size: height and width of a token's patch, in latent pixels.
        heads: attention heads of width 64; the model's width D is 64 * heads.
        fusion: see `FrameDecoder`.
        condition: `none`, `action` (one of several a frame), `action_vector` (several numbers a
            frame: keys that are held, a mouse's way) or `label` (one a clip).
        num_conditions: number of actions, of a vector's components (V) or of classes.
        first_frame: also predict frame 0 (not in the paper): with `shift` from a learned start
            before it, otherwise from the first look at it alone.
        modulate_context, modulate_output: whether the output norms of encoder and decoder are
            modulated by the conditioning vector.
        prediction: `velocity`, or `data`: the decoder predicts the clean frame.
        sigma_min: with `data`, lower bound of the noise level that velocities are divided by.
        encoder_frame: what the context of frame i is the encoder's output at. `shift`: the clean
            frame i-1, under the condition of frame i; one pass a frame, which is also the one that
            goes into the KV cache. `noise` (the paper's choice for a pretrained model, which
            expects a noisy frame): a first look at frame i, under its own condition; the clean
            frames are encoded under theirs, in a pass of their own. `joint`: the same network,
            but in a rollout one pass over clean frame i-1 and the first look at frame i.

    Raises:
        ScdError: the arguments contradict each other.
    """

    has_context = True

    @register_to_config
    def __init__(
        self,
        channels: int = 32,
        patch_size: int = 1,
        heads: int = 16,
        encoder_layers: int = 8,
        decoder_layers: int = 4,
        fusion: str = "token_concat",
        condition: str = "none",
        num_conditions: int = 0,
        first_frame: bool = False,
        modulate_context: bool = True,
        modulate_output: bool = True,
        prediction: str = "velocity",
        sigma_min: float = 0.05,
        encoder_frame: str = "shift",
    ):
        super().__init__()
        check_config(self.config)
        shared = (channels, patch_size, heads * HEAD_DIM)
        start = first_frame and encoder_frame == "shift"
        self.encoder = CausalEncoder(
            *shared, encoder_layers, num_conditions, modulate_context, start
        )
        self.decoder = FrameDecoder(
            *shared, decoder_layers, num_conditions, modulate_output, fusion, prediction == "data"
        )

    @property
    def takes_first_look(self) -> bool:
        return self.config.encoder_frame != "shift"

    @property
    def start_slots(self) -> int:
        return int(self.encoder.start is not None)

    @property
    def noisy_slots(self) -> int:
        return int(self.takes_first_look)

    @property
    def cached_layers(self) -> int:
        return self.config.encoder_layers

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
        """Predict velocities from one encoder pass, which all K draws share."""
        self.refuse_unused(perturbation, first_look, text)
        draws, frames = noisy.shape[1:3]
        if not self.takes_first_look:
            # The encoder needs the action that leads to the next frame, the decoder its own.
            if conditions is not None:
                conditions = conditions[:, self.first_predicted :]  # (B, F - first, ...)
        elif first_look is None:
            raise ScdError(f"encoder_frame={self.config.encoder_frame} needs a first look")
        context = self.encoder(
            latents[:, :-1],
            conditions,
            perturbation=perturbation,
            history_gradient=history_gradient,
            first_look=first_look,
        )  # (B, F - first, N, D), or (B, F', N, D)
        context = context[:, -frames:]  # (B, F', N, D)
        if conditions is not None:
            conditions = conditions[:, -frames:]  # (B, F', ...)
        context = repeat(context, "b f n d -> (b k) f n d", k=draws)  # (B·K, F', N, D)
        if conditions is not None:
            conditions = repeat(conditions, "b f ... -> (b k) f ...", k=draws)  # (B·K, F', ...)
        noisy = rearrange(noisy, "b k f c h w -> (b k) f c h w")  # (B·K, F', C, H, W)
        timesteps = rearrange(timesteps, "b k f -> (b k) f")  # (B·K, F')
        velocity = self.decode(noisy, timesteps, context, conditions)  # (B·K, F', C, H, W)
        return rearrange(velocity, "(b k) f c h w -> b k f c h w", k=draws)

    def encode(
        self, latents: Tensor, actions: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Encode the contexts of the frames after the given ones: c[:, j] is for frame j+1.

        Args:
            latents: (B, F, C, H, W), clean.
            actions: (B, F) or (B, F, V) as recorded (action i leads to frame i). Frame j is encoded
                with action j+1; the last frame repeats its own.
            labels: (B,).

        Returns:
            (B, F, N, D).

        Raises:
            ScdError: a context needs a first look at its frame.
        """
        if self.takes_first_look:
            raise ScdError(
                f"encode: with encoder_frame={self.config.encoder_frame} there is no context "
                f"without a first look at its frame; call forward or velocity"
            )
        conditions = self.frame_conditions(latents.shape[:2], actions, labels)
        self.check_conditions(conditions)
        if conditions is not None:
            conditions = torch.cat([conditions, conditions[:, -1:]], dim=1)[
                :, self.first_predicted :
            ]
        return self.encoder(latents, conditions)[:, -latents.shape[1] :]

    def decode(
        self, noisy: Tensor, timesteps: Tensor, context: Tensor, conditions: Tensor | None
    ) -> Tensor:
        """Predict velocities of frames from their contexts.

        Args:
            noisy: (B, F, C, H, W).
            timesteps: (B, F) in [0, 1000].
            context: (B, F, N, D).
            conditions: (B, F) or (B, F, V + 1), of these frames.

        Returns:
            (B, F, C, H, W), in float32.
        """
        e = self.decoder.conditioning(timesteps, conditions)  # (B, F, D)
        prediction = self.decoder(noisy, context, e)  # (B, F, C, H, W)
        return self.as_velocity(prediction, noisy, timesteps)  # (B, F, C, H, W)

    def precompute_modulation(self, conditions: Tensor, timesteps: Tensor) -> PrecomputedModulation:
        """Modulate the encoder for clean frames and noise, the decoder for every denoising step."""
        times = timesteps.expand(len(conditions), -1)  # (R, T)
        noisy = self.decoder.precompute_modulation(times, repeat_steps(conditions, len(timesteps)))
        clean, look = self.encoder.precompute_modulation(conditions), None
        if self.takes_first_look:
            look = self.encoder.precompute_modulation(conditions, MAX_TIMESTEP)
        return PrecomputedModulation(clean, noisy, timesteps, look)

    def prefill(
        self,
        latents: Tensor,
        condition_ids: Tensor,
        next_condition_ids: Tensor,
        cache: Cache,
        modulation: PrecomputedModulation,
    ) -> None:
        """Encode clean frames into the cache, with `shift` each under the condition of the next."""
        if not self.takes_first_look:
            self.encoder.prefill(latents, modulation.clean[next_condition_ids], cache)
        elif latents.shape[1]:
            self.encoder.prefill(latents, modulation.clean[condition_ids], cache)

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
        """Encode the newest frame; only the decoder then runs at the steps of the next."""
        if self.takes_first_look:
            assert noise is not None and modulation.look is not None
            own = modulation.look[next_condition_ids]  # (B, 1, 6·L + 2, D)
            clean = modulation.clean[condition_ids]  # (B, 1, 6·L + 2, D), or (B, 0, …)
            x = self._look(newest, clean, noise, own, cache)  # (B, 1, N, D)
        else:
            own = modulation.clean[next_condition_ids]  # (B, 1, 6·L + 2, D)
            x = self.encoder.prefill(newest, own, cache)  # (B, 1, N, D)
        context, ids = self.encoder.context(x, own), next_condition_ids[:, 0]  # (B, 1, N, D)
        if perturbation is not None:
            perturbed = self.encoder.context(x, own, perturbation.type_as(context))
            context, ids = torch.cat([context, perturbed]), ids.repeat(2)  # (2·B, 1, N, D)
        inputs = context, modulation.noisy[ids]  # (B, 1, N, D), (B, T, 6·L + 2, D)
        return FrameDenoiser(partial(self._step_velocity, modulation.timesteps), inputs, True)

    def _look(
        self, newest: Tensor, clean: Tensor, noise: Tensor, own: Tensor, cache: Cache
    ) -> Tensor:
        """Encode the newest frame into the cache, and look at the next, after it: (B, 1, N, D).

        The noise's keys and values lie where the clean frame's will be written.
        """
        frames = newest.shape[1]
        if self.config.encoder_frame == "joint":
            both = torch.cat([newest, noise], dim=1)  # (B, 1 or 2, C, H, W)
            modulation = torch.cat([clean, own], dim=1)  # (B, 1 or 2, 6·L + 2, D)
            return self.encoder.prefill(both, modulation, cache, kept=frames)[:, frames:]
        if frames:
            self.encoder.prefill(newest, clean, cache)
        return self.encoder.prefill(noise, own, cache, kept=0)

    def _step_velocity(
        self, timesteps: Tensor, noisy: Tensor, step: int, context: Tensor, modulation: Tensor
    ) -> Tensor:
        """Predict a step's velocities for the first of a batch's frames; see `FrameDenoiser`."""
        batch = len(noisy)
        modulation = modulation[:batch, step : step + 1]  # (B, 1, 6·L + 2, D)
        prediction = self.decoder(noisy, context[:batch], modulation)
        return self.as_velocity(prediction, noisy, timesteps[step].expand(batch, 1))

    def compile_steps(self) -> None:
        """Compile the decoder."""
        if self.decoder._compiled_call_impl is None:
            self.decoder.compile()
