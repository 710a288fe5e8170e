"""Reading and writing video files."""

import os
import re
import subprocess
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np

from scd.errors import ScdError, reason
from scd.utils.files import MAX_ARRAY_BYTES, npz_header, read_npz, write_atomically

# A clip is decoded from the key frame before it. With x264's default distance, 250, reading 16
# frames from the middle of a 128x128 video took 3 times as long; files grow by 3 to 7 %.
KEYFRAME_EVERY = 24
UNREADABLE_WIDTHS = (8, 12, 16, 24, 48, 72)  # known of decord
READABLE_WIDTHS = (32, 56, 80)

# Closing a reader waits for its decoder threads. A forked process (a data worker) has none of them,
# so it never closes the readers that it inherited: it would hang or abort.
_readers: weakref.WeakSet[Any] = weakref.WeakSet()
_inherited: list[Any] = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(_readers))


def write_video(
    path: Path, frames: np.ndarray, fps: float, crf: int = 12, enlarge: int = 1
) -> None:
    """Write frames (F, H, W, 3) uint8 as H.264 mp4.

    Small frames keep full chroma resolution (4:4:4): with the usual halved chroma, edges of 64x64
    frames bleed visibly. Frames of 256 pixels and more get 4:2:0, which every browser plays, unless
    a side is odd.

    Args:
        crf: constant rate factor; 12 shows no blocks at 64x64. 0 is lossless RGB: `VideoFile` reads
            the same bytes back (players know this kind of H.264, browsers do not).
        enlarge: pixels per side of the video for one pixel of the frames.

    Raises:
        ScdError: the file cannot be written, or ffmpeg fails.
    """
    if frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"expected at least one frame of uint8, not {frames.dtype} {frames.shape}")
    _, height, width, _ = frames.shape
    arguments = _coding(height, width, fps, crf, enlarge)

    def write(aside: Path) -> None:
        command = [ffmpeg(path), "-y", "-v", "error", *arguments, f"file:{aside}"]
        done = subprocess.run(command, input=frames.tobytes(), capture_output=True)
        _check_done(path, done.returncode, done.stderr)

    write_atomically(path, write)


def _coding(height: int, width: int, fps: float, crf: int, enlarge: int = 1) -> list[str]:
    """List ffmpeg's arguments for coding raw frames from its input; see `write_video`."""
    sides = (height * enlarge, width * enlarge)
    full_chroma = max(sides) < 256 or any(side % 2 for side in sides)
    raw = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -"
    coder = f"libx264 -pix_fmt {'yuv444p' if full_chroma else 'yuv420p'}" if crf else "libx264rgb"
    scaled = f"-vf scale={sides[1]}:{sides[0]}:flags=neighbor " if enlarge > 1 else ""
    coded = f"{scaled}-c:v {coder} -crf {crf} -g {KEYFRAME_EVERY} -threads 1"
    return [*raw.split(), *coded.split()]


def _check_done(path: Path, status: int, errors: bytes) -> None:
    if status:
        message = errors.decode(errors="replace").strip() or f"status {status}"
        raise ScdError(f"{path}: ffmpeg cannot write it ({message.splitlines()[-1]})")


