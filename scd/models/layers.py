"""The parts that encoder and decoder share: positions, conditioning, modulation, block.

Notation: B batch, F frames, N tokens of a frame, D width, 64-wide heads.
"""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scd.models.linear import Linear

HEAD_DIM = 64
ROTARY_DIMS = (16, 24, 24)  # of frame, row and column; together HEAD_DIM
ROTARY_THETA = 10000.0
TIME_CHANNELS = 256
NORM_EPS = 1e-6
WITHOUT_FLOAT64 = ("mps",)  # devices: Apple's GPUs

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v (B, heads, tokens, head_dim) -> (B, heads, tokens, head_dim)."""


class Rotary(NamedTuple):
    """Cosines and sines of the position angles, (tokens, HEAD_DIM) each: every angle twice, its
    sine first with a minus."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate the pairs (x_i, x_{i + 32}) of every head of x (..., heads, tokens, HEAD_DIM).

        The reference pairs neighbours instead: the same up to the order of a head's channels, but
        strided and several times slower. Its checkpoints are reordered when they are read.
        """
        cos, sin = self.cos.type_as(x), self.sin.type_as(x)
        return torch.addcmul(x * cos, x.roll(HEAD_DIM // 2, dims=-1), sin)


def rotary_positions(frames: Tensor, height: int, width: int) -> Rotary:
    """Angles of (frame, row, column) for every token of the given frames.

    Args:
        frames: (F,) frame indices.
        height, width: tokens in a column and in a row.
    """
    # What dynamo traces knows no cache.
    tables = _make_tables if torch.compiler.is_compiling() else _rotary_tables
    device = frames.device
    frequencies, within = tables(height, width, device)
    # In double precision: in single, the angles of frame 10,000 would be off by half a thousandth.
    angles = frames.to(frequencies.device).double()[:, None] * frequencies  # (F, 8)

    def table(of_frames: Tensor, of_places: Tensor, sign: int) -> Tensor:
        shape = (len(frames), height * width, -1)
        of_frames = of_frames.float().to(device)[:, None].expand(shape)
        half = torch.cat([of_frames, of_places.expand(shape)], dim=-1).flatten(0, 1)
        return torch.cat([sign * half, half], dim=-1)

    cosines, sines = within
    return Rotary(table(angles.cos(), cosines, 1), table(angles.sin(), sines, -1))


def _make_tables(
    height: int, width: int, device: torch.device
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute what all frames share and a rollout asks for at every step: the frequencies (8,) of
    the frame axis, and cosines and sines of every row and column, (height·width, 24) each."""
    exact = device if device.type not in WITHOUT_FLOAT64 else torch.device("cpu")

    def frequencies(dims: int) -> Tensor:
        return ROTARY_THETA ** -(torch.arange(0, dims, 2, device=exact).double() / dims)

    of_frame, of_row, of_column = (frequencies(dims) for dims in ROTARY_DIMS)
    rows = torch.arange(height, device=exact).double().repeat_interleave(width)
    columns = torch.arange(width, device=exact).double().repeat(height)
    angles = torch.cat([rows[:, None] * of_row, columns[:, None] * of_column], dim=-1)
    return of_frame, (angles.cos().float().to(device), angles.sin().float().to(device))


_rotary_tables = lru_cache(maxsize=16)(_make_tables)


class Conditioning(nn.Module):
    """The conditioning vector e of a frame: its noise level plus its action or class label.

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


class Modulated(NamedTuple):
    """What a layer makes of the conditioning vector: (B, F, 1, D) each, one for all tokens."""

    shift: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x·(1 + scale) + shift."""
        return torch.addcmul(self.shift, x, 1 + self.scale)


class Gated(NamedTuple):
    """Of a branch of a block, whose result is multiplied by the gate before it is added."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x·(1 + scale) + shift."""
        return torch.addcmul(self.shift, x, 1 + self.scale)


