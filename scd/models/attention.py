"""Attention inside a frame, and block-causal attention over frames without a dense mask.

On CUDA, short sequences use a dense mask; long ones go through FlexAttention (arXiv
2412.05496), whose kernels skip the blocks of tokens that the mask excludes. All else is in `cpu`.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from scd.models import cpu
from scd.models.masks import MaskMod, block_causal, clean_context, dense_mask, token_numbers

# Up to this many tokens CUDA takes all at once, with a mask; beyond it, masks of (queries, keys)
# would be the largest thing in memory.
MASKED_TOKENS = 1024
BLOCK = 128  # queries and keys in a block of FlexAttention
# All but cuDNN, which torch prefers on Hopper in bf16: it builds a plan for each number of keys, so
# for every frame of a rollout, in up to half a second (github.com/modelscope/FunASR/issues/3704).
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute softmax(q·kᵀ/√d)·v over the keys that `mask` admits, or all.

    Args:
        q, k, v: (B, heads, tokens, head_dim).
        mask: (queries, keys), True where attention is allowed.
    """
    if q.device.type != "cuda":
        return cpu.full_attention(q, k, v, mask)
    with sdpa_kernel(ANY_LENGTH):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def within_frames_attention(q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
    """Attend to the tokens of the own frame alone.

    Args:
        q: (B, heads, F·M, head_dim), M queries of every frame.
        k, v: (B, heads, F·N, head_dim).
        frames: F.
    """
    q, k, v = (rearrange(x, "b h (f n) d -> (b f) h n d", f=frames) for x in (q, k, v))
    return rearrange(full_attention(q, k, v), "(b f) h n d -> b h (f n) d", f=frames)


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    block_mask: BlockMask | None = None,
    history_gradient: bool = True,
) -> Tensor:
    """Attend to all tokens of the own and of earlier frames (arXiv 2602.10095, section 4).

    Args:
        q: (B, heads, F·N, head_dim), the queries of the newest F frames.
        k, v: (B, heads, P·N + F·N, head_dim), of P past frames and those F frames.
        tokens_per_frame: N.
        block_mask: `block_causal_block_mask` for these sizes; a compiled model must pass it in.
        history_gradient: False: no gradient to the keys and values of earlier frames (P = 0).
    """
    n, queries, keys = tokens_per_frame, q.shape[2], k.shape[2]
    if not history_gradient:
        return _detached_history_attention(q, k, v, n)
    if q.device.type != "cuda":
        return cpu.block_causal_attention(q, k, v, n)
    if queries <= n:
        return full_attention(q, k, v)
    if uses_flex(keys, q.device):
        return _flex(q, k, v, block_mask or block_causal_block_mask(n, queries, keys, q.device))
    admits = block_causal(n, queries, keys)
    mask = dense_mask(admits, token_numbers(queries, q), token_numbers(keys, q))
    return full_attention(q, k, v, mask)


def _detached_history_attention(q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    """Attend block-causally, frame by frame: no kernel has a mask for gradients."""
    out = []
    for start in range(0, q.shape[2], n):
        keys, values = (
            torch.cat([x[:, :, :start].detach(), x[:, :, start : start + n]], dim=2) for x in (k, v)
        )
        out.append(full_attention(q[:, :, start : start + n], keys, values))
    return torch.cat(out, dim=2)


def clean_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    clean_frames: int,
    first: int,
    block_mask: BlockMask | None = None,
    history_gradient: bool = True,
) -> Tensor:
    """Attend in one sequence of clean frames 0..C-1, then K draws of noisy frames first..C.

    Clean frames attend block-causally among themselves; a noisy frame i sees itself and the clean
    frames before i (teacher forcing).

    Args:
        q, k, v: (B, heads, C·N + K·(C + 1 - first)·N, head_dim).
        tokens_per_frame: N.
        clean_frames: C.
        block_mask: `clean_context_block_mask` for these sizes; a compiled model must pass it in.
        history_gradient: False: no gradient to the clean frames' keys and values.
    """
    n, tokens = tokens_per_frame, q.shape[2]
    if not history_gradient:
        clean = clean_frames * n
        k, v = (torch.cat([x[:, :, :clean].detach(), x[:, :, clean:]], dim=2) for x in (k, v))
    if q.device.type != "cuda":
        return cpu.clean_context_attention(q, k, v, n, clean_frames, first)
    if uses_flex(tokens, q.device):
        block_mask = block_mask or clean_context_block_mask(
            n, clean_frames, first, tokens, q.device
        )
        return _flex(q, k, v, block_mask)
    numbers = token_numbers(tokens, q)
    mask = dense_mask(clean_context(n, clean_frames, first), numbers, numbers)
    return full_attention(q, k, v, mask)


