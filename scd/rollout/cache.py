"""The key-value cache of past frames: allocated once, keys rotated before they are written."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scd.errors import ScdError
from scd.models.attention import block_causal_attention
from scd.models.world_model import CausalWorldModel, TextKeys


@dataclass(frozen=True)
class Window:
    """The number of frames that a KV cache holds, and what happens beyond.

    Args:
        frames: held at once, the newest among them.
        when_full: `error`: one more frame is refused; `slide`: it takes the slot of the oldest, so
            that a stream can go on for ever at constant cost. Positions keep counting.
        sink_frames: the first frames of the video, which a sliding window never replaces.

    Raises:
        ScdError: they contradict each other.
    """

    frames: int
    when_full: str = "error"
    sink_frames: int = 0

    def __post_init__(self) -> None:
        if self.when_full not in ("error", "slide"):
            raise ScdError(f"when_full is {self.when_full!r}, not error or slide")
        if self.frames < 1 or not 0 <= self.sink_frames < self.frames:
            raise ScdError(
                f"a window of {self.frames} frames has no room for {self.sink_frames} sink frames"
            )

    def slot(self, frame: int) -> int:
        """Number the slot that a frame of the video is written to."""
        if frame < self.frames:
            return frame
        sliding = self.frames - self.sink_frames
        return self.sink_frames + (frame - self.sink_frames) % sliding


class KVCache:
    """Keys and values of encoded frames, as far as the window reaches.

    `text` holds those of the text, for models that have one. For a model that denoises chunks of
    frames, a frame is here a chunk.

    Args:
        tokens_per_frame: N.

    Raises:
        ScdError: on a frame beyond a window that does not slide.
    """

    def __init__(self, model: CausalWorldModel, batch: int, window: Window, tokens_per_frame: int):
        slots = window.frames * tokens_per_frame
        shape = (model.cached_layers, batch, model.heads, slots, model.head_dim)
        self.keys = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.values = torch.empty_like(self.keys)
        self.tokens_per_frame = tokens_per_frame
        self.window = window
        self.frames = 0
        self.text: TextKeys | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write a layer's keys and values of the newest frames, attend over all that are held.

        q, k, v are (B, heads, new frames · N, head_dim), k rotated, of the whole batch or of its
        first samples.
        """
        n = self.tokens_per_frame
        new = k.shape[2] // n
        if self.frames + new <= self.window.frames or (
            new == 1 and self.window.when_full == "slide"
        ):
            return self._attend(layer, self.frames, q, k, v)
        if self.window.when_full == "error":
            raise ScdError(
                f"the rollout holds {self.window.frames} frames and is full: reset it, make it "
                f"with a larger window, or let the window slide"
            )
        # Each frame sees a window of its own.
        frames = zip(*(x.split(n, dim=2) for x in (q, k, v)), strict=True)
        seen = [self._attend(layer, self.frames + i, *frame) for i, frame in enumerate(frames)]
        return torch.cat(seen, dim=2)

    def advance(self, frames: int) -> None:
        """Count frames that all layers have written."""
        self.frames += frames

    def _attend(self, layer: int, first: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from frames whose slots, from that of frame `first` on, lie side by side."""
        n, batch = self.tokens_per_frame, len(k)
        start = self.window.slot(first) * n
        self.keys[layer, :batch, :, start : start + k.shape[2]] = k
        self.values[layer, :batch, :, start : start + k.shape[2]] = v
        held = min(first * n + k.shape[2], self.window.frames * n)
        keys, values = self.keys[layer, :batch, :, :held], self.values[layer, :batch, :, :held]
        return block_causal_attention(q.type_as(keys), keys, values, n).type_as(q)
