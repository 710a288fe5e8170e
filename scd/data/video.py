"""Reading and writing video files."""

from pathlib import Path

import imageio_ffmpeg
import numpy as np

from scd.errors import ScdError
from scd.files import write_whole


def write_video(path: Path, frames: np.ndarray, fps: float, crf: int = 12) -> None:
    """Write frames (F, H, W, 3) uint8 as H.264 mp4.

    Full chroma resolution (4:4:4) keeps the colours of small pictures where they belong: with the
    usual halved chroma, edges of 64x64 frames bleed visibly. Pictures of 256 pixels and more get
    4:2:0, which every browser plays.

    Args:
        crf: constant rate factor; 0 is lossless, 12 shows no blocks at 64x64.
    """
    small = max(frames.shape[1:3]) < 256

    height, width = frames.shape[1:3]

    def write(aside: Path) -> None:
        writer = imageio_ffmpeg.write_frames(
            str(aside),
            (width, height),
            fps=fps,
            codec="libx264",
            pix_fmt_out="yuv444p" if small else "yuv420p",
            macro_block_size=2,
            output_params=["-crf", str(crf), "-threads", "1"],
            ffmpeg_log_level="error",
        )
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()

    write_whole(path, write)


class VideoFile:
    """Random access to the frames of a video.

    Raises:
        ScdError: the file is missing, or no decoder can read it.
    """

    def __init__(self, path: Path):
        import decord

        if not path.is_file():
            raise ScdError(f"{path}: no such video")
        self.path = path
        try:
            self._reader = decord.VideoReader(str(path), num_threads=1)
        except (decord.DECORDError, RuntimeError) as error:
            raise ScdError(f"{path}: not a readable video ({_first_line(error)})") from error

    def __len__(self) -> int:
        return len(self._reader)

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """Decode frames, (n, H, W, 3) uint8.

        Raises:
            ScdError: the video is too short or damaged.
        """
        import decord

        if len(indices) and int(indices.max()) >= len(self):
            raise ScdError(
                f"{self.path}: {len(self)} frames, but frame {int(indices.max())} was asked for"
            )
        try:
            return self._reader.get_batch(list(map(int, indices))).asnumpy()
        except (decord.DECORDError, RuntimeError) as error:
            raise ScdError(f"{self.path}: damaged video ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
