"""Which tokens may attend to which: written down once, as functions of two token numbers."""

from collections.abc import Callable

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor], Tensor]
"""Numbers of queries and of keys, in shapes that broadcast -> True where attention is allowed."""


def block_causal(n: int, queries: int, keys: int) -> MaskMod:
    """Let a token see its own frame of n tokens and earlier ones; the queries are the last keys."""
    past = keys - queries
    return lambda query, key: key // n <= (query + past) // n


def clean_context(n: int, clean_frames: int, first: int) -> MaskMod:
    """Mask the sequence of `attention.clean_context_attention`, in frames of n tokens."""
    split, draw = clean_frames * n, (clean_frames + 1 - first) * n

    def admits(query: Tensor, key: Tensor) -> Tensor:
        clean_sees_clean = (query < split) & (key // n <= query // n)
        frame = first + (query - split) % draw // n
        noisy_sees_clean = (query >= split) & (key // n < frame)
        own = (query >= split) & ((key - split) // n == (query - split) // n)
        return ((key < split) & (clean_sees_clean | noisy_sees_clean)) | own

    return admits


def dense_mask(admits: MaskMod, queries: Tensor, keys: Tensor) -> Tensor:
    """Write out a mask (queries, keys) for tokens of these numbers."""
    return admits(queries[:, None], keys[None])


def token_numbers(tokens: int, like: Tensor) -> Tensor:
    """Count tokens from 0, on the device of another tensor."""
    return torch.arange(tokens, device=like.device)
