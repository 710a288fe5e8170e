"""Wan itself: every frame sees every other. It teaches causal Wans, and is their critic."""

import torch
from diffusers import ModelMixin, WanTransformer3DModel  # noqa: F401 (diffusers looks for ModelMixin)
from diffusers.configuration_utils import register_to_config
from einops import rearrange, repeat
from torch import Tensor

from scd.models.attention import full_attention
from scd.models.world_model import CLEAN_TIMESTEP as GIVEN
from scd.models.world_model import FirstLook
from scd.wan.network import WanWorldModel, config_of, filled
from scd.wan.stack import CLEAN_TIMESTEP, WanSizes, WanStack


class BidirectionalWan(WanStack, WanWorldModel):
    """Wan2.1 as it is: full attention among the frames of a clip, which are denoised together.

    Parameters are those of diffusers' `WanTransformer3DModel`, names included. Frames before the
    noisy ones, and those whose timestep is -1, are given: they are seen clean, at Wan's timestep 0.

    Args: as diffusers' `WanTransformer3DModel`, and
        num_actions: actions, one a frame; 0: none. Their embeddings start at zero.
    """

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
        num_actions: int = 0,
    ):
        super().__init__(WanSizes.of(self.config), num_layers, num_actions, predicts=True)

    @classmethod
    def from_wan(
        cls, transformer: WanTransformer3DModel, num_actions: int = 0
    ) -> "BidirectionalWan":
        """Make the model of the weights of a text-to-video Wan, which are copied.

        Raises:
            ScdError: another kind of Wan.
        """
        config = {**config_of(transformer), "num_actions": num_actions}
        tensors = transformer.state_dict()
        if num_actions:
            bias = tensors["patch_embedding.bias"]
            tensors["action_embedding.weight"] = bias.new_zeros(num_actions + 1, len(bias))
        return filled(lambda: cls(**config), tensors)

    @property
    def first_predicted(self) -> int:
        return 0

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
        given = times == GIVEN  # (B·K, F')
        new = torch.where(given[..., None, None, None], clean[:, first:], noisy)
        frames = torch.cat([clean[:, :first], new], dim=1)  # (B·K, F, C, H, W)
        start = times.new_full((len(times), first), CLEAN_TIMESTEP)  # (B·K, F - F')
        times = torch.cat([start, times.masked_fill(given, CLEAN_TIMESTEP)], dim=1)  # (B·K, F)
        if conditions is not None:
            conditions = repeat(conditions, "b f -> (b k) f", k=draws)  # (B·K, F)
        text = repeat(self.check_text(text, len(latents)), "b t d -> (b k) t d", k=draws)
        layers = len(self.blocks)
        modulation = self.modulation(times, conditions)  # (B·K, F, 7, D)
        rotary = self.rotary(torch.arange(frames.shape[1], device=frames.device), frames)
        texts = [self.embed_text(text)] * layers  # (B·K, T, D) each
        x = self.run(self.embed(frames), modulation, rotary, [full_attention] * layers, texts)
        velocity = self.read_out(x[:, first:], modulation[:, first:], noisy)  # (B·K, F', C, H, W)
        return rearrange(velocity, "(b k) f c h w -> b k f c h w", k=draws)