class Modulation(nn.Module):
    """Shift, scale and gate of one branch of a block: the thirds of Linear(SiLU(e))."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 3 * width)

    def forward(self, e: Tensor) -> Gated:
        """e (B, F, D)."""
        return Gated(*self.linear(nn.functional.silu(e)).unsqueeze(-2).chunk(3, dim=-1))


class Attention(nn.Module):
    """Multi-head attention with RMS-normed, rotated queries and keys."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = Linear(width, 3 * width)
        self.norm_q = nn.Parameter(torch.ones(HEAD_DIM))
        self.norm_k = nn.Parameter(torch.ones(HEAD_DIM))
        self.out = Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, keep: int | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D), or (B, keep, D): of the last tokens only."""
        qkv = rearrange(self.qkv(x), "b t (n h d) -> n b h t d", n=3, d=HEAD_DIM)
        weights = torch.stack([self.norm_q, self.norm_k])[:, None, None, None]
        # q and k at once, and contiguous: a third of the time of one after the other.
        normed = nn.functional.rms_norm(qkv[:2].contiguous(), (HEAD_DIM,), eps=NORM_EPS)
        normed = normed.type_as(qkv)  # which autocast gives back in float32
        q, k = rotary.rotate(normed * weights.type_as(normed))
        if keep is not None:
            q = q[:, :, -keep:]
        return self.out(rearrange(attend(q, k, qkv[2]), "b h t d -> b t (h d)"))


class MLP(nn.Module):
    """D -> 4D, tanh-GELU, -> D."""

    def __init__(self, width: int):
        super().__init__()
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.down(self.up(x, gelu=True))
        # The GELU's result, four times as wide as x, is not kept for the backward pass but made
        # again there. A compiled model decides on that by itself.
        return checkpoint(self._narrow, self.up(x), use_reentrant=False, preserve_rng_state=False)

    def _narrow(self, h: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(h, approximate="tanh"))


class BlockModulation(NamedTuple):
    """Of the two branches of a block."""

    attention: Gated
    mlp: Gated


class Block(nn.Module):
    """x += g1·Attn(LN(x)·(1+s1)+b1);  x += g2·MLP(LN(x)·(1+s2)+b2)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.modulation_attention = Modulation(width)
        self.attention = Attention(width)
        self.modulation_mlp = Modulation(width)
        self.mlp = MLP(width)

    def modulate(self, e: Tensor) -> BlockModulation:
        return BlockModulation(self.modulation_attention(e), self.modulation_mlp(e))

    def forward(
        self,
        x: Tensor,
        e: Tensor | BlockModulation,
        rotary: Rotary,
        attend: Attend,
        keep: int | None = None,
    ) -> Tensor:
        """x (B, F, N, D) -> (B, F, N, D).

        Args:
            e: conditioning vectors (B, F, D), or what `modulate` made of them.
            keep: of a single frame (F = 1), only the last tokens are wanted: (B, 1, keep, D).
        """
        before_attention, before_mlp = self.modulate(e) if isinstance(e, Tensor) else e
        frames = x.shape[1]
        h = before_attention(self.norm(x)).flatten(1, 2)
        h = self.attention(h, rotary, attend, keep).unflatten(1, (frames, -1))
        x = torch.addcmul(x[:, :, -h.shape[2] :], before_attention.gate, h)
        return torch.addcmul(x, before_mlp.gate, self.mlp(before_mlp(self.norm(x))))


class OutputNorm(nn.Module):
    """LN, then the context perturbation if any, then x·(1+s)+b unless modulation is off."""

    def __init__(self, width: int, modulate: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, 2 * width) if modulate else None

    def modulate(self, e: Tensor) -> Modulated | None:
        if self.linear is None:
            return None
        scale, shift = self.linear(nn.functional.silu(e)).unsqueeze(-2).chunk(2, dim=-1)
        return Modulated(shift, scale)

    def forward(
        self, x: Tensor, e: Tensor | Modulated | None, perturbation: Tensor | None = None
    ) -> Tensor:
        """x and perturbation (B, F, N, D) -> (B, F, N, D).

        Args:
            e: conditioning vectors (B, F, D), or what `modulate` made of them.
        """
        h = self.norm(x)
        if perturbation is not None:
            h = h + perturbation
        modulation = self.modulate(e) if isinstance(e, Tensor) else e
        return h if modulation is None else modulation(h)


class Modulations(NamedTuple):
    """What all blocks and the output norm make of conditioning vectors, in one tensor.

    A rollout computes them once, for every condition and every step that it can meet. Frame by
    frame and step by step they would read a third of a network's weights for a handful of vectors.
    """

    values: Tensor  # (..., 6·L or 6·L + 2, D), for L blocks

    @classmethod
    def of(cls, blocks: Iterable[Any], norm_out: OutputNorm, e: Tensor) -> "Modulations":
        """Of conditioning vectors (..., D)."""
        parts = [part for block in blocks for branch in block.modulate(e) for part in branch]
        return cls(torch.cat([*parts, *(norm_out.modulate(e) or ())], dim=-2))

    def by_layer(self, depth: int) -> tuple[list[BlockModulation], Modulated | None]:
        """For every block, and for the output norm."""
        vectors = self.values.unsqueeze(-2).unbind(-3)  # (..., 1, D) each
        of_blocks = [
            BlockModulation(Gated(*vectors[i : i + 3]), Gated(*vectors[i + 3 : i + 6]))
            for i in range(0, 6 * depth, 6)
        ]
        rest = vectors[6 * depth :]
        return of_blocks, Modulated(*rest) if rest else None


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """(B, F, C, H, W) -> tokens (B, F, N, C·p·p), channel outermost."""
    p = patch_size
    return rearrange(latents, "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=p)


def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """(B, F, N, C·p·p) -> (B, F, C, H, W), for H and W given in latent pixels."""
    p = patch_size
    return rearrange(
        tokens, "b f (h w) (c p q) -> b f c (h p) (w q)", p=p, q=p, h=height // p, w=width // p
    )


def initialise(module: nn.Module) -> None:
    """How training starts: Xavier-uniform Linears, zero biases, modulations that do nothing."""
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
