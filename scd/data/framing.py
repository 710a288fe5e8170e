"""Scale, crop and mirror the frames of a video to the frames of an experiment, mostly squares.

All frames of a clip are treated alike. In training, crop and mirroring are random; in evaluation
and for latents, the center is cropped and nothing is mirrored.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scd.errors import ScdError
from scd.options import DataOptions


@dataclass(frozen=True)
class Framing:
    """The way from frames of any size to those of an experiment.

    Args:
        size: height and width of the result.
        resize_shorter: scale the shorter side to this many pixels, then crop. None: frames must
            have the right size already.
        mirror: in training, exchange left and right with probability 1/2.
        width: of the result, where it is no square.
    """

    size: int
    resize_shorter: int | None = None
    mirror: bool = False
    width: int | None = None

    @property
    def sides(self) -> tuple[int, int]:
        return self.size, self.width or self.size

    def __call__(self, video: Tensor, path: Path, rng: np.random.Generator | None = None) -> Tensor:
        """Convert frames (F, 3, H, W) uint8 to those of an experiment, uint8.

        Args:
            path: the video, for messages.
            rng: draws the crop and whether to mirror; None: the center, not mirrored.

        Raises:
            ScdError: the frames have another size and `resize_shorter` is None, or they are smaller
                when they are scaled.
        """
        height, width = video.shape[-2:]
        room = self.room((height, width), path)
        if self.resize_shorter is not None:
            video = resize_shorter(video, self.resize_shorter)
        if rng is None:
            top, left, mirrored = room[0] // 2, room[1] // 2, False
        else:
            top, left = (int(rng.integers(r + 1)) for r in room)
            mirrored = self.mirror and bool(rng.integers(2))
        video = video[..., top : top + self.sides[0], left : left + self.sides[1]]
        return video.flip(-1) if mirrored else video

    def room(self, size: tuple[int, int], path: Path) -> tuple[int, int]:
        """Count the pixels by which frames (height, width) of a video are larger, once scaled.

        Raises:
            ScdError: see a call.
        """
        height, width = size
        if self.resize_shorter is None:
            if size != self.sides:
                wanted = self.size if self.width is None else "x".join(map(str, self.sides))
                raise ScdError(
                    f"{path}: frames of {height}x{width} pixels, but data.frame_size is "
                    f"{wanted}; data.resize_shorter scales and crops them"
                )
            return 0, 0
        scaled = _scaled(size, self.resize_shorter)
        room = scaled[0] - self.sides[0], scaled[1] - self.sides[1]
        if min(room) < 0:
            raise ScdError(
                f"{path}: frames of {height}x{width} pixels, which data.resize_shorter="
                f"{self.resize_shorter} makes smaller than {'x'.join(map(str, self.sides))}"
            )
        return room

    @property
    def name(self) -> str:
        """Suffix for names of folders and encodings; empty if frames are used as they are."""
        if self.resize_shorter is None:
            return ""
        crop = self.size if self.width is None else "x".join(map(str, self.sides))
        return f"-resize{self.resize_shorter}-crop{crop}"


def framing_of(data: DataOptions) -> Framing:
    """Make the framing of an experiment."""
    return Framing(data.frame_size, data.resize_shorter, data.mirror, data.frame_width)


def resize_shorter(video: Tensor, side: int) -> Tensor:
    """Scale frames (F, 3, H, W) uint8 so that the shorter side has `side` pixels.

    The aspect ratio stays. The filter is bicubic with antialiasing: it widens with the factor, so
    fine texture averages out instead of flickering from frame to frame.
    """
    height, width = video.shape[-2:]
    size = _scaled((height, width), side)
    if size == (height, width):
        return video
    return F.interpolate(video, size=size, mode="bicubic", antialias=True)


def _scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Scale height and width so that the shorter one becomes `side`."""
    height, width = (max(side, round(length * side / min(size))) for length in size)
    return height, width


def as_images(frames: np.ndarray) -> Tensor:
    """Convert frames (F, H, W, 3) uint8 to (F, 3, H, W) uint8."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2)
