"""The parts that all models share: embedding of conditions, modulation, block, patches.

Notation: B batch, F frames, N tokens of a frame, D width, 64-wide heads.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scd.models.cpu import Linear
from scd.models.rotary import Rotary
from scd.utils.precision import without_autocast

HEAD_DIM = 64
TIME_CHANNELS = 256
NORM_EPS = 1e-6

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v (B, heads, tokens, head_dim) -> (B, heads, tokens, head_dim)."""


class ConditionEmbedding(nn.Module):
    """The embedding e of a frame's noise level plus that of its action or class label.

    Args:
        num_conditions: actions, classes or components of an action; the table has one more row,
            the null condition. 0: no condition.
    """

    def __init__(self, width: int, num_conditions: int):
        super().__init__()
        self.null = num_conditions
        self.sinusoid = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.time = TimestepEmbedding(TIME_CHANNELS, width)
        self.table = nn.Embedding(num_conditions + 1, width) if num_conditions else None

    def forward(self, timesteps: Tensor, conditions: Tensor | None) -> Tensor:
        """Add up the embeddings of noise levels and conditions.

        Args:
            timesteps: (...) in [0, 1000], or -1 for clean.
            conditions: (...) integers, rows of the table; or (..., num_conditions + 1) floats, how
                much of each row goes in. So an index is the special case of a one-hot vector.

        Returns:
            (..., D).
        """
        sinusoid = self.sinusoid(timesteps.flatten()).unflatten(0, timesteps.shape)
        e = self.time(sinusoid.to(self.time.linear_1.weight.dtype))
        if self.table is not None:
            if conditions is None:
                conditions = torch.full_like(timesteps, self.null, dtype=torch.long)
            if conditions.is_floating_point():
                e = e + conditions.to(self.table.weight.dtype) @ self.table.weight
            else:
                e = e + self.table(conditions)
        return e


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute x·(1 + scale) + shift, for x (B, F, N, D); the others broadcast to it."""
    return torch.addcmul(shift, x, 1 + scale)


class Modulation(nn.Module):
    """Shift, scale and gate of one branch of a block: Linear(SiLU(e))."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 3 * width)

    def forward(self, e: Tensor) -> Tensor:
        """Project embeddings (..., D) to (..., 3, D)."""
        return self.linear(nn.functional.silu(e)).unflatten(-1, (3, -1))


class Float32Linear(nn.Linear):
    """`nn.Linear` in float32, whatever autocast or the type of its weights says."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return nn.functional.linear(x.float(), self.weight.float(), self.bias.float())


class Attention(nn.Module):
    """Multi-head attention with RMS-normed, rotated queries and keys."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = Linear(width, 3 * width)
        self.norm_q = nn.Parameter(torch.ones(HEAD_DIM))
        self.norm_k = nn.Parameter(torch.ones(HEAD_DIM))
        self.out = Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, keep: int | None = None) -> Tensor:
        """Attend among tokens: (B, T, D) -> (B, T, D), or (B, keep, D) for the last ones only."""
        qkv = rearrange(self.qkv(x), "b t (n h d) -> n b h t d", n=3, d=HEAD_DIM)  # (3, B, h, T, d)
        weights = torch.stack([self.norm_q, self.norm_k])[:, None, None, None]  # (2, 1, 1, 1, d)
        # q and k at once, and contiguous: a third of the time of one after the other.
        normed = nn.functional.rms_norm(qkv[:2].contiguous(), (HEAD_DIM,), eps=NORM_EPS)
        normed = normed.type_as(qkv)  # autocast returns float32        (2, B, h, T, d)
        q, k = rotary.rotate(normed * weights.type_as(normed))  # (B, h, T, d) each
        q = q if keep is None else q[:, :, -keep:]  # (B, h, keep, d)
        out = rearrange(attend(q, k, qkv[2]), "b h t d -> b t (h d)")  # (B, keep, D)
        return self.out(out)  # (B, keep, D)


class MLP(nn.Module):
    """D -> 4D, tanh-GELU, -> D."""

    def __init__(self, width: int):
        super().__init__()
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token by itself: (..., D) -> (..., D)."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.down(self.up(x, gelu=True))  # (..., D)
        # The GELU's result, four times as wide as x, is not kept for the backward pass but made
        # again there. A compiled model decides on that by itself.
        return checkpoint(self._narrow, self.up(x), use_reentrant=False, preserve_rng_state=False)

    def _narrow(self, h: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(h, approximate="tanh"))


