"""Which videos can be read at any frame, and which only in order: found out once, and kept.

Seeking relies on what a file says of its key frames. Open GOPs, intra refresh, files without time
stamps and files cut without re-encoding say it wrongly, and another frame comes than was asked for.
Here frame i of a video is the i-th that decoding it in order gives.
"""

import hashlib
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
END_BYTES = 2**16  # read of either end of a file to know it again
WHOLE_BYTES = 2**20  # of files up to this size, all is hashed
CHUNK_FRAMES = 8
PLACES = 6  # where clips are read as training would


@dataclass(frozen=True)
class VideoCheck:
    """Holds what was found out about a video.

    Attributes:
        identity: of the file that this was found of, see `identity_of`.
        frames: how many come when it is decoded in order.
        random_access: seeking gives the same frames.
        fps: frames a second on average, if it says.
    """

    identity: str
    frames: int
    height: int
    width: int
    random_access: bool
    fps: float | None = None


class VideoChecks:
    """The checks of the videos below a data root; `video_checks.json` in it keeps them.

    A video that is not in it, or has changed, is checked when it is asked for. The file is read
    when it is first needed; what another decoder found does not count.
    """

    def __init__(self, root: Path):
        self.root = root
        self._path = root / KEPT
        self._new: dict[str, VideoCheck] = {}

    @cached_property
    def _kept(self) -> dict[str, VideoCheck]:
        """Read what was found before.

        Raises:
            ScdError: the file is damaged.
        """
        return _read(self._path) if self._path.exists() else {}

    def __contains__(self, video: str) -> bool:
        return video in self._kept or video in self._new

    def check(self, video: str) -> VideoCheck:
        """Look up what is known of a video, by its path below the root, or find it out.

        Raises:
            ScdError: it is missing, no video, or damaged; or what was kept is damaged.
        """
        path = self.root / video
        identity = identity_of(path)
        known = self._new.get(video) or self._kept.get(video)
        if known is None or known.identity != identity:
            known = self._new[video] = check_video(path, identity)
        return known

    def open(self, video: str) -> Video:
        """A video, or a clip in an `.npz`, ready for reading at any frame.

        Raises:
            ScdError: see `check` and `NpzVideo`.
        """
        path = self.root / video
        if path.suffix == ".npz":
            return NpzVideo(path)
        known = self.check(video)
        if known.random_access:
            return VideoFile(path)
        return InOrderVideo(path, known.frames, (known.height, known.width))

    def check_all(self, videos: Iterable[str]) -> None:
        """Check videos and keep what was found.

        Raises:
            ScdError: see `check`; or it cannot be kept.
        """
        videos = list(videos)
        try:
            with ThreadPoolExecutor() as pool:
                checked = pool.map(self.check, videos)
                for _ in tqdm(checked, total=len(videos), desc="check", unit="clip"):
                    pass
        finally:
            self.save()

    @property
    def new(self) -> dict[str, VideoCheck]:
        """What was found out here, and is not kept yet."""
        return self._new

    def add(self, found: dict[str, VideoCheck]) -> None:
        """Take in what another process found out."""
        self._new |= found

    def fps(self, video: str) -> float | None:
        """Look up the frames a second of a video that was checked."""
        known = self._new.get(video) or self._kept.get(video)
        return None if known is None else known.fps

    def in_order(self, videos: Iterable[str]) -> list[str]:
        """Select those of the videos checked so far that can be read in order alone."""
        known = {**self._kept, **self._new}
        return [video for video in videos if video in known and not known[video].random_access]

    def save(self) -> None:
        """Keep what was found since the file was read.

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
    """One line on the videos of a list that are slow to read, and the remedy."""
    return (
        f"{list_path}: videos read from their first frame on for every clip, since seeking in them "
        f"fails or shows other frames: {len(videos)}. To make a fast one, to put in its place: "
        f"{remedy(root / videos[0])}"
    )


@cache
def decoder() -> str:
    """Name what seeks in videos here: another decoder, or version, may land elsewhere."""
    found = (next(iter(metadata.Distribution.discover(name=name)), None) for name in DECODERS)
    return next(f"{one.metadata['Name']} {one.version}" for one in found if one is not None)


def identity_of(path: Path) -> str:
    """Identify a file by its size and a hash of its contents, or of both its ends.

    Of a large video, one end holds the place and size of every frame. Copying a file does not
    change its identity.

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
    """Read a file's identity, once for each time that it was written: every clip asks for it."""
    with open(path, "rb") as file:
        ends = file.read(END_BYTES if size > WHOLE_BYTES else size)
        if size > WHOLE_BYTES:
            file.seek(size - END_BYTES)
            ends += file.read(END_BYTES)
    return f"{size}-{hashlib.sha256(ends).hexdigest()[:32]}"


@lru_cache(maxsize=2**16)
def check_video(path: Path, identity: str) -> VideoCheck:
    """Decode a video in order, then seek to each of its key frames and compare.

    Raises:
        ScdError: it is no video, or damaged.
    """
    decoded = decode(path)
    right = _seeking_is_right(path, decoded)
    fps = None if decoded.fps is None else round(decoded.fps, 3)
    return VideoCheck(identity, len(decoded.sums), decoded.height, decoded.width, right, fps)


def _seeking_is_right(path: Path, decoded: Decoded) -> bool:
    try:
        video = VideoFile(path)
        if len(video) != len(decoded.sums):
            return False
        found = _by_seeking(video)
        # Another version of ffmpeg may round colours in another way: then against its own order.
        if found != decoded.sums and found != _sums(VideoFile(path).chunks(CHUNK_FRAMES)):
            return False
        for place in np.linspace(0, len(video) - 1, PLACES).astype(int):
            ahead = np.array([0, 1, (len(video) - place) // 2, len(video) - 1 - place])
            indices = np.unique(np.minimum(place + ahead, len(video) - 1))
            if _sums([VideoFile(path).frames(indices)]) != [found[i] for i in indices]:
                return False
    except ScdError:  # this decoder cannot read it: AV1, no duration, some widths
        return False
    return True


def _by_seeking(video: VideoFile) -> list[int]:
    """Sums of all frames: from the last key frame to the first, so that every one is sought."""
    keys, sums = video.key_frames, [0] * len(video)
    for start, end in reversed(list(zip(keys, [*keys[1:], len(video)], strict=True))):
        firsts = range(start, end, CHUNK_FRAMES)
        parts = (video.frames(np.arange(i, min(i + CHUNK_FRAMES, end))) for i in firsts)
        sums[start:end] = _sums(parts)
    return sums


def _sums(parts: Iterable[np.ndarray]) -> list[int]:
    return [zlib.adler32(frame, 0) for frames in parts for frame in frames]


def _read(path: Path) -> dict[str, VideoCheck]:
    """Read what was kept.

    Raises:
        ScdError: it is something else.
    """
    kept = read_json(path)
    wrong = ScdError(f"{path}: not what scd keeps of its checks of videos: remove it")
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
