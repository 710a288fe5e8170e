"""How long videos hold out: sharpness, motion and drift of the videos of a folder, over time.

Nothing real is needed to compare with: every part of a video is held against its own first part.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scd.data.video import VideoFile
from scd.errors import ScdError
from scd.evaluation.frame_metrics import motion, sharpness
from scd.utils.files import write_json
from scd.utils.table import Table

FRAMES_AT_ONCE = 16
COLUMNS = {"sharpness": "sharpness →1", "motion": "motion →1", "drift": "drift ↓"}


def measure_streams(folder: Path, windows: int) -> dict[str, dict[str, list[float]]]:
    """Print a table of a folder's videos over time, and write it to `streams.json` in there.

    - sharpness: mean absolute Laplacian, divided by that of the first window;
    - motion: mean absolute change from frame to frame, divided by that of the first window;
    - drift: distance of the mean color from that of the first window, in 8-bit steps.

    Args:
        windows: parts of equal length that every video is cut into.

    Returns:
        Video -> column -> a value for each window.

    Raises:
        ScdError: no videos, a damaged one, or too few frames for so many windows.
    """
    paths = sorted(path for path in folder.glob("*.mp4") if not _is_unfinished(path.name))
    if not paths:
        raise ScdError(f"{folder}: no videos (mp4) to measure")
    if windows < 2:
        raise ScdError(f"--windows must be at least 2, not {windows}")
    found = {path.name: _measure(path, windows) for path in tqdm(paths, unit="video")}
    write_json(folder / "streams.json", found)
    lines = [
        [name, *(" ".join(f"{value:.2f}" for value in columns[key]) for key in COLUMNS)]
        for name, columns in found.items()
    ]
    means = {key: np.mean([columns[key] for columns in found.values()], axis=0) for key in COLUMNS}
    lines.append(["mean", *(" ".join(f"{v:.2f}" for v in means[key]) for key in COLUMNS)])
    note = f"Each number is of one of {windows} parts of the video; the first part is the measure."
    print(Table(["video", *COLUMNS.values()], lines, names=1, notes=[note]).markdown())
    return found


def _is_unfinished(name: str) -> bool:
    """Recognize a file that is still written aside, or was by a process that was killed."""
    return name.startswith(".") or name.endswith(".part.mp4")


def _measure(path: Path, windows: int) -> dict[str, list[float]]:
    video = VideoFile(path)
    if len(video) < 2 * windows:
        raise ScdError(f"{path}: {len(video)} frames, too few for {windows} windows: give fewer")
    edges = [number * len(video) // windows for number in range(windows + 1)]
    parts = [_of_frames(video, first, last) for first, last in pairwise(edges)]
    sharp, moving, colors = zip(*parts, strict=True)
    if not sharp[0] or not moving[0]:
        raise ScdError(f"{path}: its beginning is without detail or stands still: no measure")
    return {
        "sharpness": [value / sharp[0] for value in sharp],
        "motion": [value / moving[0] for value in moving],
        "drift": [255 * float((color - colors[0]).norm()) for color in colors],
    }


def _of_frames(video: VideoFile, first: int, last: int) -> tuple[float, float, Tensor]:
    """Compute sharpness, motion and mean color (3,) of some frames, a few of them at once."""
    sharp, moving, colors = [], [], []
    for frames, begins in _pieces(video, first, last):
        sharp.append(sharpness(frames[None, begins:])[0])
        moving.append(motion(frames[None])[0])
        colors.append(frames[begins:].mean(dim=(2, 3)))  # (f, 3)
    return (
        float(torch.cat(sharp).mean()),
        float(torch.cat(moving).mean()),
        torch.cat(colors).mean(dim=0),
    )


def _pieces(video: VideoFile, first: int, last: int) -> Iterator[tuple[Tensor, int]]:
    """Read frames first..last-1 (f, 3, H, W) in [0, 1], each piece after the last frame before it.

    Yields the piece, and whether such a frame precedes it (1 or 0).
    """
    for start in range(first, last, FRAMES_AT_ONCE):
        before = int(start > first)
        numbers = np.arange(start - before, min(start + FRAMES_AT_ONCE, last))
        frames = torch.from_numpy(video.frames(numbers)).movedim(-1, 1).float() / 255
        yield frames, before
