"""Reading the clips of a list from first to last frame: what they are, and what is broken."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
from tqdm import tqdm

from scd.data.clips import check_actions, read_actions
from scd.data.latents import latent_header, of_another_video, read_latents
from scd.data.lists import ClipEntry, read_list
from scd.data.video import Video
from scd.data.video_checks import VideoChecks
from scd.errors import ScdError
from scd.utils.files import sha256

CHUNK_FRAMES = 64  # decoded at once; bounds the memory of long videos


@dataclass(frozen=True)
class Demands:
    """What an experiment wants of a list's clips; the defaults want nothing.

    Attributes:
        needed: fields of `ClipEntry` that no entry may lack.
        condition, num_conditions: of the model that is to learn from them; None: any will do.
        frame_size: of every frame, (H, W); None: any.
        made_by, latent_shape: what made the latents, and (C, h, w); None: anything.
    """

    needed: tuple[str, ...] = ()
    condition: str | None = None
    num_conditions: int = 0
    frame_size: tuple[int, int] | None = None
    made_by: str | None = None
    latent_shape: tuple[int, int, int] | None = None


@dataclass
class ClipReport:
    """What was found of one clip; `problem` is None for a whole one."""

    problem: str | None = None
    frames: int = 0
    size: str | None = None
    fps: float | None = None
    actions: Counter[int] = field(default_factory=Counter)
    held: Counter[tuple[int, ...]] = field(default_factory=Counter)
    label: int | None = None
    latents: str | None = None
    digest: str = ""


@dataclass
class Survey:
    """What was found in a list.

    Attributes:
        lengths: frames of each whole clip, in the list's order.
        sizes, actions, labels, latents: how many clips (actions: frames) there are of each kind.
        held: of vectors: how many frames there are of each set of components that are not 0.
        fps: frames a second of each whole clip that says so.
        in_order: videos that are read in order, because seeking fails or shows other frames.
        broken: one line for each broken clip.
        digests: of each whole clip's content, for comparing lists.
    """

    path: str
    clips: int
    lengths: list[int]
    sizes: Counter[str]
    actions: Counter[int]
    held: Counter[tuple[int, ...]]
    labels: Counter[int]
    latents: Counter[str]
    fps: list[float]
    in_order: list[str]
    broken: list[str]
    digests: list[str]

    @property
    def content_hash(self) -> str:
        """SHA-256 over the clips' own hashes in ascending order.

        A clip's hash is that of its video file (of its latent file where there is no video), its
        actions and its label. So neither names nor the order of the list matter, nor latents that
        were made from a video.
        """
        return hashlib.sha256("".join(sorted(self.digests)).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        shortest, middle, longest = self.length_range
        return {
            "path": self.path,
            "clips": self.clips,
            "frames": {
                "total": sum(self.lengths),
                "min": shortest,
                "median": middle,
                "max": longest,
            },
            **{
                key: dict(sorted(getattr(self, key).items()))
                for key in ("sizes", "actions", "labels", "latents")
            },
            "held": [{"components": of, "frames": n} for of, n in sorted(self.held.items())],
            "fps": dict(sorted(Counter(map(str, self.fps)).items())),
            "in_order": self.in_order,
            "broken": self.broken,
            "content_hash": self.content_hash,
        }

    @property
    def length_range(self) -> tuple[int, int, int]:
        """Frames of the shortest, the middle and the longest clip."""
        lengths = self.lengths or [0]
        return min(lengths), median_low(lengths), max(lengths)


def survey_list(checks: VideoChecks, list_path: Path, demands: Demands) -> Survey:
    """Read everything that a list names; broken clips are reported, not raised.

    Args:
        checks: of the videos below the data root; those that lack one are checked.

    Raises:
        ScdError: the list itself cannot be read.
    """
    entries = read_list(list_path)

    def look(numbered: tuple[int, ClipEntry]) -> ClipReport:
        number, entry = numbered
        try:
            return _look(checks, f"{list_path}: entry {number}", entry, demands)
        except ScdError as error:
            return ClipReport(problem=str(error))

    with ThreadPoolExecutor() as pool:
        found = pool.map(look, enumerate(entries))
        reports = list(
            tqdm(found, total=len(entries), desc=list_path.name, unit="clip", dynamic_ncols=True)
        )
    whole = [report for report in reports if report.problem is None]
    return Survey(
        path=str(list_path),
        clips=len(entries),
        lengths=[report.frames for report in whole],
        sizes=Counter(report.size for report in whole if report.size is not None),
        actions=sum((report.actions for report in whole), Counter()),
        held=sum((report.held for report in whole), Counter()),
        labels=Counter(report.label for report in whole if report.label is not None),
        latents=Counter(report.latents for report in whole if report.latents is not None),
        fps=[report.fps for report in whole if report.fps is not None],
        in_order=checks.in_order(dict.fromkeys(str(entry.video_path) for entry in entries)),
        broken=[report.problem for report in reports if report.problem is not None],
        digests=[report.digest for report in whole],
    )


def _look(checks: VideoChecks, where: str, entry: ClipEntry, demands: Demands) -> ClipReport:
    """Read one clip.

    Raises:
        ScdError: whatever is wrong with it.
    """
    root = checks.root
    for name in demands.needed:
        if getattr(entry, name) is None:
            raise ScdError(f"{where} has no {name.replace('actions_in', 'action_path')}")
    report = ClipReport(label=entry.label)
    hash_ = hashlib.sha256()
    if entry.video_path is not None:
        video = checks.open(entry.video_path)
        report.frames, size = len(video), _frame_size(video)
        report.fps = checks.fps(entry.video_path)
        report.size = f"{size[0]}x{size[1]}"
        if demands.frame_size not in (None, size):
            wanted = "x".join(map(str, demands.frame_size or ()))
            raise ScdError(
                f"{root / entry.video_path}: frames of {report.size} pixels, but the options want "
                f"{wanted} (data.frame_size, data.resize_shorter)"
            )
        hash_.update(sha256(root / entry.video_path).encode())
    if entry.latent_path is not None:
        path = root / entry.latent_path
        frames, report.latents = _read_latents(path, demands)
        if entry.video_path is None:
            report.frames = frames
            hash_.update(sha256(path).encode())
        elif frames != report.frames:
            raise ScdError(f"{path}: {frames} latents for {report.frames} frames")
        elif told := of_another_video(latent_header(path), path, root / entry.video_path):
            raise ScdError(told)
    if entry.actions_in is not None and (
        entry.action_path is not None or "actions_in" in demands.needed
    ):
        path = root / entry.actions_in
        actions = read_actions(path)
        condition = demands.condition if "actions_in" in demands.needed else None
        check_actions(path, actions, report.frames, condition, demands.num_conditions)
        of_frames = actions[: report.frames]
        if actions.ndim == 1:
            report.actions = Counter(of_frames.tolist())
        else:
            report.held = Counter(tuple(np.flatnonzero(row).tolist()) for row in of_frames)
        hash_.update(actions.tobytes())
    if demands.condition == "label" and not 0 <= int(entry.label or 0) < demands.num_conditions:
        raise ScdError(
            f"{where} has label {entry.label}, but the model knows 0 to "
            f"{demands.num_conditions - 1}"
        )
    hash_.update(f"label {entry.label}".encode())
    report.digest = hash_.hexdigest()
    return report


def _frame_size(video: Video) -> tuple[int, int]:
    """Decode every frame; (H, W)."""
    size = (0, 0)
    for frames in video.chunks(CHUNK_FRAMES):
        size = (frames.shape[1], frames.shape[2])
    return size


def _read_latents(path: Path, demands: Demands) -> tuple[int, str]:
    """Number of latents, and what they are in words."""
    latents = read_latents(path)
    frames, *shape = latents.shape
    header = latent_header(path)
    made_by = None if header is None else header.made_by
    if demands.latent_shape is not None and tuple(shape) != demands.latent_shape:
        found, wanted = ("x".join(map(str, s)) for s in (shape, demands.latent_shape))
        raise ScdError(f"{path}: latents of {found}, but the options make {wanted}")
    if demands.made_by is not None and made_by not in (None, demands.made_by):
        raise ScdError(
            f"{path}: made by {made_by}, not by the options' autoencoder: run scd encode"
        )
    told = "x".join(map(str, shape))
    return frames, f"{told} by {made_by[:12] if made_by else 'an unknown autoencoder'}"
