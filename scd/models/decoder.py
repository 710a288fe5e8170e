"""The frame decoder: once per denoising step, inside one frame, under the encoder's context."""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scd.models.attention import full_attention
from scd.models.layers import (
    NORM_EPS,
    Block,
    BlockModulation,
    Conditioning,
    Modulated,
    Modulations,
    OutputNorm,
    Rotary,
    initialise,
    patchify,
    rotary_positions,
    unpatchify,
)
from scd.models.linear import Float32Linear
from scd.options import Fusion

FUSIONS = get_args(Fusion)


class FrameDecoder(nn.Module):
    """Noisy frame, its context, its noise level and condition -> the network's prediction.

    Args:
        fusion: how context and noisy tokens are joined: along the sequence (`token_concat`), so
            after a LayerNorm and Linear of the context (`token_concat_with_proj`), by a Linear of
            the two side by side (`concat`), or by their sum (`add`).
        exact_residuals: what the blocks add up stays in float32 also where they compute in bf16:
            for a prediction that is divided by σ, which magnifies its rounding. The last norm and
            Linear are in float32 anyway.
    """

    def __init__(
        self,
        channels: int,
        patch_size: int,
        width: int,
        layers: int,
        num_conditions: int,
        modulate_output: bool,
        fusion: str,
        exact_residuals: bool = False,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.fusion = fusion
        self.exact_residuals = exact_residuals
        self.gradient_checkpointing = False
        self.embed = nn.Linear(channels * patch_size**2, width)
        self.conditioning = Conditioning(width, num_conditions)
        if fusion == "token_concat_with_proj":
            self.context_norm = nn.LayerNorm(width, eps=NORM_EPS)
            self.context_proj = nn.Linear(width, width)
        elif fusion == "concat":
            self.fuse = nn.Linear(2 * width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm_out = OutputNorm(width, modulate_output)
        self.unembed = Float32Linear(width, channels * patch_size**2)
        initialise(self)
        nn.init.zeros_(self.unembed.weight)
        if fusion == "token_concat_with_proj":
            nn.init.zeros_(self.context_proj.weight)
        elif fusion == "concat":
            identity = torch.eye(width)
            self.fuse.weight.data.copy_(torch.cat([identity, identity], dim=1))

    def forward(self, noisy: Tensor, context: Tensor, e: Tensor | Modulations) -> Tensor:
        """Frames are independent of each other.

        Args:
            noisy: (B, F, C, H, W).
            context: (B, F, N, D), of these same frames.
            e: (B, F, D), conditioning vectors of these same frames (`conditioning`: of their
                timesteps and conditions), or (B, F) of what `modulations` made of such vectors.

        Returns:
            (B, F, C, H, W): velocity or clean frame, as the model was trained.
        """
        batch, _, _, height, width = noisy.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        tokens = rows * columns
        # Every frame is frame 0 of a sequence of its own: (B·F, 1, N, D).
        x = self.embed(patchify(noisy, self.patch_size).to(self.embed.weight.dtype)).flatten(0, 1)
        x = self._join(context.flatten(0, 1).type_as(x), x).unsqueeze(1)
        x = x.float() if self.exact_residuals else x
        rotary = rotary_positions(torch.zeros(1, device=noisy.device), rows, columns)
        if x.shape[2] == 2 * tokens:
            # Context tokens carry the same row and column as the noisy tokens.
            rotary = Rotary(*(table.repeat(2, 1) for table in rotary))
        depth = len(self.blocks)
        of_blocks: Sequence[Tensor | BlockModulation]
        of_norm_out: Tensor | Modulated | None
        if isinstance(e, Tensor):
            e = e.flatten(0, 1).unsqueeze(1)
            of_blocks, of_norm_out = [e] * depth, e
        else:
            of_blocks, of_norm_out = Modulations(e.values.flatten(0, 1).unsqueeze(1)).by_layer(
                depth
            )
        for number, (block, of_block) in enumerate(zip(self.blocks, of_blocks, strict=True), 1):
            # Of the last block nobody reads the context half.
            keep = tokens if number == depth else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, of_block, rotary, full_attention, keep, use_reentrant=False
                )
            else:
                x = block(x, of_block, rotary, full_attention, keep)
        x = self.unembed(self.norm_out(x.float(), of_norm_out))
        return unpatchify(x.squeeze(1).unflatten(0, (batch, -1)), self.patch_size, height, width)

    def modulations(self, timesteps: Tensor, conditions: Tensor) -> Modulations:
        """For `forward`: of timesteps (R, T) under conditions (R, T) or (R, T, V + 1)."""
        return Modulations.of(self.blocks, self.norm_out, self.conditioning(timesteps, conditions))

    def _join(self, context: Tensor, x: Tensor) -> Tensor:
        """Context and noisy tokens, both (B, N, D) -> (B, N or 2N, D)."""
        if self.fusion == "add":
            return context + x
        if self.fusion == "concat":
            return self.fuse(torch.cat([x, context], dim=-1))
        if self.fusion == "token_concat_with_proj":
            context = self.context_proj(self.context_norm(context))
        return torch.cat([context, x], dim=1)
