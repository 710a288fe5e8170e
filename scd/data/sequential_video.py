"""Decode a video from its first frame on with ffmpeg: right for any file, slow for clips."""

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
    """The result of decoding a video in order.

    Attributes:
        sums: Adler-32 (from 0) of the RGB bytes of each frame.
        fps: average frames per second; None without usable time stamps.
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
    errors = done.stderr.decode(errors="replace")
    if "matches no streams" in errors:
        raise ScdError(f"{path}: has no pictures, perhaps only sound: leave it out")
    if "received no packets" in errors:
        raise ScdError(f"{path}: a video without a single frame: leave it out")
    if done.returncode:
        raise ScdError(f"{path}: not a readable video ({_reason(errors)})")
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
    """A video without random access: every reading decodes it from the first frame on.

    Args:
        frames: number of its frames.
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
        """Read all frames in order, at most `size` at once, decoding the video once."""
        self._check_memory(size, *self._size)
        with closing(self._decode(0, self._count - 1)) as decoded:
            for start in range(0, self._count, size):
                count = min(size, self._count - start)
                yield np.stack([next(decoded) for _ in range(count)])

    def _decode(self, first: int, last: int) -> Generator[np.ndarray]:
        """Decode frames `first` to `last`.

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
    """Write the command that makes a video fast to read, with a key frame every 30 frames."""
    return (
        f"ffmpeg -i {shlex.quote(str(path))} -map 0:v:0 -fps_mode passthrough -c:v libx264 "
        f"-crf 12 -g 30 {shlex.quote(str(path.with_name(f'{path.stem}-new.mp4')))}"
    )


def _command(path: Path, *output: str) -> list[str]:
    # No errors are accepted: a missing frame would change the numbers of all frames behind it. Only
    # local files are opened: a file named as a video may be a list of addresses.
    return [
        ffmpeg(path),
        *("-v", "error", "-nostdin", "-max_error_rate", "0"),
        *("-threads", "1", "-max_pixels", str(MAX_ARRAY_BYTES // 3)),
        # One filter graph throughout: a new one, where the size changes, would count from 0 again.
        *("-reinit_filter", "0"),
        *("-protocol_whitelist", "file", "-i", f"file:{path}"),
        *("-map", "0:v:0", "-fps_mode", "passthrough", "-pix_fmt", "rgb24"),
        *output,
        "-",
    ]


def _reason(errors: str) -> str:
    """Return ffmpeg's first error, without the name of the component that reports it."""
    line = next((line for line in errors.splitlines() if line.strip()), "no reason given")
    return line.rpartition("] ")[2].strip()[:200]
