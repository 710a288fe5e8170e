"""The causal encoder: runs once per frame over clean history and writes the script of the next."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scd.models.attention import block_causal_attention, block_causal_blocks, needs_blocks
from scd.models.layers import (
    Attend,
    Block,
    BlockModulation,
    Conditioning,
    Modulations,
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
        self, latents: Tensor, conditions: Tensor | None, perturbation: Tensor | None = None
    ) -> Tensor:
        """Contexts of the frames after the given ones.

        Args:
            latents: (B, F, C, H, W).
            conditions: (B, F) or (B, F, V + 1), entry j for frame j+1; None: the null condition.
                Where the learned start comes first: (B, 1 + F, …), for frames 0..F.
            perturbation: as the contexts, added to them once normed.

        Returns:
            (B, F, N, D), or (B, 1 + F, N, D) where the learned start comes first.
        """
        batch, frames = latents.shape[:2]
        count = frames if self.start is None else 1 + frames
        e = self._conditioning((batch, count), conditions)  # (B, F, D)
        rows, columns = self._grid(latents)
        n, tokens = rows * columns, count * rows * columns
        blocks = None
        if needs_blocks(tokens, latents.device):
            blocks = block_causal_blocks(n, tokens, tokens, latents.device)
        attend = partial(block_causal_attention, tokens_per_frame=n, blocks=blocks)
        depth = len(self.blocks)
        x = self._run(latents, 0, [e] * depth, [attend] * depth)
        return self.norm_out(x, e, perturbation)

    def modulations(self, conditions: Tensor) -> Modulations:
        """For `take_in`: under each of the conditions (R,) or (R, V + 1)."""
        return Modulations.of(
            self.blocks, self.norm_out, self._conditioning((len(conditions),), conditions)
        )

    def take_in(
        self, latents: Tensor, modulations: Modulations, cache: Cache
    ) -> Callable[[Tensor | None], Tensor]:
        """`forward` behind the frames of a cache, to which these are added.

        Args:
            modulations: (B, F) of them, as the conditions of `forward`.

        Returns:
            perturbation -> contexts, as of `forward`.
        """
        of_blocks, of_norm_out = modulations.by_layer(len(self.blocks))
        attends = [partial(cache.attend, layer) for layer in range(len(self.blocks))]
        x = self._run(latents, cache.frames, of_blocks, attends)
        cache.advance(x.shape[1])
        return partial(self.norm_out, x, of_norm_out)

    def _conditioning(self, shape: tuple[int, ...], conditions: Tensor | None) -> Tensor:
        device = self.embed.weight.device
        return self.conditioning(torch.full(shape, CLEAN_TIMESTEP, device=device), conditions)

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        return latents.shape[-2] // self.patch_size, latents.shape[-1] // self.patch_size

    def _run(
        self,
        latents: Tensor,
        seen: int,
        of_blocks: Sequence[Tensor | BlockModulation],
        attends: Sequence[Attend],
    ) -> Tensor:
        """Embedding and blocks, for frames (B, F, C, H, W) that follow `seen` others."""
        rows, columns = self._grid(latents)
        x = self.embed(patchify(latents, self.patch_size).to(self.embed.weight.dtype))
        position = seen
        if self.start is not None:
            position = seen - 1
            if not seen:
                x = torch.cat([self.start.expand(len(x), 1, rows * columns, -1), x], dim=1)
        # x is (B, F, N, D)
        indices = torch.arange(position, position + x.shape[1], device=latents.device)
        rotary = rotary_positions(indices, rows, columns)
        for block, e, attend in zip(self.blocks, of_blocks, attends, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, e, rotary, attend, use_reentrant=False)
            else:
                x = block(x, e, rotary, attend)
        return x
