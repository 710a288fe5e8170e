"""A stack of Wan's blocks with its embedders: the whole causal model, or an SCD's encoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scd.errors import ScdError
from scd.models.layers import Attend, modulate
from scd.models.world_model import Cache, TextKeys
from scd.utils.precision import without_autocast
from scd.wan.block import (
    KeysValues,
    Rotary,
    WanBlock,
    at_least_float32,
    layer_norm,
    rotary_positions,
)

CLEAN_TIMESTEP = 0.0  # Wan's clean frames are the end of its noise levels
BLOCK_VECTORS = 6  # shift, scale and gate of a block's two modulated branches


@dataclass(frozen=True)
class WanSizes:
    """What diffusers' config of a text-to-video Wan says of its size, under diffusers' names."""

    patch_size: tuple[int, int, int]
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    cross_attn_norm: bool
    qk_norm: str | None
    eps: float

    @classmethod
    def of(cls, config: Any) -> "WanSizes":
        """Take the sizes from a config.

        Raises:
            ScdError: tokens that span several frames, or other channels out than in.
        """
        sizes = cls(**{field.name: config[field.name] for field in fields(cls)})
        if sizes.patch_size[0] != 1:
            raise ScdError(f"patch_size {tuple(sizes.patch_size)}: a token must be of one frame")
        if config["out_channels"] not in (None, sizes.in_channels):
            raise ScdError(
                f"{sizes.in_channels} channels in and {config['out_channels']} out: no "
                f"text-to-video model"
            )
        return sizes

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class WanStack(nn.Module):
    """Blocks, and the embedders of latents, noise levels, actions and text before them.

    Parameters have diffusers' names.

    Args:
        layers: number of blocks.
        num_actions: embeddings of actions that are added to those of the noise level, and one of
            the null action; all start at zero. 0: none.
        predicts: with the layers that read velocities out of the last block's tokens.
    """

    def __init__(self, sizes: WanSizes, layers: int, num_actions: int, predicts: bool):
        if num_actions < 0:
            raise ScdError(f"num_actions is {num_actions}: it cannot be negative")
        super().__init__()
        width, patch = sizes.width, sizes.patch_size
        self.sizes = sizes
        self.gradient_checkpointing = False
        self.patch_embedding = nn.Conv3d(sizes.in_channels, width, patch, stride=patch)
        self.condition_embedder = WanTimeTextImageEmbedding(
            width, sizes.freq_dim, BLOCK_VECTORS * width, sizes.text_dim
        )
        self.action_embedding = nn.Embedding(num_actions + 1, width) if num_actions else None
        if self.action_embedding is not None:
            nn.init.zeros_(self.action_embedding.weight)
        self.blocks = nn.ModuleList(
            WanBlock(
                width,
                sizes.ffn_dim,
                sizes.num_attention_heads,
                sizes.qk_norm,
                sizes.cross_attn_norm,
                sizes.eps,
            )
            for _ in range(layers)
        )
        if predicts:
            self.norm_out = nn.LayerNorm(width, sizes.eps, elementwise_affine=False)
            self.proj_out = nn.Linear(width, sizes.in_channels * math.prod(patch))
            self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)

    def embed(self, frames: Tensor) -> Tensor:
        """Embed latents (B, F, C, H, W) as tokens (B, F, N, D)."""
        x = frames.to(self.patch_embedding.weight.dtype).flatten(0, 1)  # (B·F, C, H, W)
        x = self.patch_embedding(x.unsqueeze(2))  # (B·F, D, 1, H/p, W/q)
        return x.flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])  # (B, F, N, D)

    def embed_text(self, text: Tensor) -> Tensor:
        """Embed the text encoder's output (B, T, text_dim) as tokens (B, T, D)."""
        embedder = self.condition_embedder.text_embedder
        return embedder(text.to(embedder.linear_1.weight.dtype))

    def text_keys(self, text: Tensor) -> list[KeysValues]:
        """Compute every block's keys and values of the text encoder's output (B, T, text_dim)."""
        tokens = self.embed_text(text)
        return [block.text_keys(tokens) for block in self.blocks]  # type: ignore[operator]

    def modulation(self, timesteps: Tensor, actions: Tensor | None) -> Tensor:
        """Compute what modulates frames at noise levels, and under actions where there are any.

        Args:
            timesteps: (...) in [0, 1000].
            actions: (...) integers; None: the null action.

        Returns:
            (..., 7, D): the 6 vectors to which every block adds its table, and the embedding that
            the output's modulation follows from.
        """
        embedder = self.condition_embedder
        with without_autocast(timesteps.device):  # Wan itself computes this in float32
            sinusoid = embedder.timesteps_proj(timesteps.flatten()).unflatten(0, timesteps.shape)
            e = embedder.time_embedder(sinusoid.to(embedder.time_embedder.linear_1.weight.dtype))
            e = e.to(embedder.time_proj.weight.dtype)  # (..., D)
            if self.action_embedding is not None:
                if actions is None:
                    null = self.action_embedding.num_embeddings - 1
                    actions = torch.full_like(timesteps, null, dtype=torch.long)
                e = e + self.action_embedding(actions).type_as(e)  # (..., D)
            vectors = embedder.time_proj(embedder.act_fn(e))  # (..., 6·D)
            vectors = vectors.unflatten(-1, (BLOCK_VECTORS, -1))  # (..., 6, D)
            return at_least_float32(torch.cat([vectors, e.unsqueeze(-2)], dim=-2))  # (..., 7, D)

    def rotary(self, frames: Tensor, latents: Tensor) -> Rotary:
        """Compute the rotary positions of latents (..., H, W) that are these frames (F,)."""
        _, rows, columns = self.sizes.patch_size
        height, width = latents.shape[-2] // rows, latents.shape[-1] // columns
        return rotary_positions(frames, height, width, self.sizes.attention_head_dim)

    def run(
        self,
        x: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        attends: Sequence[Attend],
        texts: Sequence[Tensor | KeysValues],
        blocks: slice = slice(None),
        keep: int | None = None,
    ) -> Tensor:
        """Run some of the blocks over tokens (B, F, N, D); see `WanBlock.forward`.

        Args:
            attends, texts: one for each block of the stack.
            keep: the last block's.
        """
        vectors = modulation[..., :BLOCK_VECTORS, :]  # (B, F, 6, D)
        chosen = range(*blocks.indices(len(self.blocks)))
        for number in chosen:
            block = self.blocks[number]
            kept = keep if number == chosen[-1] else None
            arguments = (x, vectors, rotary, attends[number], texts[number], kept)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)  # (B, F, N, D)
        return x

    def run_cached(self, x: Tensor, modulation: Tensor, rotary: Rotary, cache: Cache) -> Tensor:
        """Run all blocks over tokens that follow those in the cache, and write their keys."""
        attends = [partial(cache.attend, layer) for layer in range(len(self.blocks))]
        keys, values = (part[: len(self.blocks), : len(x)] for part in text_in(cache))
        texts = list(zip(keys, values, strict=True))
        return self.run(x, modulation, rotary, attends, texts)  # (B, F, N, D)

    def read_out(self, x: Tensor, modulation: Tensor, latents: Tensor) -> Tensor:
        """Read velocities out of tokens (B, F, N, D), shaped as latents (B, F, C, H, W)."""
        e = modulation[..., BLOCK_VECTORS:, :]  # (B, F, 1, D)
        shift, scale = (at_least_float32(self.scale_shift_table) + e).unsqueeze(-2).unbind(-3)
        h = modulate(layer_norm(self.norm_out, x), shift, scale).type_as(x)  # (B, F, N, D)
        _, rows, columns = self.sizes.patch_size
        velocity = rearrange(
            self.proj_out(h),
            "b f (h w) (p q c) -> b f c (h p) (w q)",
            h=latents.shape[-2] // rows,
            p=rows,
            q=columns,
        )
        return at_least_float32(velocity)  # (B, F, C, H, W)


def text_in(cache: Cache) -> TextKeys:
    """Find a cache's text.

    Raises:
        ScdError: there is none.
    """
    if cache.text is None:
        raise ScdError("the cache holds no text: give Rollout.reset one")
    return cache.text
