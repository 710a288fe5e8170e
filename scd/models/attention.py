"""Attention inside a frame, and block-causal attention over frames without a dense mask.

Which frames may be seen is written down once, as a function of two token numbers (an `MaskMod`).
The CPU turns it into masks, some frames at a time. So does CUDA with short sequences; long ones go
through FlexAttention (arXiv 2412.05496), whose kernels skip the blocks that it excludes.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

MaskMod = Callable[[Tensor, Tensor], Tensor]
"""Numbers of queries and of keys, in shapes that broadcast -> True where attention is allowed."""

# On the CPU, plain products are 2 to 5 times faster than the fused kernel up to about this many
# keys, forward and backward (384 sequences of 32 tokens: 14 ms against 74 ms, bf16, 2 cores; 128
# queries and 768 keys: 33 ms against 82 ms).
PLAIN_KEYS = 768
# The CPU takes frames of together this many queries at a time, with a mask among them. One frame of
# 16 tokens at a time takes 2.7 times as long (dense training on 47 frames, bf16, compiled: 176
# against 64 ms a layer), all at once twice to four times: most of it is computed to be masked.
QUERIES_AT_ONCE = 128
# Up to this many tokens CUDA takes all at once, with a mask; beyond it, masks of (queries, keys)
# would be the largest thing in memory.
MASKED_TOKENS = 1024
BLOCK = 128  # queries and keys in a block of FlexAttention


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v over the keys that `mask` admits, or all.

    Args:
        q, k, v: (B, heads, tokens, head_dim).
        mask: (queries, keys), True where attention is allowed.
    """
    if q.device.type != "cpu" or k.shape[2] > PLAIN_KEYS:
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            return _head_by_head(q, k, v, mask)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q = q * q.shape[-1] ** -0.5
    if mask is None:
        return (q @ k.transpose(-1, -2)).softmax(dim=-1) @ v
    # Added within the product, the mask costs no pass of its own, forward or backward.
    excluded = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(
        ~mask, -torch.inf
    )
    scores = torch.baddbmm(excluded, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    return (scores.softmax(dim=-1) @ v.flatten(0, 1)).view_as(q)


def _head_by_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same as products of two matrices, of one head each, for bfloat16 on the CPU.

    oneDNN makes them 1.6 to 1.9 times as fast as the fused kernel (64 queries, 2,000 to 19,000
    keys, AMD EPYC), which products of three axes are not. In float32 there is nothing to gain, and
    a backward pass would have to keep the weights of every key.
    """
    q = q * q.shape[-1] ** -0.5
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=v.dtype)
    for one, keys, values, result in zip(*(x.flatten(0, 1) for x in (q, k, v, out)), strict=True):
        scores = one @ keys.T
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        torch.mm(scores.softmax(dim=-1), values, out=result)
    return out


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, tokens_per_frame: int, blocks: BlockMask | None = None
) -> Tensor:
    """A token sees all tokens of its own and of earlier frames (section 3 of the model).

    Args:
        q: (B, heads, F·N, head_dim), the queries of the newest F frames.
        k, v: (B, heads, P·N + F·N, head_dim), of P past frames and those F frames.
        tokens_per_frame: N.
        blocks: what `block_causal_blocks` gives for these sizes; a compiled model must pass it in.
    """
    n, queries, keys = tokens_per_frame, q.shape[2], k.shape[2]
    if queries <= n:
        return full_attention(q, k, v)
    admits = block_causal(n, queries, keys)
    if q.device.type == "cuda":
        if needs_blocks(keys, q.device):
            return _flex(q, k, v, blocks or block_causal_blocks(n, queries, keys, q.device))
        return full_attention(q, k, v, _mask(admits, _numbers(queries, q), _numbers(keys, q)))
    of_query, of_key, out = _numbers(queries, q), _numbers(keys, q), []
    for some in _some_at_once(queries, n):
        visible = slice(keys - queries + some.stop)
        alone = some.stop - some.start == n  # nothing is masked for one frame
        mask = None if alone else _mask(admits, of_query[some], of_key[visible])
        out.append(full_attention(q[:, :, some], k[:, :, visible], v[:, :, visible], mask))
    return torch.cat(out, dim=2)


def clean_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    clean_frames: int,
    first: int,
    blocks: BlockMask | None = None,
) -> Tensor:
    """Teacher forcing in one sequence: clean frames 0..C-1, then draws of noisy frames first..C.

    Clean frames attend block-causally among themselves; a noisy frame i sees itself and the clean
    frames before i.

    Args:
        q, k, v: (B, heads, C·N + K·(C + 1 - first)·N, head_dim), for K draws.
        tokens_per_frame: N.
        clean_frames: C.
        blocks: what `clean_context_blocks` gives for these sizes; a compiled model must pass it in.
    """
    n, tokens = tokens_per_frame, q.shape[2]
    split, of_draw = clean_frames * n, (clean_frames + 1 - first) * n
    admits, numbers = clean_context(n, clean_frames, first), _numbers(tokens, q)
    if q.device.type == "cuda":
        if needs_blocks(tokens, q.device):
            blocks = blocks or clean_context_blocks(n, clean_frames, first, tokens, q.device)
            return _flex(q, k, v, blocks)
        return full_attention(q, k, v, _mask(admits, numbers, numbers))
    clean = block_causal_attention(q[:, :, :split], k[:, :, :split], v[:, :, :split], n)
    draws, batch = (tokens - split) // of_draw, q.shape[0]

    def by_draw(x: Tensor) -> Tensor:
        return rearrange(x[:, :, split:], "b h (k t) d -> (b k) h t d", k=draws)

    q_noisy, k_noisy, v_noisy = by_draw(q), by_draw(k), by_draw(v)
    k_clean = k[:, :, :split].repeat_interleave(draws, dim=0)
    v_clean = v[:, :, :split].repeat_interleave(draws, dim=0)
    out = []
    for some in _some_at_once(of_draw, n):
        visible = slice(first * n + some.stop - n)  # what the last of them sees
        keys = torch.cat([k_clean[:, :, visible], k_noisy[:, :, some]], dim=2)
        values = torch.cat([v_clean[:, :, visible], v_noisy[:, :, some]], dim=2)
        of_query = numbers[split:][some]
        alone = some.stop - some.start == n
        mask = None if alone else _mask(admits, of_query, torch.cat([numbers[visible], of_query]))
        out.append(full_attention(q_noisy[:, :, some], keys, values, mask))
    noisy = rearrange(torch.cat(out, dim=2), "(b k) h t d -> b h (k t) d", b=batch)
    return torch.cat([clean, noisy], dim=2)


def block_causal(n: int, queries: int, keys: int) -> MaskMod:
    """For queries that are the last of the keys, in frames of n tokens."""
    past = keys - queries
    return lambda query, key: key // n <= (query + past) // n


def clean_context(n: int, clean_frames: int, first: int) -> MaskMod:
    """For the sequence of `clean_context_attention`."""
    split, of_draw = clean_frames * n, (clean_frames + 1 - first) * n

    def admits(query: Tensor, key: Tensor) -> Tensor:
        among_clean = (query < split) & (key // n <= query // n)
        frame = first + (query - split) % of_draw // n
        of_noisy = (query >= split) & (key // n < frame)
        own = (query >= split) & ((key - split) // n == (query - split) // n)
        return ((key < split) & (among_clean | of_noisy)) | own

    return admits


def _numbers(tokens: int, like: Tensor) -> Tensor:
    return torch.arange(tokens, device=like.device)


def _mask(admits: MaskMod, queries: Tensor, keys: Tensor) -> Tensor:
    """(queries, keys), of those numbers."""
    return admits(queries[:, None], keys[None])


def _some_at_once(queries: int, n: int) -> list[slice]:
    """Whole frames of n tokens, some of them at a time."""
    size = max(1, QUERIES_AT_ONCE // n) * n
    return [slice(start, min(start + size, queries)) for start in range(0, queries, size)]


def flex_blocks(
    admits: MaskMod, n: int, queries: int, keys: int, device: torch.device
) -> BlockMask:
    """Which blocks of BLOCK queries and keys FlexAttention visits, and which it need not mask.

    `admits` is constant within a frame, so that a block is known by one token of each of its
    frames. torch's own `create_block_mask` would try every pair of tokens: 15 GiB for the dense
    baseline's 57,000.

    Args:
        n: tokens of a frame; queries and keys are whole frames.
    """
    of_query, of_key = (_one_a_frame(tokens, n, device) for tokens in (queries, keys))
    admitted = admits(of_query[:, None, :, None], of_key[None, :, None, :]).flatten(2)
    touched, whole = admitted.any(dim=2), admitted.all(dim=2)
    # The kernel cuts off what lies behind the last token only where it masks.
    whole &= (of_query[:, :1] + BLOCK <= queries) & (of_key[:, 0] + BLOCK <= keys)
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


def _one_a_frame(tokens: int, n: int, device: torch.device) -> Tensor:
    """Of every block, its first token and the first of every further frame: (blocks, most)."""
    starts = torch.arange(0, tokens, BLOCK, device=device)[:, None]
    following = (starts // n + torch.arange(1, BLOCK // n + 2, device=device)) * n
    last = (starts + BLOCK).clamp(max=tokens)
    return torch.cat([starts, torch.where(following < last, following, starts)], dim=1)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row (queries, keys) are set, and their numbers first, as int32 (1, 1, …)."""
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1)[None, None].int(), numbers[None, None].int()


