"""Checks that seeking in a video yields the right frames, made once and kept.

Seeking relies on the key frames that a file announces. With open GOPs, intra refresh, missing time
stamps, or after cutting without re-encoding, they are wrong, and seeking yields another frame. Here
frame i of a video is the i-th frame of decoding it in order.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scd.data.sequential_video import Decoded, InOrderVideo, decode, remedy
from scd.data.video import NpzVideo, Video, VideoFile
from scd.errors import ScdError
from scd.utils.files import read_json, write_json
from scd.utils.paths import why_missing

KEPT = "video_checks.json"
DECODER = "decoder"  # key of the file
DECODERS = ("decord", "decord2")  # distributions of the module decord
END_BYTES = 2**16  # hashed at either end of a file to identify it
WHOLE_BYTES = 2**20  # files up to this size are hashed as a whole
CHUNK_FRAMES = 8
PLACES = 6  # where clips are read as in training
ROUNDING = 4  # of 255: most that another version of ffmpeg changes the colors, on average
X264_SETTINGS = re.compile(rb"x264 - core [ -~]+")  # x264 writes them into the first frame


@dataclass(frozen=True)
class VideoCheck:
    """The result of checking a video.

    Attributes:
        identity: identity of the file that was checked, see `identity_of`.
        frames: number of frames that decoding in order yields.
        random_access: seeking yields the same frames.
        fps: average frames per second; None if the file has no usable time stamps.
    """

    identity: str
    frames: int
    height: int
    width: int
    random_access: bool
    fps: float | None = None


class VideoChecks:
    """The checks of the videos below a data root, kept in its `video_checks.json`.

    A video that is missing there, or has changed, is checked when it is first used. Checks made
    with another decoder do not count.
    """

    def __init__(self, root: Path):
        self.root = root
        self._path = root / KEPT
        self._new: dict[str, VideoCheck] = {}

    @cached_property
    def _kept(self) -> dict[str, VideoCheck]:
        """The checks in the file, which is read at the first use.

        Raises:
            ScdError: the file is damaged.
        """
        return _read(self._path) if self._path.exists() else {}

    def __contains__(self, video: str) -> bool:
        return video in self._kept or video in self._new

    def check(self, video: str) -> VideoCheck:
        """Return the check of a video, by its path below the root; make it if necessary.

        Raises:
            ScdError: the video is missing, damaged or none, or the file of checks is damaged.
        """
        path = self.root / video
        identity = identity_of(path)
        known = self._new.get(video) or self._kept.get(video)
        if known is None or known.identity != identity:
            known = self._new[video] = check_video(path, identity)
        return known

    def open(self, video: str) -> Video:
        """Open a video, or a clip in an `.npz`, for reading any of its frames.

        Raises:
            ScdError: see `check` and `NpzVideo`.
        """
        path = self.root / video
        if path.suffix.lower() == ".npz":
            return NpzVideo(path)
        known = self.check(video)
        if known.random_access:
            return VideoFile(path)
        return InOrderVideo(path, known.frames, (known.height, known.width))

    def check_all(self, videos: Iterable[str]) -> None:
        """Check videos and save the results.

        Raises:
            ScdError: see `check`; or the results cannot be saved.
        """
        videos = list(videos)
        try:
            with ThreadPoolExecutor() as pool:
                checked = pool.map(self.check, videos)
                for _ in tqdm(checked, total=len(videos), desc="check", unit="clip"):
                    pass
        finally:
            self.save()

    def check_alike(self, videos: list[str]) -> None:
        """Check videos of one encoder: the first in full, and those like it by their last frame.

        Whether seeking is right depends on how a video was encoded, not on its pictures. So a video
        with the same x264 settings and number, size and rate of frames shares the result of the
        first one. Any other is left for `check`.

        Args:
            videos: files that this process has just written.

        Raises:
            ScdError: see `check`.
        """
        if not videos or not (first := self.check(videos[0])).random_access:
            return
        signature = _signature(self.root / videos[0])
        for video in videos[1:]:
            path = self.root / video
            if signature is not None and _signature(path) == signature:
                self._new[video] = replace(first, identity=identity_of(path))

    @property
    def new(self) -> dict[str, VideoCheck]:
        """Checks that are not saved yet."""
        return self._new

    def add(self, found: dict[str, VideoCheck]) -> None:
        """Add checks that another process made."""
        self._new |= found

    def fps(self, video: str) -> float | None:
        """Look up the frames per second of a video that was checked."""
        known = self._new.get(video) or self._kept.get(video)
        return None if known is None else known.fps

    def in_order(self, videos: Iterable[str]) -> list[str]:
        """Select the videos that can only be read in order, among those checked so far."""
        known = {**self._kept, **self._new}
        return [video for video in videos if video in known and not known[video].random_access]

    def save(self) -> None:
        """Write the new checks to the file, beside those that others have written meanwhile.

        Raises:
            ScdError: it cannot be written.
        """
        if not self._new:
            return
        kept = _read(self._path) if self._path.exists() else {}
        self._kept = dict(sorted({**kept, **self._new}.items()))
        self._new = {}
        videos = {name: asdict(check) for name, check in self._kept.items()}
        write_json(self._path, {DECODER: decoder(), "videos": videos})


def slow_reading_note(list_path: Path, root: Path, videos: list[str]) -> str:
    """Write one line about the videos of a list that are slow to read, with the remedy."""
    return (
        f"{list_path}: slow videos: {len(videos)}. Seeking in them fails or yields other frames, "
        f"so every clip is read from the first frame on. To make a fast one that replaces a slow "
        f"one: {remedy(root / videos[0])}"
    )


@cache
def decoder() -> str:
    """Name the decoder that seeks in videos, with its version: another may land elsewhere."""
    installed = (next(iter(metadata.Distribution.discover(name=name)), None) for name in DECODERS)
    return next(f"{one.metadata['Name']} {one.version}" for one in installed if one is not None)


def identity_of(path: Path) -> str:
    """Identify a file by its size and a hash of its contents or, for a large one, of both ends.

    One end of a video holds the place and size of every frame. A copy has the same identity.

    Raises:
        ScdError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise ScdError(f"{path}: {why_missing(path, 'video')}")
    try:
        now = path.stat()
        return _identity(path, now.st_size, now.st_mtime_ns)
    except OSError as error:
        raise ScdError(f"{path}: cannot be read ({error.strerror or error})") from error


