"""What makes the models fast on the CPU: attention by plain products, packed weights.

Results are those of the plain layers, up to rounding. Nothing here runs on CUDA. Apple's GPUs take
the masked attention from here, with torch's fused kernel.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from scd.models.masks import block_causal, clean_context, dense_mask, token_numbers

# Plain products are 2 to 5 times faster than the fused kernel up to about this many keys, forward
# and backward (384 sequences of 32 tokens: 14 ms against 74 ms, bf16, 2 cores; 128 queries and 768
# keys: 33 ms against 82 ms).
PLAIN_KEYS = 768
# Frames of together this many queries are computed at a time, with a mask among them. One frame of
# 16 tokens at a time takes 2.7 times as long (dense training on 47 frames, bf16, compiled: 176
# against 64 ms a layer), all at once twice to four times: most of it is computed to be masked.
QUERIES_AT_ONCE = 128
# The layout that oneDNN chooses for about this many rows serves 16 to 2000 of them equally well.
PACKED_FOR_ROWS = 256
# Without AVX-512, oneDNN's GELU takes three times as long as the same in six simple operations
# (256 rows of 4096: 3.1 against 1.0 ms); with it, a third.
FUSES_GELU = torch.backends.cpu.get_cpu_capability() == "AVX512"

_in_use: ContextVar[Mapping[nn.Module, Tensor] | None] = ContextVar("packed weights", default=None)


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute softmax(q·kᵀ/√d)·v; see `attention.full_attention`."""
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
    """Compute bfloat16 attention as products of two matrices, of one head each.

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


def block_causal_attention(q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    """Attend to the own frame of n tokens and earlier ones, some frames at a time.

    See `attention.block_causal_attention`.
    """
    queries, keys, out = q.shape[2], k.shape[2], []
    if queries <= n:
        return full_attention(q, k, v)
    admits = block_causal(n, queries, keys)
    query_numbers, key_numbers = token_numbers(queries, q), token_numbers(keys, q)
    for some in _frames_at_once(queries, n):
        visible = slice(keys - queries + some.stop)
        alone = some.stop - some.start == n  # nothing is masked for one frame
        mask = None if alone else dense_mask(admits, query_numbers[some], key_numbers[visible])
        out.append(full_attention(q[:, :, some], k[:, :, visible], v[:, :, visible], mask))
    return torch.cat(out, dim=2)


def clean_context_attention(
    q: Tensor, k: Tensor, v: Tensor, n: int, clean_frames: int, first: int
) -> Tensor:
    """Attend from every noisy frame to itself and the clean frames before it, some at a time.

    See `attention.clean_context_attention`.
    """
    tokens, batch = q.shape[2], q.shape[0]
    split, draw = clean_frames * n, (clean_frames + 1 - first) * n
    admits, numbers = clean_context(n, clean_frames, first), token_numbers(tokens, q)
    clean = block_causal_attention(q[:, :, :split], k[:, :, :split], v[:, :, :split], n)
    draws = (tokens - split) // draw

    def by_draw(x: Tensor) -> Tensor:
        return rearrange(x[:, :, split:], "b h (k t) d -> (b k) h t d", k=draws)

    q_noisy, k_noisy, v_noisy = by_draw(q), by_draw(k), by_draw(v)
    k_clean = k[:, :, :split].repeat_interleave(draws, dim=0)
    v_clean = v[:, :, :split].repeat_interleave(draws, dim=0)
    out = []
    for some in _frames_at_once(draw, n):
        visible = slice(first * n + some.stop - n)  # what the last of them sees
        keys = torch.cat([k_clean[:, :, visible], k_noisy[:, :, some]], dim=2)
        values = torch.cat([v_clean[:, :, visible], v_noisy[:, :, some]], dim=2)
        own = numbers[split:][some]
        alone = some.stop - some.start == n
        mask = None if alone else dense_mask(admits, own, torch.cat([numbers[visible], own]))
        out.append(full_attention(q_noisy[:, :, some], keys, values, mask))
    noisy = rearrange(torch.cat(out, dim=2), "(b k) h t d -> b h (k t) d", b=batch)
    return torch.cat([clean, noisy], dim=2)


def _frames_at_once(queries: int, n: int) -> list[slice]:
    """Cut queries into whole frames of n tokens, about `QUERIES_AT_ONCE` at a time."""
    size = max(1, QUERIES_AT_ONCE // n) * n
    return [slice(start, min(start + size, queries)) for start in range(0, queries, size)]


class Linear(nn.Linear):
    """`nn.Linear`, with packed weights inside `PackedWeights.in_use`.

    With bf16 weights it takes float32 inputs too: a residual stream may be more exact than they
    are.
    """

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Compute x·Wᵀ + b, and its tanh-GELU if wanted."""
        if self.weight.dtype == torch.bfloat16:
            x = x.bfloat16()
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            packed = (_in_use.get() or {}).get(self)
            if packed is not None and packed.dtype == x.dtype:
                return _packed_product(x, packed, self.bias, gelu)
        y = super().forward(x)
        return nn.functional.gelu(y, approximate="tanh") if gelu else y


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    fused = gelu and FUSES_GELU
    activation: Any = ("gelu", [], "tanh") if fused else ("none", [], "")
    y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, *activation)
    return _gelu_(y) if gelu and not fused else y


def _gelu_(y: Tensor) -> Tensor:
    """Take the tanh-GELU of y in place, as y·sigmoid(2u) with u = √(2/π)·(y + 0.044715·y³)."""
    u = y.square().mul_(0.0713548162726).add_(1.5957691216057).mul_(y)
    return y.mul_(u.sigmoid_())


class PackedWeights:
    """The weights of a model's `Linear` layers as they are now, laid out for oneDNN.

    A plain product lays its weights out anew at every call. On an AMD EPYC, 64 to 256 rows of 1024
    values take 1.3 to 3 times as long so in float32, and 1.1 to 1.3 times in bfloat16. The packed
    weights take their size in memory once more. Nothing is packed off the CPU.
    """

    def __init__(self, model: nn.Module):
        self._of: dict[nn.Module, Tensor] = {}
        if not torch.backends.mkldnn.is_available():
            return
        for layer in model.modules():
            if isinstance(layer, Linear) and _packable(layer.weight):
                weight = layer.weight.detach()
                self._of[layer] = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Multiply by the packed weights within the block, in this thread."""
        token = _in_use.set(self._of)
        try:
            yield
        finally:
            _in_use.reset(token)


def _packable(weight: Tensor) -> bool:
    # A sharded weight is a parameter of another type.
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu"
    return plain and (
        weight.dtype == torch.float32
        or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
