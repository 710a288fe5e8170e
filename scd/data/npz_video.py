"""Clips kept as arrays: an `.npz` with `video`, uint8 (F, H, W, 3), as DMLab's are."""

from pathlib import Path

import numpy as np

from scd.data.video import Video
from scd.errors import ScdError
from scd.files import npz_header, read_npz


class NpzVideo(Video):
    """The array is decompressed as a whole, at the first `frames`.

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
        self._check_wanted(indices)
        if self._video is None:
            self._video = read_npz(self.path, "video")
        return self._video[indices]
