"""Separable Causal Diffusion: the causal encoder and the frame decoder composed."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from scd.errors import ScdError
from scd.models.decoder import FUSIONS, FrameDecoder
from scd.models.encoder import CausalEncoder
from scd.models.layers import HEAD_DIM

MAX_TIMESTEP = 1000.0


class SCD(ModelMixin, ConfigMixin):
    """A causal video diffusion model that runs its deep part once per frame (arXiv 2602.10095).

    Args:
        channels: of the latents (3 in pixel space).
        patch_size: height and width of a token's patch, in latent pixels.
        heads: attention heads of width 64; the model's width D is 64 * heads.
        fusion: see `FrameDecoder`.
        condition: `none`, `action` (one a frame) or `label` (one a clip).
        num_conditions: number of actions or classes.
        modulate_context, modulate_output: whether the output norms of encoder and decoder are
            modulated by the conditioning vector.
        prediction: `velocity`, or `data`: the decoder predicts the clean frame.
        sigma_min: with `data`, lower bound of the noise level that velocities are divided by.

    Raises:
        ScdError: the arguments contradict each other.
    """

    _repeated_blocks = ["Block"]
    _no_split_modules = ["Block"]

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
        modulate_context: bool = True,
        modulate_output: bool = True,
        prediction: str = "velocity",
        sigma_min: float = 0.05,
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise ScdError(f"fusion is {fusion!r}, not one of {', '.join(FUSIONS)}")
        if (condition == "none") != (num_conditions == 0):
            raise ScdError(f"condition {condition!r} contradicts num_conditions {num_conditions}")
        width = heads * HEAD_DIM
        shared = (channels, patch_size, width)
        self.encoder = CausalEncoder(*shared, encoder_layers, num_conditions, modulate_context)
        self.decoder = FrameDecoder(
            *shared, decoder_layers, num_conditions, modulate_output, fusion
        )

    @property
    def width(self) -> int:
        return self.config.heads * HEAD_DIM

    @property
    def null_condition(self) -> int:
        return self.config.num_conditions

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute every block's activations in the backward pass instead of keeping them."""
        self.encoder.gradient_checkpointing = enabled
        self.decoder.gradient_checkpointing = enabled

    def tokens_per_frame(self, height: int, width: int) -> int:
        return (height // self.config.patch_size) * (width // self.config.patch_size)

    def encode(
        self,
        latents: Tensor,
        actions: Tensor | None = None,
        labels: Tensor | None = None,
        perturbation: Tensor | None = None,
    ) -> Tensor:
        """Contexts of the frames after the given ones: c[:, j] is for frame j+1.

        Args:
            latents: (B, F, C, H, W), clean.
            actions: (B, F) as recorded (action i leads to frame i). Frame j is encoded with action
                j+1; the last frame repeats its own.
            labels: (B,).
            perturbation: (B, F, N, D), added to the normed context.

        Returns:
            (B, F, N, D).
        """
        conditions = self.frame_conditions(latents.shape[:2], actions, labels)
        return self.encoder(latents, next_conditions(conditions), perturbation)

    def velocity(
        self,
        latents: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        actions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced velocities of frames 1..F-1.

        Args:
            latents: (B, F, C, H, W), the clean frames, for the encoder.
            noisy: (B, F, C, H, W), for the decoder.
            timesteps: (B, F) in [0, 1000], the noise levels of `noisy`.

        Returns:
            (B, F-1, C, H, W).
        """
        conditions = self.frame_conditions(latents.shape[:2], actions, labels)
        context = self.encoder(latents, next_conditions(conditions))[:, :-1]
        of_frames = None if conditions is None else conditions[:, 1:]
        return self.decode(noisy[:, 1:], timesteps[:, 1:], context, of_frames)

    def decode(
        self, noisy: Tensor, timesteps: Tensor, context: Tensor, conditions: Tensor | None
    ) -> Tensor:
        """Velocities of frames from their contexts.

        Args:
            noisy: (B, F, C, H, W).
            timesteps: (B, F) in [0, 1000].
            context: (B, F, N, D).
            conditions: (B, F), of these frames.

        Returns:
            (B, F, C, H, W), in float32.
        """
        prediction = self.decoder(noisy, timesteps, context, conditions).float()
        if self.config.prediction == "velocity":
            return prediction
        sigma = (timesteps / MAX_TIMESTEP).clamp(min=self.config.sigma_min)
        return (noisy - prediction) / sigma[:, :, None, None, None]

    def frame_conditions(
        self, shape: tuple[int, ...], actions: Tensor | None, labels: Tensor | None
    ) -> Tensor | None:
        """The condition index of every frame, (B, F); None for a model without conditions.

        Raises:
            ScdError: a condition that the model does not have, or of another shape.
        """
        kind = self.config.condition
        if (actions is not None and kind != "action") or (labels is not None and kind != "label"):
            given = "actions" if actions is not None else "labels"
            raise ScdError(f"{given} given to a model with condition {kind!r}")
        if kind == "none":
            return None
        if actions is not None:
            if tuple(actions.shape) != tuple(shape):
                raise ScdError(f"actions are {tuple(actions.shape)}, expected {tuple(shape)}")
            conditions = actions
        elif labels is not None:
            if tuple(labels.shape) != tuple(shape[:1]):
                raise ScdError(f"labels are {tuple(labels.shape)}, expected {tuple(shape[:1])}")
            conditions = labels[:, None].expand(shape)
        else:
            return torch.full(tuple(shape), self.null_condition, device=self.device)
        if conditions.min() < 0 or conditions.max() > self.null_condition:
            raise ScdError(f"conditions must lie in 0..{self.null_condition} (null)")
        return conditions


def next_conditions(conditions: Tensor | None) -> Tensor | None:
    """(B, F) conditions of frames 0..F-1 -> those the encoder needs: of frames 1..F-1, F-1."""
    if conditions is None:
        return None
    return torch.cat([conditions[:, 1:], conditions[:, -1:]], dim=1)
