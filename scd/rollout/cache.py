"""The key-value cache of past frames: allocated once, keys rotated before they are written."""

import torch
from torch import Tensor

from scd.errors import ScdError
from scd.models.attention import block_causal_attention
from scd.models.layers import HEAD_DIM
from scd.models.world_model import WorldModel


class KVCache:
    """Keys and values of all frames that were taken in.

    Args:
        max_frames: frames it holds; one more is refused.
        tokens_per_frame: N.

    Raises:
        ScdError: on a frame beyond `max_frames`.
    """

    def __init__(self, model: WorldModel, batch: int, max_frames: int, tokens_per_frame: int):
        shape = (
            model.cached_layers,
            batch,
            model.config.heads,
            max_frames * tokens_per_frame,
            HEAD_DIM,
        )
        self.keys = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.values = torch.empty_like(self.keys)
        self.tokens_per_frame = tokens_per_frame
        self.max_frames = max_frames
        self.frames = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write a layer's keys and values of new frames behind the old, attend over all of them.

        q, k, v are (B, heads, new frames · N, head_dim), k rotated.
        """
        start = self.frames * self.tokens_per_frame
        end = start + k.shape[2]
        if end > self.keys.shape[3]:
            raise ScdError(
                f"the rollout holds {self.max_frames} frames and is full: reset it, or make it "
                f"with a larger max_frames"
            )
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        return block_causal_attention(q.type_as(keys), keys, values, self.tokens_per_frame).type_as(
            q
        )

    def advance(self, frames: int) -> None:
        """All layers have written these frames."""
        self.frames += frames
