"""Rotary position embedding: the angles of every token's frame, row and column.

Notation: F frames, N tokens of a frame, d channels of a head, of which each axis turns its share.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

ROTARY_DIMS = (16, 24, 24)  # of frame, row and column; together a head's 64
ROTARY_THETA = 10000.0
WITHOUT_FLOAT64 = ("mps",)  # devices: Apple's GPUs


class Rotary(NamedTuple):
    """Cosines and sines of the position angles, (tokens, d) each.

    Each angle appears twice; its first sine is negated.
    """

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate the pairs (x_i, x_{i + d/2}) of every head of x (..., heads, tokens, d).

        The reference pairs neighbours instead: equal up to the order of a head's channels, but
        strided and several times slower. Its checkpoints are reordered when they are read.
        """
        cos, sin = self.cos.type_as(x), self.sin.type_as(x)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def rotary_positions(frames: Tensor, height: int, width: int) -> Rotary:
    """Compute the rotary angles of (frame, row, column) for every token of the given frames.

    Args:
        frames: (F,) frame indices.
        height, width: tokens in a column and in a row.
    """
    return _in_halves(*token_angles(frames, height, width, ROTARY_DIMS))


def rotary_table(cosines: Tensor, sines: Tensor, height: int, width: int) -> Rotary:
    """Join the frames' part of the angles, (F, 8) each, with that of every row and column."""
    _, places = _tables(height, width, ROTARY_DIMS, cosines.device)
    return _in_halves(*_joined((cosines, sines), places))


def token_angles(
    frames: Tensor, height: int, width: int, dims: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of the angles of every token, (F, N, d/2) each.

    Args:
        frames: (F,) frame indices.
        height, width: tokens in a column and in a row.
        dims: channels of a head for frame, row and column; together d.
    """
    # In double precision: in single, the angles of frame 10,000 would be off by half a thousandth.
    frequencies, places = _tables(height, width, dims, frames.device)
    angles = frames.to(frequencies.device).double()[:, None] * frequencies  # (F, dims[0] / 2)
    return _joined(_cosines_and_sines(angles, frames.device), places)


class _Tables(NamedTuple):
    """What all frames share, computed once for all steps of a rollout."""

    frequencies: Tensor  # (dims[0] / 2,), of the frame axis
    places: tuple[Tensor, Tensor]  # cosines and sines, (N, (dims[1] + dims[2]) / 2) each


def _tables(height: int, width: int, dims: tuple[int, int, int], device: torch.device) -> _Tables:
    # Dynamo ignores `lru_cache`.
    tables = _make_tables if torch.compiler.is_compiling() else _cached_tables
    return tables(height, width, dims, device)


def _make_tables(
    height: int, width: int, dims: tuple[int, int, int], device: torch.device
) -> _Tables:
    exact = device if device.type not in WITHOUT_FLOAT64 else torch.device("cpu")
    frame, row, column = (
        ROTARY_THETA ** -(torch.arange(0, axis, 2, device=exact).double() / axis) for axis in dims
    )
    rows = torch.arange(height, device=exact).double().repeat_interleave(width)
    columns = torch.arange(width, device=exact).double().repeat(height)
    angles = torch.cat([rows[:, None] * row, columns[:, None] * column], dim=-1)
    return _Tables(frame, _cosines_and_sines(angles, device))


_cached_tables = lru_cache(maxsize=16)(_make_tables)


def _cosines_and_sines(angles: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return angles.cos().float().to(device), angles.sin().float().to(device)


def _joined(frames: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join cosines and sines of frames (F, …) and of places (N, …) to those of tokens (F, N, …)."""
    shape = (len(frames[0]), len(places[0]), -1)
    cos, sin = (
        torch.cat([of_frames[:, None].expand(shape), of_places.expand(shape)], dim=-1)
        for of_frames, of_places in zip(frames, places, strict=True)
    )
    return cos, sin


def _in_halves(cos: Tensor, sin: Tensor) -> Rotary:
    """Double angles (F, N, d/2) for the two halves of a head's channels."""
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return Rotary(cos.flatten(0, 1), sin.flatten(0, 1))
