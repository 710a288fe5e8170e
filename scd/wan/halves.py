"""The two halves of an `SCDWan`: the causal encoder and the frame decoder."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from scd.models.attention import (
    block_causal_attention,
    block_causal_block_mask,
    uses_flex,
    within_frames_attention,
)
from scd.models.config import count_patches
from scd.models.teacher_forcing import clean_and_noisy
from scd.models.world_model import Cache, FirstLook
from scd.options import WanFusion
from scd.wan.block import KeysValues
from scd.wan.stack import CLEAN_TIMESTEP, WanSizes, WanStack


class WanEncoder(WanStack):
    """The first blocks of Wan, run once per frame over clean frames.

    With a first look at a frame, clean frames are encoded under their own conditions, and its
    context is the output at the noisy frame itself.

    Args:
        start: a learned frame stands before frame 0, at position -1, and gives its context.
    """

    def __init__(self, sizes: WanSizes, layers: int, num_actions: int, start: bool):
        super().__init__(sizes, layers, num_actions, predicts=False)
        bias = self.patch_embedding.bias
        assert bias is not None
        self.start = nn.Parameter(bias.detach().clone()) if start else None

    def forward(
        self,
        latents: Tensor,
        conditions: Tensor | None,
        text: Tensor,
        history_gradient: bool = True,
        first_look: FirstLook | None = None,
    ) -> Tensor:
        """Encode the contexts of the frames after the given ones.

        Args:
            latents: (B, F, C, H, W), clean.
            conditions: (B, F), entry j for frame j+1. Where the learned start comes first, or with
                a first look: (B, 1 + F), of frames 0..F.
            text: (B, T, text_dim).
            history_gradient: see `WorldModel.forward`.
            first_look: at the last F' of the frames 0..F; only their contexts are then encoded.

        Returns:
            (B, F, N, D), or (B, 1 + F, N, D) where the learned start comes first; with a first look
            (B, F', N, D).
        """
        if first_look is not None:
            return self._look(latents, conditions, text, history_gradient, first_look)
        x = self._with_start(latents, 0)  # (B, F, N, D)
        frames, n = x.shape[1:3]
        block_mask = None
        if uses_flex(frames * n, x.device):
            block_mask = block_causal_block_mask(n, frames * n, frames * n, x.device)
        attend = partial(
            block_causal_attention,
            tokens_per_frame=n,
            block_mask=block_mask,
            history_gradient=history_gradient,
        )
        times = torch.full(x.shape[:2], CLEAN_TIMESTEP, device=x.device)
        modulation = self.modulation(times, conditions)  # (B, F, 7, D)
        rotary = self.rotary(self._positions(frames, 0, x), latents)
        texts = [self.embed_text(text)] * len(self.blocks)
        return self.run(x, modulation, rotary, [attend] * len(self.blocks), texts)  # (B, F, N, D)

    def _look(
        self,
        latents: Tensor,
        conditions: Tensor | None,
        text: Tensor,
        history_gradient: bool,
        first_look: FirstLook,
    ) -> Tensor:
        """Encode one sequence [clean frames 0..F-1 ‖ first look at the last F' of frames 0..F]."""
        clean, layers = latents.shape[1], len(self.blocks)
        noisy = first_look.noisy[:, None].to(latents)  # (B, 1, F', C, H, W)
        times = first_look.timesteps[:, None]  # (B, 1, F')
        (height, width), (_, rows, columns) = latents.shape[-2:], self.sizes.patch_size
        n = count_patches(height, width, rows, columns)
        sequence = clean_and_noisy(
            latents, noisy, times, conditions, n, history_gradient, clean_timestep=CLEAN_TIMESTEP
        )
        x = self.embed(sequence.frames)  # (B, F + F', N, D)
        modulation = self.modulation(sequence.timesteps, sequence.conditions)  # (B, F + F', 7, D)
        rotary = self.rotary(sequence.positions, sequence.frames)
        texts = [self.embed_text(text)] * layers
        x = self.run(x, modulation, rotary, [sequence.attend] * layers, texts)
        return x[:, clean:]  # (B, F', N, D)

    def prefill(
        self, latents: Tensor, modulation: Tensor, cache: Cache, kept: int | None = None
    ) -> Tensor:
        """Encode frames (B, F, C, H, W) into the KV cache, behind those that it holds.

        Args:
            modulation: (B, F, 7, D); frames count as in `forward`.
            kept: how many of the frames stay in the cache; None: all.

        Returns:
            (B, F, N, D).
        """
        x = self._with_start(latents, cache.frames)  # (B, F, N, D)
        frames = x.shape[1]
        if frames:
            rotary = self.rotary(self._positions(frames, cache.frames, x), latents)
            x = self.run_cached(x, modulation, rotary, cache)  # (B, F, N, D)
            cache.advance(frames if kept is None else kept)
        return x

    def _with_start(self, latents: Tensor, past: int) -> Tensor:
        """Embed frames as (B, F, N, D), with the learned start before a video's first."""
        x = self.embed(latents)
        if self.start is None or past:
            return x
        start = self.start.to(x).expand(len(x), 1, x.shape[2], -1)  # (B, 1, N, D)
        return torch.cat([start, x], dim=1)  # (B, 1 + F, N, D)

    def _positions(self, frames: int, past: int, like: Tensor) -> Tensor:
        first = past if self.start is None else past - 1
        return torch.arange(first, first + frames, device=like.device)


class WanDecoder(WanStack):
    """The first and the last blocks of Wan, inside one frame, under the encoder's context.

    Args:
        first, last: how many blocks are from Wan's beginning, and from its end.
        fusion: `token_concat`: all blocks run over context and noisy tokens side by side, at the
            same rows and columns. `middle`: the first blocks run over the noisy tokens alone; a
            Linear of their output, which starts at zero, is added to the context, and the last
            blocks run over the sum: half the tokens. With `encoder_frame=noise`, and the blocks
            that the encoder has not, the start is Wan itself at the noise level of the first look,
            but that the last blocks see one frame.
    """

    def __init__(self, sizes: WanSizes, first: int, last: int, num_actions: int, fusion: WanFusion):
        super().__init__(sizes, first + last, num_actions, predicts=True)
        self.first = first
        self.fuse = nn.Linear(sizes.width, sizes.width) if fusion == "middle" else None
        if self.fuse is not None:
            nn.init.zeros_(self.fuse.weight)
            nn.init.zeros_(self.fuse.bias)

    def block_texts(self, text: Tensor) -> list[Tensor]:
        """List what every block takes of the text encoder's output (B, T, text_dim)."""
        return [self.embed_text(text)] * len(self.blocks)

    def forward(
        self,
        noisy: Tensor,
        context: Tensor,
        modulation: Tensor,
        texts: Sequence[Tensor | KeysValues],
    ) -> Tensor:
        """Predict the velocities of noisy frames, each independent of the others.

        Args:
            noisy: (B, F, C, H, W).
            context: (B, F, N, D), of these frames.
            modulation: (B, F, 7, D), of their noise levels and actions.
            texts: one for each block, of samples (B).

        Returns:
            (B, F, C, H, W).
        """
        x = self.embed(noisy)  # (B, F, N, D)
        context, n = context.type_as(x), x.shape[2]
        # Only the row and the column matter inside a frame.
        rotary = self.rotary(torch.zeros(1, device=noisy.device), noisy)
        attend = partial(within_frames_attention, frames=noisy.shape[1])
        attends = [attend] * len(self.blocks)
        if self.fuse is None:
            x = torch.cat([context, x], dim=2)  # (B, F, 2·N, D)
            x = self.run(x, modulation, rotary.twice(), attends, texts, keep=n)  # (B, F, N, D)
        else:
            early, late = slice(self.first), slice(self.first, None)
            x = self.run(x, modulation, rotary, attends, texts, early)  # (B, F, N, D)
            x = context + self.fuse(x)  # (B, F, N, D)
            x = self.run(x, modulation, rotary, attends, texts, late)  # (B, F, N, D)
        return self.read_out(x, modulation, noisy)  # (B, F, C, H, W)
