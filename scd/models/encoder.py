"""The causal encoder: runs over clean frames, and writes the context of each frame to come."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scd.models.attention import (
    block_causal_attention,
    block_causal_block_mask,
    clean_context_attention,
    clean_context_block_mask,
    own_frame_attention,
    uses_flex,
)
from scd.models.layers import (
    Attend,
    Block,
    ConditionEmbedding,
    Modulations,
    OutputNorm,
    Rotary,
    initialize,
    look_up,
    patchify,
    precompute_modulation,
    project,
    rotary_positions,
)
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
        attend: Attend = partial(block_causal_attention, tokens_per_frame=n, block_mask=block_mask)
        if not history_gradient:
            attend = partial(own_frame_attention, tokens_per_frame=n)
        modulations = Modulations(self._embed_conditions((batch, frames), conditions), project)
        x = self._embed(latents, from_start=True)  # (B, F, N, D)
        rotary = self._rotary(latents, torch.arange(frames, device=latents.device))
        x = self._run_blocks(x, rotary, modulations, [attend] * len(self.blocks))  # (B, F, N, D)
        return self.norm_out(x, modulations, perturbation)  # (B, F, N, D)

    def _look(
        self,
        latents: Tensor,
        conditions: Tensor | None,
        perturbation: Tensor | None,
        history_gradient: bool,
        first_look: FirstLook,
    ) -> Tensor:
        """Encode one sequence [clean frames 0..F-1 ‖ first look at the last F' of frames 0..F]."""
        clean, looks = latents.shape[1], first_look.noisy.shape[1]
        first, device = clean + 1 - looks, latents.device
        n = self._rows(latents) * self._columns(latents)
        block_mask = None
        if uses_flex(tokens := (clean + looks) * n, device):
            block_mask = clean_context_block_mask(n, clean, first, tokens, device)
        attend = partial(
            clean_context_attention,
            tokens_per_frame=n,
            clean_frames=clean,
            first=first,
            block_mask=block_mask,
            history_gradient=history_gradient,
        )
        clean_times = torch.full((len(latents), clean), CLEAN_TIMESTEP, device=device)
        times = torch.cat([clean_times, first_look.timesteps], dim=1)  # (B, F + F')
        if conditions is not None:
            conditions = torch.cat([conditions[:, :-1], conditions[:, first:]], dim=1)
        e = self.conditioning(times, conditions)  # (B, F + F', D)
        frames = torch.cat([latents, first_look.noisy], dim=1)  # (B, F + F', C, H, W)
        positions = torch.arange(clean + 1, device=device)
        rotary = self._rotary(latents, torch.cat([positions[:-1], positions[first:]]))
        x = self._embed(frames, from_start=False)  # (B, F + F', N, D)
        attends = [attend] * len(self.blocks)
        x = self._run_blocks(x, rotary, Modulations(e, project), attends)  # (B, F + F', N, D)
        modulations = Modulations(e[:, clean:], project)  # of (B, F')
        return self.norm_out(x[:, clean:], modulations, perturbation)  # (B, F', N, D)

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
        x = self._run_blocks(x, rotary, Modulations(modulation, look_up), attends)
        cache.advance(x.shape[1] if kept is None else kept)
        return x

    def context(self, x: Tensor, modulation: Tensor, perturbation: Tensor | None = None) -> Tensor:
        """Norm the tokens (B, F, N, D) of `prefill` to the contexts of `forward`."""
        return self.norm_out(x, Modulations(modulation, look_up), perturbation)

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

    def _run_blocks(
        self, x: Tensor, rotary: Rotary, modulations: Modulations, attends: Sequence[Attend]
    ) -> Tensor:
        """Run all blocks over tokens: (B, F, N, D) -> (B, F, N, D)."""
        for block, attend in zip(self.blocks, attends, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, modulations, rotary, attend, use_reentrant=False)
            else:
                x = block(x, modulations, rotary, attend)  # (B, F, N, D)
        return x

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
