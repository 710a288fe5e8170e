"""Wan as a dense causal model: every layer sees all past frames at every denoising step."""

from functools import partial

import torch
from diffusers import ModelMixin, WanTransformer3DModel  # noqa: F401 (diffusers looks for ModelMixin)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from scd.errors import ScdError
from scd.models.config import own_config
from scd.models.teacher_forcing import clean_and_noisy
from scd.models.world_model import (
    Cache,
    CausalWorldModel,
    FirstLook,
    FrameDenoiser,
    PrecomputedModulation,
    TextKeys,
    repeat_steps,
)
from scd.wan.network import WanWorldModel, config_of, filled
from scd.wan.stack import CLEAN_TIMESTEP, WanSizes, WanStack


class CausalWan(WanStack, WanWorldModel, CausalWorldModel):
    """Wan2.1 under clean context: `CausalDiT`'s way of training and rollout, Wan's network.

    A clean frame (timestep 0) sees itself and the clean frames before it; a noisy frame sees itself
    and the clean frames before it. Parameters are those of diffusers' `WanTransformer3DModel`,
    names included. With chunks, a chunk takes the place of the frame: its frames see each other.

    Args: as diffusers' `WanTransformer3DModel`, and
        chunk_frames: frames that are denoised together.
        num_actions: actions, one a frame; 0: none. Their embeddings start at zero.

    Raises:
        ScdError: the arguments contradict each other.
    """

    noisy_slots = 1

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
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
        chunk_frames: int = 1,
        num_actions: int = 0,
    ):
        super().__init__(WanSizes.of(self.config), num_layers, num_actions, predicts=True)
        if chunk_frames < 1 or (num_actions and chunk_frames > 1):
            raise ScdError(
                f"chunk_frames is {chunk_frames}: it must be above 0, and 1 where every frame has "
                f"an action"
            )
        self.chunk_frames = chunk_frames

    @classmethod
    def from_wan(
        cls, transformer: WanTransformer3DModel, chunk_frames: int = 1, num_actions: int = 0
    ) -> "CausalWan":
        """Make a causal model of the weights of a text-to-video Wan, which are copied.

        Raises:
            ScdError: another kind of Wan, or arguments that contradict each other.
        """
        config = {
            **config_of(transformer),
            "chunk_frames": chunk_frames,
            "num_actions": num_actions,
        }
        tensors = transformer.state_dict()
        if num_actions:
            bias = tensors["patch_embedding.bias"]
            tensors["action_embedding.weight"] = bias.new_zeros(num_actions + 1, len(bias))
        return filled(lambda: cls(**config), tensors)

    def to_wan(self) -> WanTransformer3DModel:
        """Make diffusers' bidirectional model of copies of these weights.

        Raises:
            ScdError: the model has actions, which that one has not.
        """
        config = own_config(self)
        if config.pop("num_actions"):
            raise ScdError("a CausalWan with actions cannot become a Wan, which has none")
        config.pop("chunk_frames")
        transformer = WanTransformer3DModel(**config).to(self.device)
        copies = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        transformer.load_state_dict(copies, assign=True)
        return transformer.eval()

    @property
    def first_predicted(self) -> int:
        return 0

    @property
    def cached_layers(self) -> int:
        return len(self.blocks)

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
        chunk, n = self.chunk_frames, self.tokens_per_frame(*latents.shape[-2:])
        clean = latents[:, :-chunk]  # (B, F - chunk, C, H, W): no frame follows the last
        if (latents.shape[1] - noisy.shape[2]) % chunk:
            raise ScdError(f"{noisy.shape[2]} noisy frames are no whole chunks of {chunk}")
        sequence = clean_and_noisy(
            clean, noisy, timesteps, conditions, n, history_gradient, chunk, CLEAN_TIMESTEP
        )
        frames, count, layers = sequence.frames, clean.shape[1], len(self.blocks)
        modulation = self.modulation(sequence.timesteps, sequence.conditions)  # (B, S, 7, D)
        texts = [self.embed_text(self.check_text(text, len(latents)))] * layers  # (B, T, D) each
        rotary = self.rotary(sequence.positions, frames)
        x = self.run(self.embed(frames), modulation, rotary, [sequence.attend] * layers, texts)
        x, modulation, frames = x[:, count:], modulation[:, count:], frames[:, count:]
        velocity = self.read_out(x, modulation, frames)  # (B, K·F', C, H, W)
        return velocity.unflatten(1, noisy.shape[1:3])

    def precompute_modulation(self, conditions: Tensor, timesteps: Tensor) -> PrecomputedModulation:
        """Modulate clean frames and every denoising step under all conditions."""
        clean = torch.full(conditions.shape[:1], CLEAN_TIMESTEP, device=conditions.device)  # (R,)
        times = timesteps.expand(len(conditions), -1)  # (R, T)
        return PrecomputedModulation(
            self.modulation(clean, conditions),  # (R, 7, D)
            self.modulation(times, repeat_steps(conditions, len(timesteps))),  # (R, T, 7, D)
            timesteps,
        )

    def precompute_text(self, text: Tensor) -> TextKeys:
        keys, values = zip(*self.text_keys(text), strict=True)
        return TextKeys(torch.stack(keys), torch.stack(values))

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
            self._run_new(latents, modulation.clean[condition_ids], cache)
            cache.advance(latents.shape[1] // self.chunk_frames)

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
        """Prefill the newest frames; all layers then run at every denoising step of the next.

        The noisy frames' keys and values lie where the clean frames' will be written.
        """
        self.prefill(newest, condition_ids, next_condition_ids, cache, modulation)
        inputs = (modulation.noisy[next_condition_ids[:, 0]],)  # (B, T, 7, D)
        return FrameDenoiser(partial(self._step_velocity, cache), inputs, capturable=False)

    def _step_velocity(self, cache: Cache, noisy: Tensor, step: int, modulation: Tensor) -> Tensor:
        """Predict a step's velocities for the first of a batch's frames; see `FrameDenoiser`."""
        modulation = modulation[: len(noisy), step : step + 1]  # (B, 1, 7, D)
        x = self._run_new(noisy, modulation, cache)  # (B, F, N, D)
        return self.read_out(x, modulation, noisy)  # (B, F, C, H, W)

    def _run_new(self, frames: Tensor, modulation: Tensor, cache: Cache) -> Tensor:
        """Run frames (B, F, C, H, W) that follow those in the cache: (B, F, N, D)."""
        first = cache.frames * self.chunk_frames
        positions = torch.arange(first, first + frames.shape[1], device=frames.device)
        return self.run_cached(
            self.embed(frames), modulation, self.rotary(positions, frames), cache
        )
