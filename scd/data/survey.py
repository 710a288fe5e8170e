"""Survey a list: read every clip to its last frame, count its contents, name broken clips."""

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
from scd.data.framing import Framing
from scd.data.latents import LatentSpec, latent_header, of_another_video, read_latents
from scd.data.lists import ClipEntry, read_list
from scd.data.video import Video
from scd.data.video_checks import VideoChecks
from scd.errors import ScdError
from scd.utils.files import sha256

CHUNK_FRAMES = 64  # decoded at once, which bounds the memory for long videos

MISSING_FIELD = {  # of a list entry: what its absence means, and what to do
    "latent_path": "has no latent_path: its video is not encoded yet (./scripts/encode.sh FILE)",
    "actions_in": "has no action_path: model.condition needs actions; without: "
    "model.condition=none model.num_conditions=0",
}


@dataclass(frozen=True)
class Requirements:
    """Requirements of an experiment on the clips of a list; by default, none.

    Attributes:
        fields: fields of `ClipEntry` that every entry must have.
        condition, num_conditions: `model.condition` and `model.num_conditions`; None: any.
        framing: that the frames must fit; None: frames of any size.
        latents: encoder and shape of the latents; None: any.
        frames_per_latent: see `LatentSpec`; None: any.
    """

    fields: tuple[str, ...] = ()
    condition: str | None = None
    num_conditions: int = 0
    framing: Framing | None = None
    latents: LatentSpec | None = None
    frames_per_latent: int | None = None


@dataclass
class ClipReport:
    """The contents of one clip; `problem` is None for one without faults."""

    problem: str | None = None
    frames: int = 0
    latent_frames: int = 0
    size: str | None = None
    fps: float | None = None
    actions: Counter[int] = field(default_factory=Counter)
    held: Counter[tuple[int, ...]] = field(default_factory=Counter)
    label: int | None = None
    latents: str | None = None
    digest: str = ""
    video: str = ""