class Block(nn.Module):
    """x += g1·Attn(LN(x)·(1+s1)+b1);  x += g2·MLP(LN(x)·(1+s2)+b2)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.modulation_attention = Modulation(width)
        self.attention = Attention(width)
        self.modulation_mlp = Modulation(width)
        self.mlp = MLP(width)

    def modulation(self, e: Tensor) -> Tensor:
        """Project embeddings (..., D) to (..., 6, D): both branches' shift, scale and gate."""
        return torch.cat([self.modulation_attention(e), self.modulation_mlp(e)], dim=-2)

    def forward(
        self, x: Tensor, e: Tensor, rotary: Rotary, attend: Attend, keep: int | None = None
    ) -> Tensor:
        """Add what attention and MLP make of tokens: (B, F, N, D) -> (B, F, N, D).

        Args:
            e: (B, F, D), the frames' embeddings, which are projected only here: here FSDP has
                gathered the weights, and gradient checkpointing keeps no more than e. In a rollout
                the projection itself, precomputed: (B, F, 6, D).
            keep: of a single frame (F = 1), only the last tokens are wanted: (B, 1, keep, D).
        """
        modulation = self.modulation(e) if e.ndim == 3 else e  # (B, F, 6, D)
        vectors = modulation.unsqueeze(-2).unbind(-3)  # 6 x (B, F, 1, D)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = vectors
        frames = x.shape[1]
        h = modulate(self.norm(x), shift_attention, scale_attention)  # (B, F, N, D)
        h = self.attention(h.flatten(1, 2), rotary, attend, keep)  # (B, F·N, D) or (B, keep, D)
        h = h.unflatten(1, (frames, -1))  # (B, F, N, D)
        x = torch.addcmul(x[:, :, -h.shape[2] :], gate_attention, h)  # (B, F, N, D)
        h = self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))  # (B, F, N, D)
        return torch.addcmul(x, gate_mlp, h)  # (B, F, N, D)


class OutputNorm(nn.Module):
    """LN, then the context perturbation if any, then x·(1+s)+b unless modulation is off."""

    def __init__(self, width: int, modulated: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, 2 * width) if modulated else None

    def modulation(self, e: Tensor) -> Tensor:
        """Project embeddings (..., D) to scale and shift, (..., 2, D); nothing without modulation.

        Scale comes first, as in the reference.
        """
        if self.linear is None:
            return e.unsqueeze(-2).narrow(-2, 0, 0)  # (..., 0, D)
        return self.linear(nn.functional.silu(e)).unflatten(-1, (2, -1))  # (..., 2, D)

    def forward(self, x: Tensor, e: Tensor, perturbation: Tensor | None = None) -> Tensor:
        """Norm and modulate x; x and perturbation are (B, F, N, D).

        Args:
            e: (B, F, D), the frames' embeddings; or (B, F, 6·L + 2, D), precomputed.
        """
        h = self.norm(x)  # (B, F, N, D)
        if perturbation is not None:
            h = h + perturbation  # (B, F, N, D)
        if self.linear is None:
            return h
        modulation = self.modulation(e) if e.ndim == 3 else e[..., -2:, :]  # (B, F, 2, D)
        scale, shift = modulation.unsqueeze(-2).unbind(-3)  # (B, F, 1, D) each
        return modulate(h, shift, scale)  # (B, F, N, D)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    e: Tensor,
    rotary: Rotary,
    attends: Sequence[Attend],
    recompute: bool,
    keep: int | None = None,
) -> Tensor:
    """Run L blocks over tokens (B, F, N, D); see `Block.forward`.

    Args:
        e: (B, F, D), the frames' embeddings; or (B, F, 6·L + 2, D), precomputed.
        attends: one for each block.
        recompute: keep no activations for the backward pass (gradient checkpointing).
        keep: the last block's.
    """
    for number, (block, attend) in enumerate(zip(blocks, attends, strict=True)):
        own = e if e.ndim == 3 else e[..., 6 * number : 6 * number + 6, :]  # (B, F, (6,) D)
        kept = keep if number == len(blocks) - 1 else None
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, own, rotary, attend, kept, use_reentrant=False)
        else:
            x = block(x, own, rotary, attend, kept)  # (B, F, N, D)
    return x


def precompute_modulation(layers: Iterable[Block | OutputNorm], e: Tensor) -> Tensor:
    """Compute the modulation of L blocks and their output norm: (..., D) -> (..., 6·L + 2, D).

    An output norm without modulation adds nothing. A rollout computes this once, for every
    condition and every step that it can meet. Frame by frame and step by step it would read a third
    of a network's weights for a handful of vectors.
    """
    return torch.cat([layer.modulation(e) for layer in layers], dim=-2)


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Cut frames into patches: (B, F, C, H, W) -> (B, F, N, C·p·p), channel outermost."""
    p = patch_size
    return rearrange(latents, "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=p)


def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Put frames together from patches: (B, F, N, C·p·p) -> (B, F, C, H, W)."""
    p = patch_size
    return rearrange(
        tokens, "b f (h w) (c p q) -> b f c (h p) (w q)", p=p, q=p, h=height // p, w=width // p
    )


def initialize(module: nn.Module) -> None:
    """Initialize for training: Xavier-uniform Linears, zero biases, modulations that do nothing."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=0.02)
    for child in module.modules():
        if isinstance(child, Attention):
            # q, k and v are three maps D -> D: one fused Linear would get a smaller bound.
            bound = math.sqrt(6 / (2 * child.out.in_features))
            nn.init.uniform_(child.qkv.weight, -bound, bound)
        elif isinstance(child, TimestepEmbedding):
            nn.init.normal_(child.linear_1.weight, std=0.02)
            nn.init.normal_(child.linear_2.weight, std=0.02)
        elif isinstance(child, Modulation | OutputNorm) and child.linear is not None:
            nn.init.zeros_(child.linear.weight)
