"""Clips kept as arrays: an `.npz` with `video`, uint8 (F, H, W, 3), as DMLab's are."""

from pathlib import Path

import numpy as np

from scd.data.video import VideoFile
from scd.errors import ScdError
from scd.files import npz_header, read_npz


class NpzVideo:
    """Looks like a `VideoFile`. The array is decompressed as a whole, at the first `frames`.

    Raises:
        ScdError: the file is missing, damaged, larger than `scd.files.MAX_ARRAY_BYTES`, or `video`
            is not uint8 (F, H, W, 3).
    """

    def __init__(self, path: Path):
        self.path = path
        self.shape, dtype = npz_header(path, "video")
        if len(self.shape) != 4 or self.shape[3] != 3 or dtype != np.uint8 or 0 in self.shape:
            raise ScdError(
                f"{path}: video must be uint8 (frames, height, width, 3), not {dtype} {self.shape}"
            )
        self._video: np.ndarray | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """Some frames, (n, H, W, 3) uint8.

        Raises:
            ScdError: the video is too short or damaged.
        """
        if len(indices) and int(indices.max()) >= len(self):
            raise ScdError(
                f"{self.path}: {len(self)} frames, but frame {int(indices.max())} was asked for"
            )
        if self._video is None:
            self._video = read_npz(self.path, "video")
        return self._video[indices]


def open_video(path: Path) -> VideoFile | NpzVideo:
    """A video of either kind, by its suffix.

    Raises:
        ScdError: see `VideoFile` and `NpzVideo`.
    """
    return NpzVideo(path) if path.suffix == ".npz" else VideoFile(path)
