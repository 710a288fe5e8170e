"""The causal encoder: runs once per frame over clean frames, and writes the context of the next."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scd.models.attention import (
    block_causal_attention,
    block_causal_block_mask,
    own_frame_attention,
    uses_flex,
)
from scd.models.layers import (
    Attend,
    Block,
    ConditionEmbedding,
    Modulations,
    OutputNorm,
    initialize,
    look_up,
    patchify,
    precompute_modulation,
    project,
    rotary_positions,
)
from scd.models.world_model import CLEAN_TIMESTEP, Cache


class CausalEncoder(nn.Module):
    """Latents of frames 0..j and the conditions of frames 1..j+1 -> the context of frame j+1.

    Args:
        first_frame: a learned frame stands before frame 0, at position -1; under the condition of
            frame 0 it gives the context of frame 0, and every later frame sees it.
    """

    def __init__(
        self,
        channels: int,
        patch_size: int,
        width: int,
        layers: int,
        num_conditions: int,
        modulate_output: bool,
        first_frame: bool = False,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.gradient_checkpointing = False
        self.embed = nn.Linear(channels * patch_size**2, width)
        self.conditioning = ConditionEmbedding(width, num_conditions)
        self.blocks = nn.ModuleList(Block(width, number) for number in range(layers))
        self.norm_out = OutputNorm(width, modulate_output)
        initialize(self)
        self.start = nn.Parameter(0.02 * torch.randn(width)) if first_frame else None

    def forward(
        self,
        latents: Tensor,
        conditions: Tensor | None,
        perturbation: Tensor | None = None,
        history_gradient: bool = True,
    ) -> Tensor:
        """Encode the contexts of the frames after the given ones.

        Args:
            latents: (B, F, C, H, W).
            conditions: (B, F) or (B, F, V + 1), entry j for frame j+1; None: the null condition.
                Where the learned start comes first: (B, 1 + F, …), for frames 0..F.
            perturbation: shaped as the contexts, added to them once normed.
            history_gradient: False: contexts have no gradient through the keys and values of
                earlier frames.

        Returns:
            (B, F, N, D), or (B, 1 + F, N, D) where the learned start comes first.
        """
        batch, frames = latents.shape[:2]
        frames = frames if self.start is None else 1 + frames
        n = self._rows(latents) * self._columns(latents)
        block_mask = None
        if uses_flex(frames * n, latents.device):
            block_mask = block_causal_block_mask(n, frames * n, frames * n, latents.device)
        attend: Attend = partial(block_causal_attention, tokens_per_frame=n, block_mask=block_mask)
        if not history_gradient:
            attend = partial(own_frame_attention, tokens_per_frame=n)
        modulations = Modulations(self._embed_conditions((batch, frames), conditions), project)
        x = self._run_blocks(latents, 0, modulations, [attend] * len(self.blocks))  # (B, F, N, D)
        return self.norm_out(x, modulations, perturbation)  # (B, F, N, D)

    def precompute_modulation(self, conditions: Tensor) -> Tensor:
        """Compute the modulation under conditions (R,) or (R, V + 1): (R, 6·L + 2, D)."""
        e = self._embed_conditions((len(conditions),), conditions)  # (R, D)
        return precompute_modulation([*self.blocks, self.norm_out], e)

    def prefill(self, latents: Tensor, modulation: Tensor, cache: Cache) -> Tensor:
        """Encode frames into the KV cache, behind those that it holds.

        Args:
            latents: (B, F, C, H, W).
            modulation: (B, F, 6·L + 2, D), precomputed; frames count as in `forward`.

        Returns:
            (B, F, N, D), what `context` takes.
        """
        attends = [partial(cache.attend, layer) for layer in range(len(self.blocks))]
        x = self._run_blocks(latents, cache.frames, Modulations(modulation, look_up), attends)
        cache.advance(x.shape[1])
        return x

    def context(self, x: Tensor, modulation: Tensor, perturbation: Tensor | None = None) -> Tensor:
        """Norm the tokens (B, F, N, D) of `prefill` to the contexts of `forward`."""
        return self.norm_out(x, Modulations(modulation, look_up), perturbation)

    def _run_blocks(
        self, latents: Tensor, past: int, modulations: Modulations, attends: Sequence[Attend]
    ) -> Tensor:
        """Embed frames (B, F, C, H, W) that follow `past` others, and run all blocks."""
        x = patchify(latents, self.patch_size).to(self.embed.weight.dtype)  # (B, F, N, C·p·p)
        x = self.embed(x)  # (B, F, N, D)
        position = past
        if self.start is not None:
            position = past - 1
            if not past:
                start = self.start.expand(len(x), 1, x.shape[2], -1)  # (B, 1, N, D)
                x = torch.cat([start, x], dim=1)  # (B, 1 + F, N, D)
        positions = torch.arange(position, position + x.shape[1], device=latents.device)
        rotary = rotary_positions(positions, self._rows(latents), self._columns(latents))
        for block, attend in zip(self.blocks, attends, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, modulations, rotary, attend, use_reentrant=False)
            else:
                x = block(x, modulations, rotary, attend)  # (B, F, N, D)
        return x

    def _embed_conditions(self, shape: tuple[int, ...], conditions: Tensor | None) -> Tensor:
        """Embed the conditions of clean frames (...) as (..., D)."""
        device = self.embed.weight.device
        return self.conditioning(torch.full(shape, CLEAN_TIMESTEP, device=device), conditions)

    def _rows(self, latents: Tensor) -> int:
        return latents.shape[-2] // self.patch_size

    def _columns(self, latents: Tensor) -> int:
        return latents.shape[-1] // self.patch_size