def uses_flex(keys: int, device: torch.device) -> bool:
    """Check whether this many keys go through FlexAttention."""
    return device.type == "cuda" and keys > MASKED_TOKENS


def make_block_mask(
    admits: MaskMod, n: int, queries: int, keys: int, device: torch.device
) -> BlockMask:
    """Find the blocks of BLOCK queries and keys that FlexAttention visits, and need not mask.

    `admits` is constant within a frame, so that a block is known by one token of each of its
    frames. torch's own `create_block_mask` would try every pair of tokens: 15 GiB for the dense
    baseline's 57,000.

    Args:
        n: tokens of a frame; queries and keys are whole frames.
    """
    query, key = (_one_token_a_frame(tokens, n, device) for tokens in (queries, keys))
    admitted = admits(query[:, None, :, None], key[None, :, None, :]).flatten(2)
    touched, whole = admitted.any(dim=2), admitted.all(dim=2)
    # The kernel cuts off what lies behind the last token only where it masks.
    whole &= (query[:, :1] + BLOCK <= queries) & (key[:, 0] + BLOCK <= keys)
    partial_count, partial_blocks = _ordered(touched & ~whole)
    whole_count, whole_blocks = _ordered(whole)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_blocks,
        whole_count,
        whole_blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda _, __, query, key: admits(query, key),
        seq_lengths=(queries, keys),
    )


def _one_token_a_frame(tokens: int, n: int, device: torch.device) -> Tensor:
    """List every block's first token and the first of every further frame: (blocks, most)."""
    starts = torch.arange(0, tokens, BLOCK, device=device)[:, None]
    following = (starts // n + torch.arange(1, BLOCK // n + 2, device=device)) * n
    last = (starts + BLOCK).clamp(max=tokens)
    return torch.cat([starts, torch.where(following < last, following, starts)], dim=1)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Count the set entries of each row (queries, keys); list them first, as int32 (1, 1, …)."""
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1)[None, None].int(), numbers[None, None].int()


# A compiled model asks for its block mask before its layers: dynamo ignores `lru_cache`, so that
# every layer would make it anew.


@torch.compiler.disable
def block_causal_block_mask(n: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    """Make the block mask of `block_causal_attention`, or take it from a cache."""
    return _cached_block_mask(block_causal, (n, queries, keys), n, queries, keys, device)


@torch.compiler.disable
def clean_context_block_mask(
    n: int, clean_frames: int, first: int, tokens: int, device: torch.device
) -> BlockMask:
    """Make the block mask of `clean_context_attention`, or take it from a cache."""
    arguments = (n, clean_frames, first)
    return _cached_block_mask(clean_context, arguments, n, tokens, tokens, device)


@lru_cache(maxsize=16)  # all layers, and all steps with clips of one length, ask for the same
def _cached_block_mask(
    mask: Callable[..., MaskMod],
    arguments: tuple[int, ...],
    n: int,
    queries: int,
    keys: int,
    device: torch.device,
) -> BlockMask:
    return make_block_mask(mask(*arguments), n, queries, keys, device)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    # Inside a compiled model it is compiled with it.
    flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return flex(q, k, v, block_mask=block_mask)  # type: ignore[operator]
