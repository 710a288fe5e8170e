"""Separable Causal Diffusion: the causal encoder and the frame decoder composed."""

from typing import NamedTuple

import torch
from diffusers import ModelMixin  # noqa: F401 (diffusers' pipelines look for it beside the class)
from diffusers.configuration_utils import register_to_config
from einops import rearrange, repeat
from torch import Tensor

from scd.errors import ScdError
from scd.models.decoder import FUSIONS, FrameDecoder
from scd.models.encoder import CausalEncoder
from scd.models.layers import HEAD_DIM, Modulations
from scd.models.world_model import Cache, WorldModel, check_condition, repeat_steps


class SCD(WorldModel):
    """A causal video diffusion model that runs its deep part once per frame (arXiv 2602.10095).

    Args:
        channels: of the latents (3 in pixel space).
        patch_size: height and width of a token's patch, in latent pixels.
        heads: attention heads of width 64; the model's width D is 64 * heads.
        fusion: see `FrameDecoder`.
        condition: `none`, `action` (one of several a frame), `action_vector` (several numbers a
            frame: keys that are held, a mouse's way) or `label` (one a clip).
        num_conditions: number of actions, of a vector's components (V) or of classes.
        first_frame: also predict frame 0, from a learned start before it (not in the paper).
        modulate_context, modulate_output: whether the output norms of encoder and decoder are
            modulated by the conditioning vector.
        prediction: `velocity`, or `data`: the decoder predicts the clean frame.
        sigma_min: with `data`, lower bound of the noise level that velocities are divided by.

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
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise ScdError(f"fusion is {fusion!r}, not one of {', '.join(FUSIONS)}")
        check_condition(condition, num_conditions)
        shared = (channels, patch_size, heads * HEAD_DIM)
        self.encoder = CausalEncoder(
            *shared, encoder_layers, num_conditions, modulate_context, first_frame
        )
        self.decoder = FrameDecoder(
            *shared, decoder_layers, num_conditions, modulate_output, fusion, prediction == "data"
        )

    @property
    def start_places(self) -> int:  # type: ignore[override]
        return 1 - self.first_predicted

    @property
    def cached_layers(self) -> int:
        return self.config.encoder_layers

    def forward(
        self,
        latents: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Tensor | None,
        perturbation: Tensor | None = None,
    ) -> Tensor:
        """See `WorldModel.forward`: one encoder pass for all K draws."""
        draws = noisy.shape[1]
        # The encoder needs the action that leads to the next frame, the decoder that of its own:
        # both are the actions of the frames to predict.
        of_frames = None if conditions is None else conditions[:, self.first_predicted :]
        context = self.encoder(latents[:, :-1], of_frames, perturbation)  # (B, F', N, D)
        velocity = self.decode(
            rearrange(noisy, "b k f c h w -> (b k) f c h w"),
            rearrange(timesteps, "b k f -> (b k) f"),
            repeat(context, "b f n d -> (b k) f n d", k=draws),
            None if of_frames is None else repeat(of_frames, "b f ... -> (b k) f ...", k=draws),
        )
        return rearrange(velocity, "(b k) f c h w -> b k f c h w", k=draws)

    def encode(
        self, latents: Tensor, actions: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Contexts of the frames after the given ones: c[:, j] is for frame j+1.

        Args:
            latents: (B, F, C, H, W), clean.
            actions: (B, F) or (B, F, V) as recorded (action i leads to frame i). Frame j is encoded
                with action j+1; the last frame repeats its own.
            labels: (B,).

        Returns:
            (B, F, N, D).
        """
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
        """Velocities of frames from their contexts.

        Args:
            noisy: (B, F, C, H, W).
            timesteps: (B, F) in [0, 1000].
            context: (B, F, N, D).
            conditions: (B, F) or (B, F, V + 1), of these frames.

        Returns:
            (B, F, C, H, W), in float32.
        """
        e = self.decoder.conditioning(timesteps, conditions)  # (B, F, D)
        return self._as_velocity(self.decoder(noisy, context, e), noisy, timesteps)

    def conditioned(self, conditions: Tensor, timesteps: Tensor) -> "SCDConditioned":
        """See `WorldModel.conditioned`."""
        times = timesteps.expand(len(conditions), -1)  # (R, T)
        of_decoder = self.decoder.modulations(times, repeat_steps(conditions, len(timesteps)))
        of_encoder = self.encoder.modulations(conditions)
        return SCDConditioned(of_encoder.values, of_decoder.values, timesteps)

    def take_in(
        self,
        latents: Tensor,
        own: Tensor,
        following: Tensor,
        cache: Cache,
        conditioned: "SCDConditioned",
    ) -> None:
        """See `WorldModel.take_in`; the encoder looks at `following` only."""
        self.encoder.take_in(latents, Modulations(conditioned.encoder[following]), cache)

    def next_frame(
        self,
        newest: Tensor,
        own: Tensor,
        following: Tensor,
        cache: Cache,
        conditioned: "SCDConditioned",
        perturbation: Tensor | None = None,
    ) -> "DecoderField":
        """See `WorldModel.next_frame`: the encoder runs here, the decoder at every step after."""
        context_under = self.encoder.take_in(
            newest, Modulations(conditioned.encoder[following]), cache
        )
        context, numbers = context_under(None), following[:, 0]
        if perturbation is not None:
            perturbed = context_under(perturbation.type_as(context))
            context, numbers = torch.cat([context, perturbed]), numbers.repeat(2)
        return DecoderField(self, conditioned.timesteps, context, conditioned.decoder[numbers])


class SCDConditioned(NamedTuple):
    """See `WorldModel.conditioned`; values of `Modulations`, T timesteps."""

    encoder: Tensor  # (R, ...)
    decoder: Tensor  # (R, T, ...)
    timesteps: Tensor


class DecoderField(NamedTuple):
    """The velocity field of a frame (see `VelocityField`), a function of two tensors."""

    model: SCD
    timesteps: Tensor  # (T,)
    context: Tensor  # (B, 1, N, D)
    modulations: Tensor  # (B, T, ...), values of `Modulations`

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What changes from frame to frame."""
        return self.context, self.modulations

    def of(self, context: Tensor, modulations: Tensor) -> "DecoderField":
        """The field of another frame."""
        return self._replace(context=context, modulations=modulations)

    def __call__(self, noisy: Tensor, step: int, /) -> Tensor:
        batch = len(noisy)
        of_step = Modulations(self.modulations[:batch, step : step + 1])
        prediction = self.model.decoder(noisy, self.context[:batch], of_step)
        timesteps = self.timesteps[step].expand(batch, 1)
        return self.model._as_velocity(prediction, noisy, timesteps)
