"""Clips of a list file as tensors: frames or latents, with actions or a class label."""

import sys
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from scd.data.framing import Framing, as_images, framing_of
from scd.data.latents import LatentFile
from scd.data.lists import ClipEntry, read_list
from scd.data.video import Video
from scd.data.video_checks import VideoChecks, slow_reading_note
from scd.errors import ScdError
from scd.options import Options
from scd.utils.files import read_npz
from scd.utils.processes import processes

MAX_ACTION_BYTES = 2**26  # of one clip: days of video
# What an entry of a list must have for each `model.condition`.
NEEDED: dict[str, tuple[str, ...]] = {
    "none": (),
    "action": ("actions_in",),
    "action_vector": ("actions_in",),
    "label": ("label",),
}


class Clips(Protocol):
    """Clips that are read on demand by their number; see `ClipFolder`."""

    list_path: Path

    def __len__(self) -> int: ...

    def name(self, number: int) -> str | None: ...

    def read_bytes(
        self,
        number: int,
        frames: int,
        stride: int = 1,
        rng: np.random.Generator | None = None,
        framing_rng: np.random.Generator | None = None,
    ) -> dict[str, Tensor]: ...


class ClipFolder:
    """The clips of one list file, read on demand.

    Args:
        source: `video` reads pixels in [0, 1], `latents` the unscaled latents of `latent_path`.
        condition: `action` also reads one int64 action per frame, `action_vector` one float32
            vector per frame, `label` the class of the clip.
        num_conditions: actions and labels must be below it; vectors have this many components.
        framing: crops the frames of videos to squares; None: frames are used as they are.

    Raises:
        ScdError: a file is missing, too short, broken or inconsistent; the message names it.
    """

    def __init__(
        self,
        root: Path,
        list_file: str,
        source: str,
        condition: str = "none",
        num_conditions: int = 0,
        framing: Framing | None = None,
    ):
        self.root = root
        self.list_path = root / list_file
        self.entries = read_list(self.list_path)
        self.source = source
        self.condition = condition
        self.num_conditions = num_conditions
        self.framing = framing
        self.checks = VideoChecks(root)
        # Shared by all clips. Unless a caller sets it, the first clip that is read decides.
        self.frame_shape: tuple[int, ...] | None = None
        needed = ["video_path" if source == "video" else "latent_path"]
        needed += NEEDED[condition]
        for number, entry in enumerate(self.entries):
            for name in needed:
                if getattr(entry, name) is None:
                    field = "action_path" if name == "actions_in" else name
                    how = ": make latents with `scd encode`" if name == "latent_path" else ""
                    raise ScdError(f"{self.list_path}: entry {number} has no {field}{how}")

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, number: int) -> str | None:
        """Name the file that a clip is read from."""
        entry = self.entries[number]
        return entry.video_path if self.source == "video" else entry.latent_path

    @property
    def unchecked(self) -> int:
        """Number of entries whose video has no entry in `video_checks.json` yet."""
        if self.source != "video":
            return 0
        videos = (str(entry.video_path) for entry in self.entries)
        return sum(
            not video.lower().endswith(".npz") and video not in self.checks for video in videos
        )

    @property
    def has_actions(self) -> bool:
        """Whether clips are read with the actions of their frames."""
        return "actions_in" in NEEDED[self.condition]

    def length(self, number: int) -> int:
        """Count the frames of an entry's video or latents."""
        return self._open(self.entries[number])[1]

    def read(
        self,
        number: int,
        frames: int,
        stride: int = 1,
        rng: np.random.Generator | None = None,
        framing_rng: np.random.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Read a clip: `video` or `latents`, and `actions` or `label` if the model needs them.

        Args:
            rng: draws the first frame of the clip; None: the first frame of the video.
            framing_rng: draws the crop and the mirroring; None: the center, not mirrored.

        Returns:
            `video` (F, 3, H, W) in [0, 1] or `latents` (F, C, h, w); `actions` (F,) or (F, V);
            `label` ().
        """
        return with_float_pixels(self.read_bytes(number, frames, stride, rng, framing_rng))

    def read_bytes(
        self,
        number: int,
        frames: int,
        stride: int = 1,
        rng: np.random.Generator | None = None,
        framing_rng: np.random.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Read a clip as `read` does, but with `video` in uint8: a quarter of the memory."""
        entry = self.entries[number]
        span = (frames - 1) * stride + 1
        opened, length, path = self._open(entry)
        if length < span:
            raise ScdError(f"{path}: {length} frames, but the clip needs {span}")
        start = self.first_frame(length - span, rng)
        indices = np.arange(start, start + span, stride)
        if isinstance(opened, LatentFile):
            key, values = "latents", opened.frames(indices).float()
        else:
            video = as_images(opened.frames(indices))
            if self.framing is not None:
                video = self.framing(video, path, framing_rng)
            key, values = "video", video
        self.frame_shape = self.frame_shape or tuple(values.shape[1:])
        if values.shape[1:] != self.frame_shape:
            shape, others = ("x".join(map(str, s)) for s in (values.shape[1:], self.frame_shape))
            raise ScdError(f"{path}: frames are {shape}, but those of other clips {others}")
        clip = {key: values}
        if self.has_actions:
            clip["actions"] = self._actions(entry, length)[torch.from_numpy(indices)]
        elif self.condition == "label":
            clip["label"] = torch.tensor(self._checked_label(number))
        return clip

    def first_frame(self, last: int, rng: np.random.Generator | None) -> int:
        """Choose the first frame of a clip, which is at most `last`."""
        return 0 if rng is None else int(rng.integers(last + 1))

    def _open(self, entry: ClipEntry) -> tuple[Video | LatentFile, int, Path]:
        opened: Video | LatentFile
        if self.source == "video":
            opened = self.checks.open(str(entry.video_path))
        else:
            opened = LatentFile(self.root / str(entry.latent_path))
        return opened, len(opened), opened.path

    def _actions(self, entry: ClipEntry, length: int) -> Tensor:
        path = self.root / str(entry.actions_in)
        actions = read_actions(path)
        check_actions(path, actions, length, self.condition, self.num_conditions)
        return torch.from_numpy(actions)

    def _checked_label(self, number: int) -> int:
        label = self.entries[number].label
        assert label is not None
        if not 0 <= label < self.num_conditions:
            raise ScdError(
                f"{self.list_path}: entry {number} has label {label}, but the model knows 0 to "
                f"{self.num_conditions - 1}"
            )
        return label


def with_float_pixels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert `video` from uint8 to float32 in [0, 1]; everything else stays as it is."""
    video = batch.get("video")
    if video is None or video.dtype != torch.uint8:
        return batch
    return {**batch, "video": video.float() / 255}


def clip_folder(options: Options, list_file: str, source: str) -> ClipFolder:
    """Open a list file of an experiment, and print a note if its videos are slow to read."""
    m = options.model
    root, framing = Path(options.data.root), framing_of(options.data)
    folder = ClipFolder(root, list_file, source, m.condition, m.num_conditions, framing)
    if folder.unchecked and processes().is_main_process:
        print(
            f"{folder.list_path}: {folder.unchecked} of {len(folder)} videos are not checked yet. "
            f"Each is decoded once in full when it is first read; scd validate checks them all",
            file=sys.stderr,
        )
    if source == "video" and processes().is_main_process:
        slow = folder.checks.in_order(str(entry.video_path) for entry in folder.entries)
        if slow:
            print(slow_reading_note(folder.list_path, root, slow), file=sys.stderr)
    return folder


def read_actions(path: Path) -> np.ndarray:
    """Read the actions of a clip, one per frame, from the key `actions` of an npz file.

    Returns:
        (n,) int64: the number of the action; or (n, V) float32: vectors of numbers or booleans,
        such as held keys or the movement of a mouse.

    Raises:
        ScdError: the file is missing or damaged, or `actions` has another type or shape.
    """
    actions = read_npz(path, "actions", MAX_ACTION_BYTES)
    if actions.ndim == 1 and actions.dtype.kind in "iu" and actions.size:
        return actions.astype(np.int64)
    if actions.ndim == 2 and actions.dtype.kind in "biuf" and actions.size:
        with np.errstate(over="ignore"):  # an overflow becomes infinite and is refused later
            return actions.astype(np.float32)
    raise ScdError(
        f"{path}: actions must be integers, one per frame, or numbers, one row per frame, not "
        f"{actions.dtype} {actions.shape}"
    )


def check_actions(
    path: Path, actions: np.ndarray, frames: int, condition: str | None, num_conditions: int
) -> None:
    """Refuse actions that are fewer than the frames of a clip, or unknown to a model.

    Args:
        actions: see `read_actions`.
        condition, num_conditions: those of the model; `condition` None admits any kind.

    Raises:
        ScdError: naming the file and what is wrong.
    """
    if len(actions) < frames:
        raise ScdError(f"{path}: {len(actions)} actions for {frames} frames")
    kind = "action" if actions.ndim == 1 else "action_vector"
    if condition is not None and condition != kind:
        kinds = {"action": "integers", "action_vector": f"vectors of {num_conditions} numbers"}
        raise ScdError(
            f"{path}: model.condition={condition} needs {kinds[condition]}, one per frame; "
            f"actions of shape {actions.shape} are for {kind}"
        )
    if kind == "action_vector":
        if not np.isfinite(actions).all():
            raise ScdError(f"{path}: actions are not all finite")
        if condition is not None and actions.shape[1] != num_conditions:
            raise ScdError(
                f"{path}: actions have {actions.shape[1]} components, but the model knows "
                f"{num_conditions} (model.num_conditions)"
            )
        return
    most = np.iinfo(np.int64).max if condition is None else num_conditions - 1
    if actions.min() < 0 or actions.max() > most:
        raise ScdError(
            f"{path}: actions {actions.min()} to {actions.max()}, but the model knows 0 to {most}"
        )