class VideoWriter:
    """Writes an H.264 mp4 in pieces, as `write_video` does at once; memory stays the same.

    Until it is complete the video stands in `<name>.part.mp4`, which players can show: all frames
    but the newest, whose length is not known yet. After an interruption that file stays.

    Args:
        height, width: of the frames.

    Raises:
        ScdError: the file cannot be written, or ffmpeg fails.
    """

    def __init__(self, path: Path, height: int, width: int, fps: float, crf: int = 12):
        self.path = path
        self.unfinished = path.with_suffix(".part.mp4")
        self._ffmpeg = ffmpeg(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Every frame is a fragment of its own, and is coded at once.
        live = "-tune zerolatency -flush_packets 1 -movflags empty_moov+frag_every_frame"
        arguments = [*_coding(height, width, fps, crf), *live.split()]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe would fill up
        self._process = subprocess.Popen(
            [self._ffmpeg, "-y", "-v", "error", *arguments, f"file:{self.unfinished}"],
            stdin=subprocess.PIPE,
            stderr=self._errors,
        )

    def write(self, frames: np.ndarray) -> None:
        """Append frames (F, H, W, 3) uint8."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(frames.tobytes())
            self._process.stdin.flush()
        except BrokenPipeError:
            self._end()
            raise

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._errors, suppress(*() if kind is None else (ScdError,)):
            self._end()
        if kind is not None:
            return

        def write(aside: Path) -> None:  # with an index, which seeking needs
            command = [self._ffmpeg, "-y", "-v", "error", "-i", f"file:{self.unfinished}"]
            done = subprocess.run([*command, "-c", "copy", f"file:{aside}"], capture_output=True)
            _check_done(self.path, done.returncode, done.stderr)

        write_atomically(self.path, write)
        self.unfinished.unlink()

    def _end(self) -> None:
        """Wait until ffmpeg has written all frames."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        status = self._process.wait()
        self._errors.seek(0)
        _check_done(self.path, status, self._errors.read())


def ffmpeg(path: Path) -> str:
    """Find the ffmpeg program.

    Args:
        path: the video that needs it, for the message.

    Raises:
        ScdError: there is none.
    """
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise ScdError(f"{path}: no ffmpeg to read or write it with ({reason(error)})") from error


class Video(ABC):
    """The frames of a clip, numbered from 0."""

    path: Path

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def frames(self, indices: np.ndarray) -> np.ndarray:
        """Read the frames of the given numbers, (n, H, W, 3) uint8.

        Raises:
            ScdError: the video is too short or damaged.
        """

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """Read all frames in order, at most `size` of them at once."""
        for start in range(0, len(self), size):
            yield self.frames(np.arange(start, min(start + size, len(self))))

    def _check_wanted(self, indices: np.ndarray) -> None:
        if len(indices) and int(indices.max()) >= len(self):
            raise ScdError(
                f"{self.path}: {len(self)} frames, so there is no frame {int(indices.max())}"
            )

    def _check_memory(self, count: int, height: int, width: int) -> None:
        if count * height * width * 3 > MAX_ARRAY_BYTES:
            raise ScdError(
                f"{self.path}: {count} frames of {height}x{width} pixels are more than the "
                f"{MAX_ARRAY_BYTES // 2**30} GiB that are read at once"
            )


class VideoFile(Video):
    """A video with random access, right if its key frames are where its container says.

    Those of `write_video` are; other files are checked by `scd.data.video_checks`.

    Raises:
        ScdError: the file is missing, or no decoder can read it.
    """

    def __init__(self, path: Path):
        import decord

        if not path.is_file():
            raise ScdError(f"{path}: no such video")
        self.path = path
        decord.logging.set_level(decord.logging.QUIET)  # errors are raised as well
        try:
            self._reader = decord.VideoReader(f"file:{path}", num_threads=1)
        except (decord.DECORDError, RuntimeError) as error:
            if not path.is_file():  # any more
                raise ScdError(f"{path}: no such video") from error
            raise ScdError(f"{path}: not a readable video ({_reason(error)})") from error
        _readers.add(self._reader)

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def key_frames(self) -> list[int]:
        """Numbers of the frames that seeking lands on, including frame 0."""
        return sorted({0, *map(int, self._reader.get_key_indices())})

    @property
    def fps(self) -> float:
        """Average frames per second, as the container says."""
        return float(self._reader.get_avg_fps())

    def frames(self, indices: np.ndarray) -> np.ndarray:
        import decord

        self._check_wanted(indices)
        try:
            # The first frame shows the size, before memory is allocated for all of them.
            first = self._reader.get_batch([int(indices[0])]).asnumpy()
            self._check_memory(len(indices), *first.shape[1:3])
            if len(indices) == 1:
                return first
            others = self._reader.get_batch(list(map(int, indices[1:]))).asnumpy()
            return np.concatenate([first, others])
        except (decord.DECORDError, RuntimeError) as error:
            if "The size must exactly match" in str(error):
                raise ScdError(
                    f"{self.path}: the decoder cannot read videos of this width (known for "
                    f"{', '.join(map(str, UNREADABLE_WIDTHS))} pixels): scale it to another"
                ) from error
            raise ScdError(f"{self.path}: damaged video ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """Return decord's message without the time and the source file that it begins with."""
    return re.sub(r"\[[\d:]+\] \S+: ", "", reason(error))


class NpzVideo(Video):
    """A clip in the array `video` of an npz file, decompressed as a whole when it is first read.

    Raises:
        ScdError: the file is missing, damaged, larger than `scd.utils.files.MAX_ARRAY_BYTES`, or
            `video` is not uint8 (F, H, W, 3).
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
