"""Attention inside a frame, and block-causal attention over frames without a dense mask."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Up to this many tokens one masked call is cheaper than a call a frame; beyond it, masks of
# (queries, keys) would be the largest thing in memory.
MASKED_TOKENS = 1024


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token sees every token. All (B, heads, tokens, head_dim)."""
    return scaled_dot_product_attention(q, k, v)


def block_causal_attention(q: Tensor, k: Tensor, v: Tensor, tokens_per_frame: int) -> Tensor:
    """A token sees all tokens of its own and of earlier frames (section 3 of the model).

    Args:
        q: (B, heads, F·N, head_dim), the queries of the newest F frames.
        k, v: (B, heads, P·N + F·N, head_dim), of P past frames and those F frames.
        tokens_per_frame: N.
    """
    queries, keys = q.shape[2], k.shape[2]
    if queries == tokens_per_frame:
        return scaled_dot_product_attention(q, k, v)
    if keys <= MASKED_TOKENS:
        mask = _block_causal_mask(queries, keys, tokens_per_frame, q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    past = keys - queries
    out = []
    for start in range(0, queries, tokens_per_frame):
        end = start + tokens_per_frame
        visible = past + end
        out.append(
            scaled_dot_product_attention(q[:, :, start:end], k[:, :, :visible], v[:, :, :visible])
        )
    return torch.cat(out, dim=2)


def _block_causal_mask(queries: int, keys: int, n: int, device: torch.device) -> Tensor:
    """(queries, keys), True where attention is allowed; queries are the last of the keys."""
    frame_of_key = torch.arange(keys, device=device) // n
    frame_of_query = frame_of_key[keys - queries :]
    return frame_of_key[None, :] <= frame_of_query[:, None]