@lru_cache(maxsize=2**16)
def _identity(path: Path, size: int, modified: int) -> str:
    """Compute the identity of a file once for each time it is written: every clip needs it."""
    with open(path, "rb") as file:
        ends = file.read(END_BYTES if size > WHOLE_BYTES else size)
        if size > WHOLE_BYTES:
            file.seek(size - END_BYTES)
            ends += file.read(END_BYTES)
    return f"{size}-{hashlib.sha256(ends).hexdigest()[:32]}"


@lru_cache(maxsize=2**16)
def check_video(path: Path, identity: str) -> VideoCheck:
    """Check a video: decode it in order, then seek to each of its key frames, and compare.

    Raises:
        ScdError: it is no video, or damaged.
    """
    decoded = decode(path)
    right = _seeking_is_right(path, decoded)
    fps = None if decoded.fps is None else round(decoded.fps, 3)
    return VideoCheck(identity, len(decoded.sums), decoded.height, decoded.width, right, fps)


def _signature(path: Path) -> tuple | None:
    """Return what decides how a video is sought in; None unless x264 wrote it and it can be read.

    The last frame is decoded, which a file that was not written to its end does not have.
    """
    try:
        with open(path, "rb") as file:
            settings = X264_SETTINGS.search(file.read(END_BYTES))
        video = VideoFile(path)
        size = video.frames(np.array([len(video) - 1])).shape
    except (ScdError, OSError):
        return None
    return None if settings is None else (settings[0], len(video), size, video.fps)


def _seeking_is_right(path: Path, decoded: Decoded) -> bool:
    try:
        video = VideoFile(path)
        if len(video) != len(decoded.sums):
            return False
        sought = _by_seeking(video)
        if sought != decoded.sums:
            # Another version of ffmpeg may round colors differently, but mirrors what is to be
            # mirrored, which decord does not. Otherwise compare with decord's order.
            in_order = _sums(VideoFile(path).chunks(CHUNK_FRAMES))
            if sought != in_order or not _looks_as_decoded(path, video, decoded):
                return False
        for place in np.linspace(0, len(video) - 1, PLACES).astype(int):
            ahead = np.array([0, 1, (len(video) - place) // 2, len(video) - 1 - place])
            indices = np.unique(np.minimum(place + ahead, len(video) - 1))
            if _sums([VideoFile(path).frames(indices)]) != [sought[i] for i in indices]:
                return False
    except ScdError:  # this decoder cannot read it: AV1, no duration, some widths
        return False
    return True


def _looks_as_decoded(path: Path, video: VideoFile, decoded: Decoded) -> bool:
    size = (decoded.height, decoded.width)
    indices = np.linspace(0, len(video) - 1, PLACES).astype(int)
    sought = video.frames(indices).astype(np.int16)
    expected = InOrderVideo(path, len(decoded.sums), size).frames(indices)
    return sought.shape == expected.shape and np.abs(sought - expected).mean() < ROUNDING


def _by_seeking(video: VideoFile) -> list[int]:
    """Sum all frames, from the last key frame to the first, so that each of them is sought."""
    keys, sums = video.key_frames, [0] * len(video)
    for start, end in reversed(list(zip(keys, [*keys[1:], len(video)], strict=True))):
        firsts = range(start, end, CHUNK_FRAMES)
        parts = (video.frames(np.arange(i, min(i + CHUNK_FRAMES, end))) for i in firsts)
        sums[start:end] = _sums(parts)
    return sums


def _sums(parts: Iterable[np.ndarray]) -> list[int]:
    return [zlib.adler32(frame, 0) for frames in parts for frame in frames]


def _read(path: Path) -> dict[str, VideoCheck]:
    """Read a file of checks.

    Raises:
        ScdError: it is damaged, or something else.
    """
    kept = read_json(path)
    wrong = ScdError(f"{path}: not a file of video checks as scd writes it: remove it")
    if not isinstance(kept, dict) or not isinstance(kept.get("videos"), dict):
        raise wrong
    if kept.get(DECODER) != decoder():
        return {}
    checks = {}
    for video, values in kept["videos"].items():
        try:
            checks[video] = check = VideoCheck(**values)
        except TypeError:
            raise wrong from None
        whole = (check.frames, check.height, check.width)
        if (
            not isinstance(check.identity, str)
            or not isinstance(check.random_access, bool)
            or not all(type(number) is int and number > 0 for number in whole)
            or not (check.fps is None or type(check.fps) is float)
        ):
            raise wrong
    return checks
