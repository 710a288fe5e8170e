"""The causal encoder: runs once per frame over clean history and writes the script of the next."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scd.models.attention import block_causal_attention
from scd.models.layers import (
    Block,
    Conditioning,
    OutputNorm,
    initialise,
    patchify,
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
        self.conditioning = Conditioning(width, num_conditions)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm_out = OutputNorm(width, modulate_output)
        initialise(self)
        self.start = nn.Parameter(0.02 * torch.randn(width)) if first_frame else None

    def forward(
        self,
        latents: Tensor,
        conditions: Tensor | None,
        perturbation: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Contexts of the frames after the given ones.

        Args:
            latents: (B, F, C, H, W).
            conditions: (B, F), entry j for frame j+1; None: the null condition. Where the learned
                start comes first: (B, 1 + F), for frames 0..F.
            perturbation: as the contexts, added to them once normed.
            cache: keys and values of earlier frames; these frames are appended to it.

        Returns:
            (B, F, N, D), or (B, 1 + F, N, D) where the learned start comes first.
        """
        hidden, e = self.hidden(latents, conditions, cache)
        return self.norm_out(hidden, e, perturbation)

    def hidden(
        self, latents: Tensor, conditions: Tensor | None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """What `norm_out` takes: hidden tokens (B, F, N, D) and conditioning vectors (B, F, D)."""
        batch, _, _, height, width = latents.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        seen = cache.frames if cache is not None else 0
        x = self.embed(patchify(latents, self.patch_size).to(self.embed.weight.dtype))
        position = seen
        if self.start is not None:
            position = seen - 1
            if not seen:
                x = torch.cat([self.start.expand(batch, 1, rows * columns, -1), x], dim=1)
        frames = x.shape[1]  # x is (B, F, N, D)
        indices = torch.arange(position, position + frames, device=latents.device)
        rotary = rotary_positions(indices, rows, columns)
        clean = torch.full((batch, frames), CLEAN_TIMESTEP, device=latents.device)
        e = self.conditioning(clean, conditions)  # (B, F, D)
        for layer, block in enumerate(self.blocks):
            if cache is not None:
                attend = partial(cache.attend, layer)
            else:
                attend = partial(block_causal_attention, tokens_per_frame=rows * columns)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, e, rotary, attend, use_reentrant=False)
            else:
                x = block(x, e, rotary, attend)
        if cache is not None:
            cache.advance(frames)
        return x, e