@dataclass
class Survey:
    """The contents of a list. A whole clip is one that is not broken.

    Attributes:
        lengths: frames of each whole clip, in the order of the list.
        latent_lengths: the same in latent frames, of clips with latents.
        sizes, labels, latents: number of clips of each kind.
        actions: number of frames of each action.
        held: for action vectors, number of frames of each set of components that are not 0.
        fps: frames per second of each whole clip that has time stamps.
        in_order: videos that are read in order, because seeking fails or yields other frames.
        broken: one line for each broken clip.
        digests: a hash of the content of each whole clip, for comparing lists.
        videos: a hash of the video of each whole clip alone, or of its latents without one.
    """

    path: str
    clips: int
    lengths: list[int]
    latent_lengths: list[int]
    sizes: Counter[str]
    actions: Counter[int]
    held: Counter[tuple[int, ...]]
    labels: Counter[int]
    latents: Counter[str]
    fps: list[float]
    in_order: list[str]
    broken: list[str]
    digests: list[str]
    videos: list[str]

    @property
    def content_hash(self) -> str:
        """Hash the sorted hashes of all clips with SHA-256.

        The hash of a clip covers its video file (its latent file if there is no video), its
        actions, its label and its caption. So it depends neither on names, nor on the order of the
        list, nor on latents that were encoded from a video.
        """
        return hashlib.sha256("".join(sorted(self.digests)).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values for a JSON file."""
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
        """Return the lengths of the shortest, the median and the longest clip, in frames."""
        lengths = self.lengths or [0]
        return min(lengths), median_low(lengths), max(lengths)


def survey_list(checks: VideoChecks, list_path: Path, required: Requirements) -> Survey:
    """Read every clip of a list; broken ones are reported, not raised.

    Args:
        checks: the checks of the videos below the data root; missing ones are made.

    Raises:
        ScdError: the list itself cannot be read.
    """
    entries = read_list(list_path)

    def report(numbered: tuple[int, ClipEntry]) -> ClipReport:
        number, entry = numbered
        try:
            return _read_clip(checks, f"{list_path}: entry {number}", entry, required)
        except ScdError as error:
            return ClipReport(problem=str(error))

    with ThreadPoolExecutor() as pool:
        read = pool.map(report, enumerate(entries))
        bar = tqdm(read, total=len(entries), desc=list_path.name, unit="clip", dynamic_ncols=True)
        reports = list(bar)
    whole = [report for report in reports if report.problem is None]
    return Survey(
        path=str(list_path),
        clips=len(entries),
        lengths=[report.frames for report in whole],
        latent_lengths=[report.latent_frames for report in whole if report.latent_frames],
        sizes=Counter(report.size for report in whole if report.size is not None),
        actions=sum((report.actions for report in whole), Counter()),
        held=sum((report.held for report in whole), Counter()),
        labels=Counter(report.label for report in whole if report.label is not None),
        latents=Counter(report.latents for report in whole if report.latents is not None),
        fps=[report.fps for report in whole if report.fps is not None],
        in_order=checks.in_order(dict.fromkeys(str(entry.video_path) for entry in entries)),
        broken=[report.problem for report in reports if report.problem is not None],
        digests=[report.digest for report in whole],
        videos=[report.video for report in whole],
    )


def _read_clip(
    checks: VideoChecks, where: str, entry: ClipEntry, required: Requirements
) -> ClipReport:
    """Read one clip from first to last frame.

    Raises:
        ScdError: naming the file and what is wrong.
    """
    root = checks.root
    _refuse_missing(where, entry, required)
    report = ClipReport(label=entry.label)
    hash_ = hashlib.sha256()
    if entry.video_path is not None:
        video = checks.open(entry.video_path)
        report.frames, size = len(video), _frame_size(video)
        report.fps = checks.fps(entry.video_path)
        report.size = f"{size[0]}x{size[1]}"
        if required.framing is not None:
            required.framing.room(size, root / entry.video_path)
        hash_.update(sha256(root / entry.video_path).encode())
    if entry.latent_path is not None:
        path = root / entry.latent_path
        frames, report.latents = _read_latents(path, required.latents)
        report.latent_frames = frames
        if entry.video_path is None:
            report.frames = frames
            hash_.update(sha256(path).encode())
        elif not _latents_fit(frames, report.frames, required.frames_per_latent):
            raise ScdError(f"{path}: {frames} latents for {report.frames} frames")
        elif problem := of_another_video(latent_header(path), path, root / entry.video_path):
            raise ScdError(problem)
    report.video = hash_.hexdigest()
    if entry.actions_in is not None and (
        entry.action_path is not None or "actions_in" in required.fields
    ):
        hash_.update(_count_actions(report, root / entry.actions_in, required).tobytes())
    if required.condition == "label" and not 0 <= int(entry.label or 0) < required.num_conditions:
        raise ScdError(
            f"{where} has label {entry.label}, but the model knows 0 to "
            f"{required.num_conditions - 1}"
        )
    hash_.update(f"label {entry.label}".encode())
    if entry.caption is not None:
        hash_.update(f"caption {entry.caption}".encode())
    report.digest = hash_.hexdigest()
    return report


def _refuse_missing(where: str, entry: ClipEntry, required: Requirements) -> None:
    for name in required.fields:
        if getattr(entry, name) is None:
            what = MISSING_FIELD.get(name, f"has no {name}")
            # For a Wan, data.source=video is refused.
            if name == "latent_path" and "caption" not in required.fields:
                what += "; to check videos alone: data.source=video"
            raise ScdError(f"{where} {what}")


def _count_actions(report: ClipReport, path: Path, required: Requirements) -> np.ndarray:
    """Read the actions of a clip's frames, and count them in its report."""
    actions = read_actions(path)
    condition = required.condition if "actions_in" in required.fields else None
    check_actions(path, actions, report.frames, condition, required.num_conditions)
    used = actions[: report.frames]
    if actions.ndim == 1:
        report.actions = Counter(used.tolist())
    else:
        report.held = Counter(tuple(np.flatnonzero(row).tolist()) for row in used)
    return actions


def _latents_fit(latents: int, frames: int, frames_per_latent: int | None) -> bool:
    if frames_per_latent is None:  # the first latent is of one frame, each other of some
        return 1 <= latents <= frames
    return latents == 1 + (frames - 1) // frames_per_latent


def _frame_size(video: Video) -> tuple[int, int]:
    """Decode every frame, and return (H, W)."""
    size = (0, 0)
    for frames in video.chunks(CHUNK_FRAMES):
        size = (frames.shape[1], frames.shape[2])
    return size


def _read_latents(path: Path, required: LatentSpec | None) -> tuple[int, str]:
    """Read all latents of a file; return the number of frames, and shape and encoder as text."""
    latents = read_latents(path)
    frames, *shape = latents.shape
    header = latent_header(path)
    made_by = None if header is None else header.made_by
    size = "x".join(map(str, shape))
    if required is not None and tuple(shape) != required.shape:
        wanted = "x".join(map(str, required.shape))
        raise ScdError(f"{path}: latents of {size}, but the options make {wanted}")
    if required is not None and made_by not in (None, required.made_by):
        raise ScdError(
            f"{path}: made by {made_by}, not by the options' autoencoder: run scd encode"
        )
    return frames, f"{size} by {made_by[:12] if made_by else 'an unknown autoencoder'}"
