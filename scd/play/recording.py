"""Files to download: a session's timeline as a video, a start clip as a thumbnail."""

import asyncio
import io
import statistics
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image
from starlette.responses import PlainTextResponse, Response

from scd.data.video import write_video
from scd.errors import ScdError
from scd.play.history import Frame
from scd.play.session import Session
from scd.play.starts import Start

MAX_RECORDINGS = 2  # made at the same time
ENLARGE = 4
# A longer gap between two frames is a pause: in seconds, and in gaps of this timeline.
PAUSE, PAUSE_GAPS = 1.0, 3.0


def start_thumbnail(start: Start) -> bytes:
    """Encode a start clip's last frame, where play begins, as PNG."""
    file = io.BytesIO()
    Image.fromarray(start.frames[-1]).save(file, format="PNG")
    return file.getvalue()


async def record_mp4(
    session: Session, query: Mapping[str, str], recordings: asyncio.Semaphore
) -> Response:
    """Respond with the session's timeline as mp4, worlds side by side, at the speed of play.

    The header `First-Frame` is the number of its first frame: frames that were dropped are missing.

    Args:
        query: may have `first` and `last`, frame numbers.
        recordings: limits how many are made at the same time.
    """
    timeline = list(session.game.history.timeline)
    try:
        first, last = int(query.get("first", 0)), int(query.get("last", timeline[-1].number))
    except ValueError:
        return PlainTextResponse("first and last must be frame numbers", 400)
    frames = [frame for frame in timeline if first <= frame.number <= last]
    if not frames:
        return PlainTextResponse("no such frames", 400)
    if recordings.locked():
        return PlainTextResponse("other recordings are being made; try again in a moment", 503)
    try:
        async with recordings:
            fps = min(played_fps(frames) or session.fps, session.limits.max_fps)
            data = await asyncio.to_thread(_mp4, frames, fps)
    except ScdError as error:
        return PlainTextResponse(str(error), 500)
    name = f"{session.game.start.name}-{frames[0].number}-{frames[-1].number}.mp4"
    # Headers are Latin-1, but a start may be named in any script (RFC 6266).
    named = f'filename="{name}"' if name.isascii() else f"filename*=UTF-8''{quote(name)}"
    attached = {"Content-Disposition": f"attachment; {named}"}
    return Response(
        data, media_type="video/mp4", headers=attached | {"First-Frame": str(frames[0].number)}
    )


def played_fps(frames: list[Frame]) -> float | None:
    """Estimate the frames per second of play without pauses; None: fewer than two were played.

    It may be below the player's setting, and vary; this is the median.
    """
    played = [frame.made for frame in frames if frame.made is not None]
    gaps = [after - before for before, after in pairwise(played) if after > before]
    if not gaps:
        return None
    longest = max(PAUSE, PAUSE_GAPS * statistics.median(gaps))
    return 1 / statistics.median(gap for gap in gaps if gap <= longest)


def _mp4(frames: list[Frame], fps: float) -> bytes:
    video = np.stack([np.hstack([view.picture for view in frame.views]) for frame in frames])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timeline.mp4"
        write_video(path, video, fps, enlarge=ENLARGE)
        return path.read_bytes()
