"""Wan as Separable Causal Diffusion: its deep layers run once per frame (arXiv 2602.10095).

Where the paper is silent, this is what was chosen: text conditions both halves; context tokens are
the last block's output as it is, and carry the noisy tokens' row, column and noise level; the
encoder's clean frames are at timestep 0, the current one (`noise`) at that of the noisy version it
is given, in a rollout pure noise; frame 0 follows a learned start (`shift`) or its noise (`noise`).
"""

import torch
from diffusers import ModelMixin, WanTransformer3DModel  # noqa: F401 (diffusers looks for ModelMixin)
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor

from scd.errors import ScdError
from scd.models.world_model import (
    MAX_TIMESTEP,
    Cache,
    CausalWorldModel,
    FirstLook,
    FrameDenoiser,
    PrecomputedModulation,
    TextKeys,
    repeat_steps,
)
from scd.options import WanEncoderFrame, WanFusion
from scd.options.rules import wrong_choice
from scd.wan.block import at_least_float32
from scd.wan.halves import WanDecoder, WanEncoder
from scd.wan.network import WanWorldModel, config_of, filled
from scd.wan.stack import CLEAN_TIMESTEP, WanSizes, text_in


class SCDWan(WanWorldModel, CausalWorldModel):
    """Wan2.1 split in two: a causal encoder, once per frame, and a frame decoder, once per step.

    Args: as diffusers' `WanTransformer3DModel`, and
        encoder_layers: blocks of the encoder, Wan's first.
        decoder_first, decoder_last: blocks of the decoder, from Wan's beginning and end.
        encoder_frame: `shift`: the encoder's output at clean frame i-1 is the context of frame i,
            one pass a frame. `noise` (the paper's): it is the output at frame i itself, given as
            noise; the clean frame before it goes into the cache in the same pass.
        fusion: `token_concat` (the paper's) or `middle`; see `WanDecoder`.
        first_frame: also predict frame 0.
        num_actions: actions, one a frame; 0: none. Their embeddings start at zero.

    Raises:
        ScdError: the arguments contradict each other.
    """

    has_context = True

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        encoder_layers: int = 25,
        decoder_first: int = 5,
        decoder_last: int = 5,
        encoder_frame: WanEncoderFrame = "shift",
        fusion: WanFusion = "token_concat",
        first_frame: bool = False,
        num_actions: int = 0,
    ):
        super().__init__()
        for name, kind, value in (
            ("encoder_frame", WanEncoderFrame, encoder_frame),
            ("fusion", WanFusion, fusion),
        ):
            if message := wrong_choice(name, kind, value):
                raise ScdError(message)
        if min(encoder_layers, decoder_last) < 1 or decoder_first < 0:
            raise ScdError(
                f"an encoder of {encoder_layers} and a decoder of {decoder_first} + {decoder_last} "
                f"layers: the encoder and the decoder's end need one at least"
            )
        sizes = WanSizes.of(self.config)
        start = first_frame and encoder_frame == "shift"
        self.encoder = WanEncoder(sizes, encoder_layers, num_actions, start)
        self.decoder = WanDecoder(sizes, decoder_first, decoder_last, num_actions, fusion)

    @classmethod
    def from_wan(
        cls,
        transformer: WanTransformer3DModel,
        encoder_layers: int | None = None,
        decoder_first: int = 5,
        decoder_last: int = 5,
        encoder_frame: WanEncoderFrame = "shift",
        fusion: WanFusion = "token_concat",
        first_frame: bool = False,
        num_actions: int = 0,
    ) -> "SCDWan":
        """Make an SCD of the weights of a text-to-video Wan, which are copied.

        Args:
            encoder_layers: None: all of Wan's but the `decoder_last`.

        Raises:
            ScdError: another kind of Wan, fewer layers than are wanted, or arguments that
                contradict each other.
        """
        config = config_of(transformer)
        layers = config.pop("num_layers")
        config.pop("rope_max_seq_len")
        if encoder_layers is None:
            encoder_layers = max(1, layers - decoder_last)
        if encoder_layers > layers or decoder_first + decoder_last > layers:
            raise ScdError(
                f"an encoder of {encoder_layers} and a decoder of {decoder_first} + {decoder_last} "
                f"layers: this Wan has {layers}"
            )

        def build() -> SCDWan:
            return cls(
                **config,
                encoder_layers=encoder_layers,
                decoder_first=decoder_first,
                decoder_last=decoder_last,
                encoder_frame=encoder_frame,
                fusion=fusion,
                first_frame=first_frame,
                num_actions=num_actions,
            )

        with torch.device("meta"):
            empty = build()
        return filled(build, tensors_of_wan(empty, transformer.state_dict(), layers))

    @property
    def first_predicted(self) -> int:
        return 0 if self.config.first_frame else 1

    @property
    def takes_first_look(self) -> bool:
        """Whether the encoder is given the frame to predict, as noise of its own.

        Of the noise that the decoder starts from, it could tell the clean frame of a training clip:
        two noisy versions under one noise are two equations for two unknowns.
        """
        return self.config.encoder_frame == "noise"

    @property
    def start_slots(self) -> int:
        return int(self.encoder.start is not None)

    @property
    def noisy_slots(self) -> int:
        return int(self.takes_first_look)

    @property
    def cached_layers(self) -> int:
        return len(self.encoder.blocks)

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
        """Predict velocities from one encoder pass, which all K draws share.

        Args: as `WorldModel.forward`, and
            perturbation: in units of each token's standard deviation.
        """
        self.refuse_unused(perturbation, first_look, text)
        text = self.check_text(text, len(latents))
        draws, frames = noisy.shape[1:3]
        if not self.takes_first_look:
            # The encoder needs the action that leads to the next frame, the decoder its own.
            if conditions is not None:
                conditions = conditions[:, self.first_predicted :]  # (B, F - first)
        elif first_look is None:
            raise ScdError(f"encoder_frame={self.config.encoder_frame} needs a first look")
        context = self.encoder(
            latents[:, :-1], conditions, text, history_gradient, first_look
        )  # (B, F - first, N, D), or (B, F', N, D)
        context = perturbed(context[:, -frames:], perturbation)  # (B, F', N, D)
        # Draws are more frames: in the decoder, frames do not see each other.
        context = context.repeat(1, draws, 1, 1)  # (B, K·F', N, D)
        if conditions is not None:
            conditions = conditions[:, -frames:].repeat(1, draws)  # (B, K·F')
        modulation = self.decoder.modulation(rearrange(timesteps, "b k f -> b (k f)"), conditions)
        texts = self.decoder.block_texts(text)
        noisy = rearrange(noisy, "b k f c h w -> b (k f) c h w")  # (B, K·F', C, H, W)
        velocity = self.decoder(noisy, context, modulation, texts)  # (B, K·F', C, H, W)
        return rearrange(velocity, "b (k f) c h w -> b k f c h w", k=draws)

    def precompute_modulation(self, conditions: Tensor, timesteps: Tensor) -> PrecomputedModulation:
        """Modulate the encoder for clean frames and for noise, the decoder for every step."""
        levels = [CLEAN_TIMESTEP, MAX_TIMESTEP][: 1 + self.takes_first_look]
        clean = torch.tensor(levels, device=conditions.device).expand(len(conditions), -1)
        times = timesteps.expand(len(conditions), -1)  # (R, T)
        return PrecomputedModulation(
            self.encoder.modulation(clean, repeat_steps(conditions, len(levels))),  # (R, ≤2, 7, D)
            self.decoder.modulation(times, repeat_steps(conditions, len(timesteps))),
            timesteps,
        )

    def precompute_text(self, text: Tensor) -> TextKeys:
        """Compute the keys and values of the encoder's layers, and then of the decoder's."""
        of_layers = [*self.encoder.text_keys(text), *self.decoder.text_keys(text)]
        keys, values = zip(*of_layers, strict=True)
        return TextKeys(torch.stack(keys), torch.stack(values))

    def prefill(
        self,
        latents: Tensor,
        condition_ids: Tensor,
        next_condition_ids: Tensor,
        cache: Cache,
        modulation: PrecomputedModulation,
    ) -> None:
        """Encode clean frames into the cache: each under the condition of the next (`shift`)."""
        ids = condition_ids if self.takes_first_look else next_condition_ids
        self.encoder.prefill(latents, modulation.clean[ids, 0], cache)

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
        """Encode the newest frame, and the next as noise; only the decoder runs at its steps."""
        if self.takes_first_look:
            assert noise is not None
            clean = modulation.clean[condition_ids, 0]  # (B, 0 or 1, 7, D)
            vectors = torch.cat([clean, modulation.clean[next_condition_ids, 1]], dim=1)
            frames = torch.cat([newest.to(noise), noise], dim=1)  # (B, 1 or 2, C, H, W)
            # The noise's keys lie where the clean frame's will be written.
            x = self.encoder.prefill(frames, vectors, cache, kept=newest.shape[1])
        else:
            x = self.encoder.prefill(newest, modulation.clean[next_condition_ids, 0], cache)
        context, ids = x[:, -1:], next_condition_ids[:, 0]  # (B, 1, N, D)
        texts = [part[self.cached_layers :, : len(x)] for part in text_in(cache)]
        if perturbation is not None:
            context = torch.cat([context, perturbed(context, perturbation)])  # (2·B, 1, N, D)
            ids, texts = ids.repeat(2), [part.repeat(1, 2, 1, 1, 1) for part in texts]
        # (B, 1, N, D), (B, T, 7, D), and of the decoder's layers (L, B, heads, T, head_dim) twice
        inputs = context, modulation.noisy[ids], *texts
        return FrameDenoiser(self._step_velocity, inputs, capturable=True)

    def _step_velocity(
        self,
        noisy: Tensor,
        step: int,
        context: Tensor,
        modulation: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Predict a step's velocities for the first of a batch's frames; see `FrameDenoiser`."""
        batch = len(noisy)
        modulation = modulation[:batch, step : step + 1]  # (B, 1, 7, D)
        texts = list(zip(keys[:, :batch], values[:, :batch], strict=True))
        return self.decoder(noisy, context[:batch], modulation, texts)  # (B, 1, C, H, W)

    def compile_steps(self) -> None:
        """Compile the decoder."""
        if self.decoder._compiled_call_impl is None:
            self.decoder.compile()


def perturbed(context: Tensor, perturbation: Tensor | None) -> Tensor:
    """Add noise (B, F, N, D) to a context, in units of each token's standard deviation."""
    if perturbation is None:
        return context
    scale = at_least_float32(context).std(dim=-1, keepdim=True, correction=0)
    return context + (scale * perturbation).type_as(context)


def tensors_of_wan(model: SCDWan, weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Find the first values of all tensors of an SCD among a Wan's, which several may share.

    Args:
        model: its own tensors need no memory.
        weights: of a Wan of so many layers, under diffusers' names.
    """
    first, last = model.config.decoder_first, model.config.decoder_last
    sources = [*range(first), *range(layers - last, layers)]
    return {
        name: _initial(name, tuple(tensor.shape), weights, sources)
        for name, tensor in model.state_dict().items()
    }


def _initial(
    name: str, shape: tuple[int, ...], weights: dict[str, Tensor], sources: list[int]
) -> Tensor:
    """Find the first value of a tensor of an SCD: Wan's, or that of one that Wan has not."""
    part, _, own = name.partition(".")
    if own == "start":  # begins as the embedding of a frame of zeros, the mean of all latents
        return weights["patch_embedding.bias"]
    if own.startswith(("action_embedding.", "fuse.")):
        return weights["patch_embedding.bias"].new_zeros(shape)
    if part == "decoder" and own.startswith("blocks."):
        _, number, rest = own.split(".", 2)
        own = f"blocks.{sources[int(number)]}.{rest}"
    return weights[own]
