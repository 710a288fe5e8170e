"""Pictures as files: a session's line as a video, a start as a thumbnail."""

import asyncio
import io
import statistics
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from starlette.responses import PlainTextResponse, Response

from scd.data.video import write_video
from scd.errors import ScdError
from scd.play.history import Frame
from scd.play.session import Session
from scd.play.starts import Start

MAX_RECORDINGS = 2  # at a time
ENLARGED = 4
PAUSE = 1.0  # seconds between two frames that are none of the pace


def start_png(start: Start) -> bytes:
    """Its last frame, where play begins."""
    file = io.BytesIO()
    Image.fromarray(start.frames[-1]).save(file, format="PNG")
    return file.getvalue()


async def record_mp4(
    session: Session, query: Mapping[str, str], recordings: asyncio.Semaphore
) -> Response:
    """The session's line as mp4, its worlds side by side, as fast as it was played.

    The header `First-Frame` tells where it begins: frames that are no longer kept are missing.

    Args:
        query: may have `first` and `last`, numbers of frames.
    """
    line = list(session.game.history.line)
    try:
        first, last = int(query.get("first", 0)), int(query.get("last", line[-1].number))
    except ValueError:
        return PlainTextResponse("first and last are numbers of frames", 400)
    frames = [frame for frame in line if first <= frame.number <= last]
    if not frames:
        return PlainTextResponse("no such frames", 400)
    if recordings.locked():
        return PlainTextResponse("other recordings are being made: try again in a moment", 503)
    try:
        async with recordings:
            fps = min(pace(frames) or session.fps, session.limits.max_fps)
            data = await asyncio.to_thread(_mp4, frames, fps)
    except ScdError as error:
        return PlainTextResponse(str(error), 500)
    name = f"{session.game.start.name}-{frames[0].number}-{frames[-1].number}.mp4"
    attached = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(
        data, media_type="video/mp4", headers=attached | {"First-Frame": str(frames[0].number)}
    )


def pace(frames: list[Frame]) -> float | None:
    """Frames a second, pauses left out; None where none was played after another.

    It may have been less than the player had asked for, and another at each time.
    """
    played = [frame.made for frame in frames if frame.made is not None]
    gaps = [after - before for before, after in pairwise(played) if 0 < after - before < PAUSE]
    return 1 / statistics.median(gaps) if gaps else None


def _mp4(frames: list[Frame], fps: float) -> bytes:
    video = np.stack([np.hstack([view.picture for view in frame.views]) for frame in frames])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "line.mp4"
        write_video(path, video, fps, enlarge=ENLARGED)
        return path.read_bytes()
