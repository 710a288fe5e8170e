"""Reading a video from its first frame on, with ffmpeg: right for any file, slow for clips."""

import shlex
import subprocess
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scd.data.video import Video, ffmpeg
from scd.errors import ScdError
from scd.utils.files import MAX_ARRAY_BYTES


@dataclass(frozen=True)
class Decoded:
    """What decoding a video in order gives.

    Attributes:
        sums: Adler-32 (from 0) of each frame's RGB bytes.
        fps: frames a second on average; None where the times of the frames do not tell.
    """

    sums: list[int]
    height: int
    width: int
    fps: float | None


def decode(path: Path) -> Decoded:
    """Decode a whole video.

    Raises:
        ScdError: it has no frames, or is damaged.
    """
    done = subprocess.run(_command(path, "-f", "framecrc"), capture_output=True)
    told = done.stderr.decode(errors="replace")
    if "matches no streams" in told:
        raise ScdError(f"{path}: no pictures in it, sound alone perhaps: leave it out")
    if "received no packets" in told:
        raise ScdError(f"{path}: a video without a single frame: leave it out")
    if done.returncode:
        raise ScdError(f"{path}: not a readable video ({_reason(told)})")
    times, sums, about = [], [], {}
    for line in done.stdout.decode().splitlines():
        if line.startswith("#"):
            key, _, value = line[1:].partition(": ")
            about[key] = value
        else:  # stream, dts, pts, duration, size, sum
            fields = line.split(",")
            times.append(int(fields[2]))
            sums.append(int(fields[5], 16))
    width, height = map(int, about["dimensions 0"].split("x"))
    numerator, denominator = map(int, about["tb 0"].split("/"))
    span = (times[-1] - times[0]) * numerator / denominator
    return Decoded(sums, height, width, (len(sums) - 1) / span if span > 0 else None)


class InOrderVideo(Video):
    """A video of `frames` frames, decoded from the first to the last one wanted at every reading.

    Args:
        size: (H, W) of its frames.
    """

    def __init__(self, path: Path, frames: int, size: tuple[int, int]):
        self.path = path
        self._count = frames
        self._size = size

    def __len__(self) -> int:
        return self._count

    def frames(self, indices: np.ndarray) -> np.ndarray:
        self._check_wanted(indices)
        self._check_memory(len(indices), *self._size)
        wanted, places = np.unique(indices, return_inverse=True)
        first, last = int(wanted[0]), int(wanted[-1])
        frames = np.empty((len(wanted), *self._size, 3), np.uint8)
        with closing(self._decode(first, last)) as decoded:
            for number, frame in enumerate(decoded, first):
                place = np.searchsorted(wanted, number)
                if wanted[place] == number:
                    frames[place] = frame
        return frames[places]

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """As of every video, but decoded once, not once a chunk."""
        self._check_memory(size, *self._size)
        with closing(self._decode(0, self._count - 1)) as decoded:
            for start in range(0, self._count, size):
                count = min(size, self._count - start)
                yield np.stack([next(decoded) for _ in range(count)])

    def _decode(self, first: int, last: int) -> Generator[np.ndarray]:
        """Frames `first` to `last`.

        Raises:
            ScdError: there are fewer.
        """
        chosen = ["-vf", rf"select=between(n\,{first}\,{last})", "-frames:v", str(last - first + 1)]
        size = 3 * self._size[0] * self._size[1]
        command = _command(self.path, *chosen, "-f", "rawvideo")
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=size
        )
        assert process.stdout is not None
        try:
            for number in range(first, last + 1):
                data = process.stdout.read(size)
                if len(data) < size:
                    raise ScdError(
                        f"{self.path}: damaged video (decoding ended at frame {number} of "
                        f"{self._count})"
                    )
                yield np.frombuffer(data, np.uint8).reshape(*self._size, 3)
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def remedy(path: Path) -> str:
    """The command that makes a video fast to read: key frames in order, one every 30 frames."""
    return (
        f"ffmpeg -i {shlex.quote(str(path))} -map 0:v:0 -fps_mode passthrough -c:v libx264 "
        f"-crf 12 -g 30 {shlex.quote(str(path.with_name(f'{path.stem}-new.mp4')))}"
    )


def _command(path: Path, *output: str) -> list[str]:
    # A frame that cannot be decoded would be missing, and those behind it move up: no error rate.
    # Local files alone: what looks like a video may be a list of addresses.
    return [
        ffmpeg(path),
        *("-v", "error", "-nostdin", "-max_error_rate", "0"),
        *("-threads", "1", "-max_pixels", str(MAX_ARRAY_BYTES // 3)),
        # One filter graph for all of it: a new one, where the size changes, would count from 0.
        *("-reinit_filter", "0"),
        *("-protocol_whitelist", "file", "-i", f"file:{path}"),
        *("-map", "0:v:0", "-fps_mode", "passthrough", "-pix_fmt", "rgb24"),
        *output,
        "-",
    ]


def _reason(told: str) -> str:
    """ffmpeg's first complaint, without the part of it that complains."""
    line = next((line for line in told.splitlines() if line.strip()), "no reason given")
    return line.rpartition("] ")[2].strip()[:200]
