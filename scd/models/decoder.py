"""The frame decoder: once per denoising step, inside one frame, under the encoder's context."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from scd.errors import ScdError, did_you_mean
from scd.models.attention import full_attention
from scd.models.layers import (
    NORM_EPS,
    Block,
    ConditionEmbedding,
    Float32Linear,
    OutputNorm,
    initialize,
    patchify,
    precompute_modulation,
    run_blocks,
    unpatchify,
)
from scd.models.rotary import Rotary, rotary_positions


class Fusion(ABC):
    """A way of joining context and noisy tokens to the sequence that the decoder's blocks run over.

    To add one: a subclass, and a line in `FUSIONS`. Nothing else knows them. Layers that it needs
    are attributes of the decoder, so that checkpoints name them without the fusion.
    """

    def layers(self, width: int) -> dict[str, nn.Module]:
        """Make the layers that the fusion needs, by their name in the decoder."""
        return {}

    def initialize(self, decoder: Any) -> None:  # noqa: B027 (most need none)
        """Set initial values of these layers other than those that every Linear gets."""

    @abstractmethod
    def join(self, decoder: Any, context: Tensor, x: Tensor) -> Tensor:
        """Join context and noisy tokens, (B·F, N, D) each, to (B·F, N or 2·N, D).

        Of 2·N tokens the noisy ones come last; only these are predicted from.
        """


class TokenConcat(Fusion):
    """Context and noisy tokens one after the other, along the sequence (the paper's choice)."""

    def join(self, decoder: Any, context: Tensor, x: Tensor) -> Tensor:
        return torch.cat([context, x], dim=1)  # (B·F, 2·N, D)


class TokenConcatWithProjection(Fusion):
    """`TokenConcat` after a LayerNorm and a Linear of the context, which starts at zero."""

    def layers(self, width: int) -> dict[str, nn.Module]:
        norm = nn.LayerNorm(width, eps=NORM_EPS)
        return {"context_norm": norm, "context_proj": nn.Linear(width, width)}

    def initialize(self, decoder: Any) -> None:
        nn.init.zeros_(decoder.context_proj.weight)

    def join(self, decoder: Any, context: Tensor, x: Tensor) -> Tensor:
        context = decoder.context_proj(decoder.context_norm(context))  # (B·F, N, D)
        return torch.cat([context, x], dim=1)  # (B·F, 2·N, D)


class ChannelConcat(Fusion):
    """A Linear of the two side by side, along the channels, which starts as their sum."""

    def layers(self, width: int) -> dict[str, nn.Module]:
        return {"fuse": nn.Linear(2 * width, width)}

    def initialize(self, decoder: Any) -> None:
        identity = torch.eye(decoder.fuse.out_features)
        decoder.fuse.weight.data.copy_(torch.cat([identity, identity], dim=1))

    def join(self, decoder: Any, context: Tensor, x: Tensor) -> Tensor:
        return decoder.fuse(torch.cat([x, context], dim=-1))  # (B·F, N, D)


class Add(Fusion):
    """The sum of the two."""

    def join(self, decoder: Any, context: Tensor, x: Tensor) -> Tensor:
        return context + x  # (B·F, N, D)


FUSIONS: dict[str, Fusion] = {  # by `model.fusion`
    "token_concat": TokenConcat(),
    "token_concat_with_proj": TokenConcatWithProjection(),
    "concat": ChannelConcat(),
    "add": Add(),
}


class FrameDecoder(nn.Module):
    """Noisy frame, its context, its noise level and condition -> the network's prediction.

    Args:
        fusion: name in `FUSIONS`.
        exact_residuals: what the blocks add up stays in float32 also where they compute in bf16:
            for a prediction that is divided by σ, which magnifies its rounding. The last norm and
            Linear are in float32 anyway.

    Raises:
        ScdError: an unknown fusion.
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
        if fusion not in FUSIONS:
            hint = did_you_mean(fusion, FUSIONS)
            raise ScdError(f"model.fusion is {fusion!r}, not one of {', '.join(FUSIONS)}{hint}")
        self.patch_size = patch_size
        self.fusion = FUSIONS[fusion]
        self.exact_residuals = exact_residuals
        self.gradient_checkpointing = False
        self.embed = nn.Linear(channels * patch_size**2, width)
        self.conditioning = ConditionEmbedding(width, num_conditions)
        for name, layer in self.fusion.layers(width).items():
            self.add_module(name, layer)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm_out = OutputNorm(width, modulate_output)
        self.unembed = Float32Linear(width, channels * patch_size**2)
        initialize(self)
        nn.init.zeros_(self.unembed.weight)
        self.fusion.initialize(self)

    def forward(self, noisy: Tensor, context: Tensor, e: Tensor) -> Tensor:
        """Predict frames from noisy ones, each independent of the others.

        Args:
            noisy: (B, F, C, H, W).
            context: (B, F, N, D), of these frames.
            e: (B, F, D), the embeddings of their timesteps and conditions; or (B, F, 6·L + 2, D),
                precomputed modulation.

        Returns:
            (B, F, C, H, W): velocity or clean frame, as the model was trained.
        """
        batch, _, _, height, width = noisy.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        tokens = rows * columns
        # Every frame is frame 0 of a sequence of its own.
        e = e.flatten(0, 1).unsqueeze(1)  # (B·F, 1, D) or (B·F, 1, 6·L + 2, D)
        x = patchify(noisy, self.patch_size).to(self.embed.weight.dtype)  # (B, F, N, C·p·p)
        x = self.embed(x).flatten(0, 1)  # (B·F, N, D)
        context = context.flatten(0, 1).type_as(x)  # (B·F, N, D)
        x = self.fusion.join(self, context, x).unsqueeze(1)  # (B·F, 1, N or 2·N, D)
        x = x.float() if self.exact_residuals else x
        rotary = rotary_positions(torch.zeros(1, device=noisy.device), rows, columns)
        if x.shape[2] == 2 * tokens:
            # Context tokens carry the row and column of the noisy tokens.
            rotary = Rotary(*(table.repeat(2, 1) for table in rotary))
        attends = [full_attention] * len(self.blocks)
        # Nobody reads the context half of the last block.
        x = run_blocks(
            self.blocks, x, e, rotary, attends, self.gradient_checkpointing, keep=tokens
        )  # (B·F, 1, N, D)
        x = self.unembed(self.norm_out(x.float(), e))  # (B·F, 1, N, C·p·p)
        x = x.squeeze(1).unflatten(0, (batch, -1))  # (B, F, N, C·p·p)
        return unpatchify(x, self.patch_size, height, width)  # (B, F, C, H, W)

    def precompute_modulation(self, timesteps: Tensor, conditions: Tensor) -> Tensor:
        """Compute the modulation of timesteps (R, T) under conditions (R, T) or (R, T, V + 1).

        Returns:
            (R, T, 6·L + 2, D).
        """
        e = self.conditioning(timesteps, conditions)  # (R, T, D)
        return precompute_modulation([*self.blocks, self.norm_out], e)