# A compiled model asks for its blocks before its layers: what dynamo traces knows no cache, and
# would make them anew in every layer.


@torch.compiler.disable
def block_causal_blocks(n: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    """The blocks of `block_causal_attention`."""
    return _kept_blocks(block_causal, (n, queries, keys), n, queries, keys, device)


@torch.compiler.disable
def clean_context_blocks(
    n: int, clean_frames: int, first: int, tokens: int, device: torch.device
) -> BlockMask:
    """The blocks of `clean_context_attention`."""
    return _kept_blocks(clean_context, (n, clean_frames, first), n, tokens, tokens, device)


@lru_cache(maxsize=16)  # all layers, and all steps with clips of one length, ask for the same
def _kept_blocks(
    admits: Callable[..., MaskMod],
    arguments: tuple[int, ...],
    n: int,
    queries: int,
    keys: int,
    device: torch.device,
) -> BlockMask:
    return flex_blocks(admits(*arguments), n, queries, keys, device)


def needs_blocks(keys: int, device: torch.device) -> bool:
    """Whether this many keys go through FlexAttention."""
    return device.type == "cuda" and keys > MASKED_TOKENS


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    # Inside a compiled model it is compiled with it.
    flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return flex(q, k, v, block_mask=blocks)  # type: ignore[operator]
