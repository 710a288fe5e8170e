"""Training and validation clips as a map from a sample number to tensors.

A training clip is a pure function of (seed, sample number): neither the number of data workers nor
the history of the run has a say in it. Sample numbers count clips over all processes and steps.
"""

import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from scd.data.framing import Framing, as_images, framing_of
from scd.data.latents import LatentFile
from scd.data.lists import ClipEntry, read_list
from scd.data.video import Video
from scd.data.video_checks import VideoChecks, told_in_order
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
# Sub-streams of the seed; a stream never shares a number with another.
ORDER_STREAM, START_STREAM, FRAMING_STREAM, HELD_OUT_STREAM = 1, 2, 4, 5  # 3: evaluation


class ClipFolder:
    """The clips of one list file, read on demand.

    Args:
        source: `video` gives pixels in [0, 1], `latents` the unscaled latents of `latent_path`.
        condition: `action` also reads one int64 action a frame, `action_vector` a float32 vector a
            frame, `label` the clip's class.
        num_conditions: actions and labels must lie below it, vectors have as many components.
        framing: makes the frames of videos square; None: they are taken as they are.

    Raises:
        ScdError: naming the file, for anything missing, too short, broken or inconsistent.
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
        # That all clips share; where nobody else knows it, that of the first clip read.
        self.frame_shape: tuple[int, ...] | None = None
        needed = ["video_path" if source == "video" else "latent_path"]
        needed += NEEDED[condition]
        for number, entry in enumerate(self.entries):
            for name in needed:
                if getattr(entry, name) is None:
                    told = "action_path" if name == "actions_in" else name
                    raise ScdError(f"{self.list_path}: entry {number} has no {told}")

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def unchecked(self) -> int:
        """Entries of whose video it is not known yet how it can be read."""
        if self.source != "video":
            return 0
        videos = (str(entry.video_path) for entry in self.entries)
        return sum(not video.endswith(".npz") and video not in self.checks for video in videos)

    @property
    def has_actions(self) -> bool:
        """Whether clips are read with the actions of their frames."""
        return "actions_in" in NEEDED[self.condition]

    def length(self, number: int) -> int:
        """Frames of an entry's video or latents."""
        return self._open(self.entries[number])[1]

    def read(
        self,
        number: int,
        frames: int,
        stride: int = 1,
        rng: np.random.Generator | None = None,
        framing_rng: np.random.Generator | None = None,
    ) -> dict[str, Tensor]:
        """One clip: `video` (F, 3, H, W) in [0, 1] or `latents` (F, C, h, w), `actions` (F,) or
        (F, V), or `label` ().

        The clip starts at the first frame, or where `rng` says; its frames are the centre of the
        video's, or what `framing_rng` says.
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
        """The same with `video` in uint8, as it was decoded: a quarter of the memory to move."""
        entry = self.entries[number]
        span = (frames - 1) * stride + 1
        opened, length, path = self._open(entry)
        if length < span:
            raise ScdError(f"{path}: {length} frames, but the clip needs {span}")
        start = 0 if rng is None else int(rng.integers(length - span + 1))
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
    """`video` in uint8 -> float32 in [0, 1]; all else as it is."""
    video = batch.get("video")
    if video is None or video.dtype != torch.uint8:
        return batch
    return {**batch, "video": video.float() / 255}


def clip_folder(options: Options, list_file: str, source: str) -> ClipFolder:
    m = options.model
    root, framing = Path(options.data.root), framing_of(options.data)
    folder = ClipFolder(root, list_file, source, m.condition, m.num_conditions, framing)
    if folder.unchecked and processes().is_main_process:
        print(
            f"{folder.list_path}: {folder.unchecked} of {len(folder)} videos are not checked "
            f"yet: each will be, by decoding it whole, when it is first read; scd validate does it "
            f"once for all",
            file=sys.stderr,
        )
    if source == "video" and processes().is_main_process:
        slow = folder.checks.in_order(str(entry.video_path) for entry in folder.entries)
        if slow:
            print(told_in_order(folder.list_path, root, slow), file=sys.stderr)
    return folder


def read_actions(path: Path) -> np.ndarray:
    """The actions of a clip, one a frame: key `actions` of an npz file.

    Returns:
        (n,) int64, one of several actions; or (n, V) float32, vectors of numbers or booleans: keys
        that are held, how far a mouse has moved.
    """
    actions = read_npz(path, "actions", MAX_ACTION_BYTES)
    if actions.ndim == 1 and actions.dtype.kind in "iu" and actions.size:
        return actions.astype(np.int64)
    if actions.ndim == 2 and actions.dtype.kind in "biuf" and actions.size:
        with np.errstate(over="ignore"):  # it becomes infinite, and is refused
            return actions.astype(np.float32)
    raise ScdError(
        f"{path}: actions must be integers, one a frame, or numbers, a row a frame, not "
        f"{actions.dtype} {actions.shape}"
    )


def check_actions(
    path: Path, actions: np.ndarray, frames: int, condition: str | None, num_conditions: int
) -> None:
    """Refuse actions that are too few for a clip's frames, or that a model does not know.

    Args:
        actions: see `read_actions`.
        condition, num_conditions: of the model; None: of any model.
    """
    if len(actions) < frames:
        raise ScdError(f"{path}: {len(actions)} actions for {frames} frames")
    kind = "action" if actions.ndim == 1 else "action_vector"
    if condition is not None and condition != kind:
        kinds = {"action": "integers", "action_vector": f"vectors of {num_conditions} numbers"}
        raise ScdError(
            f"{path}: actions must be {kinds[condition]}, one a frame, for model.condition="
            f"{condition}; of shape {actions.shape} they are for {kind}"
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


class TrainingClips(Dataset):
    """Random clips: every epoch visits each entry once in a new order, at a new start frame.

    Where videos are cropped or mirrored, that is drawn anew too. `video` is in uint8: it becomes
    floats on the device (`with_float_pixels`).

    Args:
        max_broken: 0: a clip that cannot be read is an error. Above: the next one of the epoch's
            order that can be read stands in for it, and `broken` (max_broken,) tells the numbers of
            those passed over, padded with -1. So a sample depends on the files alone, not on what
            else was found broken; the whole number is for the caller to count
            (`scd.training.faults`).
    """

    def __init__(
        self, folder: ClipFolder, frames: int, stride: int, seed: int, max_broken: int = 0
    ):
        self.folder = folder
        self.frames = frames
        self.stride = stride
        self.seed = seed
        self.max_broken = max_broken
        self._epoch: tuple[int, np.ndarray] | None = None

    def number(self, sample: int) -> int:
        """Which of the folder's entries a sample is cut from."""
        epoch, position = divmod(sample, len(self.folder))
        return int(self._order(epoch)[position])

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        epoch, position = divmod(sample, len(self.folder))
        order = self._order(epoch)
        broken: dict[int, str] = {}
        for following in range(min(self.max_broken + 1, len(self.folder))):
            number = int(order[(position + following) % len(self.folder)])
            try:
                clip = {"sample": torch.tensor(sample), **self._read(sample, number)}
            except ScdError as error:
                if not self.max_broken:
                    raise
                broken[number] = str(error)
                continue
            if self.max_broken:
                clip["broken"] = torch.tensor([*broken, *[-1] * (self.max_broken - len(broken))])
            return clip
        raise too_many_broken(broken.values(), self.max_broken)

    def problem(self, sample: int, number: int) -> str:
        """Why an entry was passed over for a sample, found by reading it once more."""
        try:
            self._read(sample, number)
        except ScdError as error:
            return str(error)
        return f"{self.folder.list_path}: entry {number} could not be read for a while"

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, ORDER_STREAM, epoch])
            self._epoch = epoch, order.permutation(len(self.folder))
        return self._epoch[1]

    def _read(self, sample: int, number: int) -> dict[str, Tensor]:
        start, framing = (
            np.random.default_rng([self.seed, stream, sample])
            for stream in (START_STREAM, FRAMING_STREAM)
        )
        return self.folder.read_bytes(number, self.frames, self.stride, start, framing)


def too_many_broken(problems: Collection[str], limit: int) -> ScdError:
    return ScdError(
        f"{len(problems)} broken clips, but data.max_broken_clips is {limit}: {'; '.join(problems)}"
    )


class StepSampler(Sampler[list[int]]):
    """The sample numbers of one process from a given micro-step on.

    Micro-step m uses samples m·W·B … (m+1)·W·B − 1 for W processes of B clips, so W processes of B
    clips see together what one process of W·B clips sees.
    """

    def __init__(self, batch_size: int, rank: int, world_size: int, first: int, last: int):
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.micro_steps = range(first, last)

    def __len__(self) -> int:
        return len(self.micro_steps)

    def __iter__(self) -> Iterator[list[int]]:
        for micro_step in self.micro_steps:
            start = (micro_step * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))
