"""The causal encoder: runs over clean frames, and writes the context of each frame to come."""

from functools import partial

import torch
from torch import Tensor, nn

from scd.models.attention import (
    block_causal_attention,
    block_causal_block_mask,
    uses_flex,
)
from scd.models.layers import (
    Block,
    ConditionEmbedding,
    OutputNorm,
    initialize,
    patchify,
    precompute_modulation,
    run_blocks,
)
from scd.models.rotary import Rotary, rotary_positions
from scd.models.teacher_forcing import clean_and_noisy
from scd.models.world_model import CLEAN_TIMESTEP, Cache, FirstLook


class CausalEncoder(nn.Module):
    """Latents of frames 0..j and the conditions of frames 1..j+1 -> the context of frame j+1.

    With a first look at frame j+1, clean frames are encoded under their own conditions, and the
    context is the output at the noisy frame itself.

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
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm_out = OutputNorm(width, modulate_output)
        initialize(self)
        self.start = nn.Parameter(0.02 * torch.randn(width)) if first_frame else None

    def forward(
        self,
        latents: Tensor,
        conditions: Tensor | None,
        *,
        perturbation: Tensor | None = None,
        history_gradient: bool = True,
        first_look: FirstLook | None = None,
    ) -> Tensor:
        """Encode the contexts of the frames after the given ones.

        Args:
            latents: (B, F, C, H, W).
            conditions: (B, F) or (B, F, V + 1), entry j for frame j+1; None: the null condition.
                Where the learned start comes first, or with a first look: (B, 1 + F, …), of frames
                0..F.
            perturbation: shaped as the contexts, added to them once normed.
            history_gradient: False: contexts have no gradient through the keys and values of
                earlier frames.
            first_look: at the last F' of the frames 0..F; only their contexts are then encoded.

        Returns:
            (B, F, N, D), or (B, 1 + F, N, D) where the learned start comes first; with a first look
            (B, F', N, D).
        """
        if first_look is not None:
            return self._look(latents, conditions, perturbation, history_gradient, first_look)
        batch, frames = latents.shape[:2]
        frames = frames if self.start is None else 1 + frames
        n = self._rows(latents) * self._columns(latents)
        block_mask = None
        if uses_flex(frames * n, latents.device):
            block_mask = block_causal_block_mask(n, frames * n, frames * n, latents.device)
        attend = partial(
            block_causal_attention,
            tokens_per_frame=n,
            block_mask=block_mask,
            history_gradient=history_gradient,
        )
        e = self._embed_conditions((batch, frames), conditions)  # (B, F, D)
        x = self._embed(latents, from_start=True)  # (B, F, N, D)
        rotary = self._rotary(latents, torch.arange(frames, device=latents.device))
        attends = [attend] * len(self.blocks)
        x = run_blocks(self.blocks, x, e, rotary, attends, self.gradient_checkpointing)
        return self.norm_out(x, e, perturbation)  # (B, F, N, D)

    def _look(
        self,
        latents: Tensor,
        conditions: Tensor | None,
        perturbation: Tensor | None,
        history_gradient: bool,
        first_look: FirstLook,
    ) -> Tensor:
        """Encode one sequence [clean frames 0..F-1 ‖ first look at the last F' of frames 0..F]."""
        clean, n = latents.shape[1], self._rows(latents) * self._columns(latents)
        noisy, times = (x[:, None] for x in first_look)  # (B, 1, F', C, H, W) and (B, 1, F')
        sequence = clean_and_noisy(latents, noisy, times, conditions, n, history_gradient)
        e = self.conditioning(sequence.timesteps, sequence.conditions)  # (B, F + F', D)
        x = self._embed(sequence.frames, from_start=False)  # (B, F + F', N, D)
        rotary = self._rotary(latents, sequence.positions)
        attends = [sequence.attend] * len(self.blocks)
        x = run_blocks(self.blocks, x, e, rotary, attends, self.gradient_checkpointing)
        return self.norm_out(x[:, clean:], e[:, clean:], perturbation)  # (B, F', N, D)

    def precompute_modulation(self, conditions: Tensor, timestep: float = CLEAN_TIMESTEP) -> Tensor:
        """Compute the modulation under conditions (R,) or (R, V + 1): (R, 6·L + 2, D)."""
        e = self._embed_conditions((len(conditions),), conditions, timestep)  # (R, D)
        return precompute_modulation([*self.blocks, self.norm_out], e)

    def prefill(
        self,
        latents: Tensor,
        modulation: Tensor,
        cache: Cache,
        kept: int | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Encode frames into the KV cache, behind those that it holds.

        Args:
            latents: (B, F, C, H, W).
            modulation: (B, F, 6·L + 2, D), precomputed; frames count as in `forward`.
            kept: the first of them stay in the cache, the slots of the others are written to
                again; None: all stay.
            rotary: of the frames; None: they follow those that the cache counts.

        Returns:
            (B, F, N, D), what `context` takes.
        """
        past = cache.frames
        x = self._embed(latents, from_start=not past)  # (B, F, N, D)
        if rotary is None:
            positions = torch.arange(past, past + x.shape[1], device=latents.device)
            rotary = self._rotary(latents, positions)
        attends = [partial(cache.attend, layer) for layer in range(len(self.blocks))]
        x = run_blocks(self.blocks, x, modulation, rotary, attends, self.gradient_checkpointing)
        cache.advance(x.shape[1] if kept is None else kept)
        return x

    def context(self, x: Tensor, modulation: Tensor, perturbation: Tensor | None = None) -> Tensor:
        """Norm the tokens (B, F, N, D) of `prefill` to the contexts of `forward`."""
        return self.norm_out(x, modulation, perturbation)

    def _embed(self, latents: Tensor, from_start: bool) -> Tensor:
        """Embed frames (B, F, C, H, W), after the learned start if there is one: (B, F, N, D)."""
        x = patchify(latents, self.patch_size).to(self.embed.weight.dtype)  # (B, F, N, C·p·p)
        x = self.embed(x)  # (B, F, N, D)
        if from_start and self.start is not None:
            start = self.start.expand(len(x), 1, x.shape[2], -1)  # (B, 1, N, D)
            x = torch.cat([start, x], dim=1)  # (B, 1 + F, N, D)
        return x

    def _rotary(self, latents: Tensor, numbers: Tensor) -> Rotary:
        """Compute the angles of frames by their numbers (F,), the learned start among them."""
        positions = numbers if self.start is None else numbers - 1
        return rotary_positions(positions, self._rows(latents), self._columns(latents))

    def _embed_conditions(
        self,
        shape: tuple[int, ...],
        conditions: Tensor | None,
        timestep: float = CLEAN_TIMESTEP,
    ) -> Tensor:
        """Embed the conditions of frames (...), all at one timestep, as (..., D)."""
        device = self.embed.weight.device
        return self.conditioning(torch.full(shape, timestep, device=device), conditions)

    def _rows(self, latents: Tensor) -> int:
        return latents.shape[-2] // self.patch_size

    def _columns(self, latents: Tensor) -> int:
        return latents.shape[-1] // self.patch_size
