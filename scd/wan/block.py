"""Wan's transformer block for frames of a stream: modulated per frame, at any position, cached.

Parameters, their names and the arithmetic are those of diffusers' `WanTransformerBlock`. New are
one modulation a frame instead of one a token, rotary positions that start anywhere, attention that
the caller chooses, and keys and values of the text that can be computed beforehand.

Notation: B batch, F frames, N tokens of a frame, D width, T text tokens.
"""

from typing import NamedTuple, TypeAlias

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from einops import rearrange
from torch import Tensor, nn

from scd.models.attention import full_attention
from scd.models.layers import Attend, modulate
from scd.models.rotary import token_angles

KeysValues: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values of a text in one layer, (B, heads, T, head_dim) each."""


def at_least_float32(x: Tensor) -> Tensor:
    """Convert to float32 what is less exact: norms, gates and rotations are computed so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a LayerNorm of diffusers (or the identity in its place), in float32 or better."""
    x = at_least_float32(x)
    if not isinstance(norm, nn.LayerNorm):
        return norm(x)
    weight, bias = (None if p is None else p.type_as(x) for p in (norm.weight, norm.bias))
    return nn.functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Norm queries or keys (..., D) over all heads together, as Wan does, in the type of x.

    Under autocast the weight has another type, for which torch has no fused kernel.
    """
    return nn.functional.rms_norm(x, tuple(norm.normalized_shape), norm.weight.type_as(x), norm.eps)


def gated_sum(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """Compute x + gate·h in float32 or better, in the type of x."""
    return torch.addcmul(at_least_float32(x), gate, at_least_float32(h)).type_as(x)


class Rotary(NamedTuple):
    """Cosines and sines of the position angles of every token, (F, N, head_dim) each.

    Each angle appears twice, side by side; its first sine is negated.
    """

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate neighbouring channels of x (B, heads, F, tokens, head_dim).

        Of the tokens of a frame, x may hold the last ones only.
        """
        cos, sin = (table[:, -x.shape[-2] :] for table in self)
        x32 = at_least_float32(x)
        swapped = x32.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return (x32 * cos + swapped * sin).type_as(x)

    def twice(self) -> "Rotary":
        """Let every frame hold its tokens two times, both at the same positions."""
        return Rotary(*(table.repeat(1, 2, 1) for table in self))


def rotary_positions(frames: Tensor, height: int, width: int, head_dim: int) -> Rotary:
    """Compute Wan's rotary angles of (frame, row, column) for every token of the given frames.

    Args:
        frames: (F,) frame indices; a stream may start at any.
        height, width: tokens in a column and in a row.
    """
    of_place = 2 * (head_dim // 6)  # channels of a row, and of a column; the frame has the rest
    dims = head_dim - 2 * of_place, of_place, of_place
    cos, sin = token_angles(frames, height, width, dims)  # (F, N, head_dim / 2) each
    return Rotary(cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2))


class WanBlock(WanTransformerBlock):
    """One block of Wan: self-attention, cross-attention to the text, feed-forward network."""

    def text_keys(self, text: Tensor) -> KeysValues:
        """Compute keys and values of embedded text tokens (B, T, D)."""
        attention = self.attn2
        keys = rms_norm(attention.norm_k, attention.to_k(text))
        return self._by_head(keys), self._by_head(attention.to_v(text))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        attend: Attend,
        text: Tensor | KeysValues,
        keep: int | None = None,
    ) -> Tensor:
        """Add what the three branches make of tokens: (B, F, N, D) -> (B, F, N, D).

        Args:
            modulation: (B, F or 1, 6, D), of the frames, without this block's own table.
            text: embedded tokens (B, T, D), or their keys and values in this block.
            keep: only the last tokens of every frame are wanted: (B, F, keep, D).
        """
        vectors = at_least_float32(self.scale_shift_table) + modulation  # (B, F, 6, D)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors.unsqueeze(-2).unbind(-3)
        h = modulate(layer_norm(self.norm1, x), shift, scale).type_as(x)  # (B, F, N, D)
        h = self._attend_to_frames(h, rotary, attend, keep)  # (B, F, keep, D)
        x = gated_sum(x[:, :, -h.shape[2] :], gate, h)  # (B, F, keep, D)
        h = layer_norm(self.norm2, x).type_as(x)  # (B, F, keep, D)
        x = x + self._attend_to_text(h, text)  # (B, F, keep, D)
        h = modulate(layer_norm(self.norm3, x), mlp_shift, mlp_scale).type_as(x)  # (B, F, keep, D)
        return gated_sum(x, mlp_gate, self.ffn(h))  # (B, F, keep, D)

    def _attend_to_frames(
        self, h: Tensor, rotary: Rotary, attend: Attend, keep: int | None
    ) -> Tensor:
        attention, asking = self.attn1, h if keep is None else h[:, :, -keep:]
        q = rms_norm(attention.norm_q, attention.to_q(asking))  # (B, F, keep, D)
        k = rms_norm(attention.norm_k, attention.to_k(h))  # (B, F, N, D)
        v = attention.to_v(h)  # (B, F, N, D)
        q, k = (rotary.rotate(self._by_head(x)).flatten(2, 3) for x in (q, k))
        out = attend(q, k, self._by_head(v).flatten(2, 3))  # (B, heads, F·keep, d)
        out = rearrange(out, "b h (f n) d -> b f n (h d)", f=h.shape[1])  # (B, F, keep, D)
        return attention.to_out[1](attention.to_out[0](out))  # (B, F, keep, D)

    def _attend_to_text(self, h: Tensor, text: Tensor | KeysValues) -> Tensor:
        keys, values = self.text_keys(text) if isinstance(text, Tensor) else text
        attention, frames = self.attn2, h.shape[1]
        q = rms_norm(attention.norm_q, attention.to_q(h)).type_as(keys)  # (B, F, N, D)
        # Tokens behind the end of the text are zeros, and attended to: Wan was trained so.
        out = full_attention(self._by_head(q).flatten(2, 3), keys, values)  # (B, heads, F·N, d)
        out = rearrange(out, "b h (f n) d -> b f n (h d)", f=frames)  # (B, F, N, D)
        return attention.to_out[1](attention.to_out[0](out))  # (B, F, N, D)

    def _by_head(self, x: Tensor) -> Tensor:
        """Split channels into heads: (B, ..., T, D) -> (B, heads, ..., T, head_dim)."""
        return x.unflatten(-1, (self.attn1.heads, -1)).movedim(-2, 1)
