"""The folder between generating and measuring: saved clips, their measurements, a manifest.

    manifest.json                  the samples' identity, and the rows of the table
    real/00000.mp4                 the clips as they were recorded
    other/00000.mp4                real clips of other numbers
    autoencoded/00000.mp4          real clips, the new frames encoded and decoded
    model-seed-0/00000.mp4         context and predicted frames, one folder for each prediction
    measured/<set>/00000.safetensors      measured-bf16/: with that eval.fvd_precision

Clips are saved without loss, so that measuring them again gives the same numbers to the bit.
Everything that changes a sample is part of the identity in the manifest, and the folder's name ends
with the identity's hash: samples of different checkpoints or options are never mixed.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scd.data.clips import ClipFolder
from scd.data.lists import path_problem
from scd.data.video import READABLE_WIDTHS, UNREADABLE_WIDTHS, VideoFile, write_video
from scd.data.video_checks import identity_of
from scd.errors import ScdError
from scd.evaluation.metrics import Setting
from scd.evaluation.pictures import to_bytes
from scd.models.autoencoder import autoencoder_hash, scaling_of
from scd.options import FvdPrecision, Options, with_former_names
from scd.utils.files import read_json, sha256, write_atomically, write_json

MANIFEST = "manifest.json"
EVALUATIONS = "evaluation"  # the folder of an experiment's sample folders
FORMAT = 1
MOST = 10**6  # videos, or frames of a video: more is a damaged manifest
# Options of these sections decide what is generated; those without influence on it are left out.
_SECTIONS = ("model", "flow", "rollout", "eval")
_WITHOUT_INFLUENCE = {
    "flow": ("self_forcing_sigma",),
    "eval": ("batch_size", "saved_videos", "comparisons", "fvd_precision", "windows"),
}
SCALING = "scaling"  # in an identity: of the autoencoder's latents
FRAMING = ("frame_stride", "frame_size", "resize_shorter")  # options of data that shape the clips


def identity(checkpoint_hash: str, options: Options, data: ClipFolder) -> dict[str, Any]:
    """Collect everything that the samples of an evaluation depend on, as plain values."""
    autoencoder = options.autoencoder.path
    sections = {
        section: {
            key: value
            for key, value in asdict(getattr(options, section)).items()
            if key not in _WITHOUT_INFLUENCE.get(section, ())
        }
        for section in _SECTIONS
    }
    sections["data"] = {key: getattr(options.data, key) for key in FRAMING}
    return {
        "format": FORMAT,
        "checkpoint": checkpoint_hash,
        "autoencoder": None if autoencoder is None else autoencoder_hash(autoencoder),
        SCALING: None if autoencoder is None else scaling_of(autoencoder),
        "data": _data_hash(data, options.eval.videos),
        "options": with_former_names(sections),  # or renaming an option would orphan all samples
    }


def identity_name(identity: dict[str, Any]) -> str:
    """Shorten an identity to the first digits of its hash.

    It leaves out what older folders do not say.
    """
    named = {key: value for key, value in identity.items() if key != SCALING}
    text = json.dumps(named, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def batches(count: int, size: int) -> list[list[int]]:
    """Split the numbers below `count` into batches of `size`."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


class SampleFolder:
    """Saved clips (F, 3, H, W) in steps of 1/255 by set and number, and their measurements.

    Raises:
        ScdError: there is no readable manifest at `path`.
    """

    def __init__(self, path: Path):
        self.path = path
        if not (path / MANIFEST).is_file():
            raise ScdError(f"{path}: no folder of saved samples ({MANIFEST} is missing)")
        self.manifest = read_json(path / MANIFEST)
        try:
            if self.manifest["identity"]["format"] != FORMAT:
                raise ScdError(f"{path}: samples of another version of this project")
            self.rows: dict[str, list[str]] = self.manifest["rows"]
            self.videos: int = self.manifest["protocol"]["videos"]
            self.context_frames: int = self.manifest["protocol"]["context_frames"]
            self.frames: int = self.context_frames + self.manifest["protocol"]["new_frames"]
            self.fvd_precision: str = self.manifest["protocol"]["fvd_precision"]
            self.windows: int = self.manifest["protocol"].get("windows", 0)
            self.frame_size: int = self.manifest["identity"]["options"]["data"]["frame_size"]
            fits = all(map(_is_row, self.rows.values())) and "checkpoint" in self.manifest
        except (KeyError, TypeError, AttributeError) as error:
            raise ScdError(f"{path / MANIFEST}: not a manifest of samples ({error})") from error
        numbers = (self.videos, self.context_frames, self.frames, self.windows, self.frame_size)
        fits = fits and all(type(number) is int and 0 <= number <= MOST for number in numbers)
        fits = fits and self.fvd_precision in get_args(FvdPrecision)
        if not fits or not self.videos or not self.context_frames < self.frames:
            raise ScdError(f"{path / MANIFEST}: not a manifest of samples, or a damaged one")

    @property
    def setting(self) -> Setting:
        """The sizes that decide what can be measured."""
        new = self.frames - self.context_frames
        trajectories = max(map(len, map(set, self.rows.values())), default=1)
        return Setting(
            self.videos, self.context_frames, new, self.frame_size, self.windows, trajectories
        )

    def next_trajectory(self, set_: str) -> str | None:
        """Name the set of the same row's next seed; None after the last one."""
        for sets in self.rows.values():
            following = dict(pairwise(dict.fromkeys(sets)))
            if set_ in following:
                return following[set_]
        return None

    @property
    def clips(self) -> tuple:
        """Values that are equal for folders of the same real clips, cut in the same way."""
        made_of = self.manifest["identity"]
        data = made_of["data"], json.dumps(made_of["options"]["data"], sort_keys=True)
        return *data, self.videos, self.context_frames, self.frames

    @property
    def autoencoder(self) -> str | None:
        """Hash of the autoencoder's weights; None: pixels."""
        return self.manifest["identity"].get("autoencoder")

    @staticmethod
    def describe(
        path: Path,
        identity: dict[str, Any],
        rows: dict[str, list[str]],
        protocol: dict[str, Any],
        checkpoint: dict[str, Any],
    ) -> None:
        """Write the manifest of a new folder, or check that a folder is of the same identity.

        Raises:
            ScdError: samples of another identity lie there.
        """
        if (path / MANIFEST).exists():
            manifest = read_json(path / MANIFEST)
            found = manifest.get("identity") if isinstance(manifest, dict) else None
            if not isinstance(found, dict) or {SCALING: identity[SCALING], **found} != identity:
                raise ScdError(f"{path}: holds samples of another evaluation; move them away")
        parts = {"rows": rows, "protocol": protocol, "checkpoint": checkpoint}
        write_json(path / MANIFEST, {"identity": identity, **parts})

    def clip_path(self, set_: str, number: int) -> Path:
        return self.path / set_ / f"{number:05d}.mp4"

    def write_clip(self, set_: str, number: int, clip: Tensor) -> None:
        frames = to_bytes(clip)  # (F, H, W, 3)
        if self.frame_size in UNREADABLE_WIDTHS:
            wider = next(width for width in READABLE_WIDTHS if width > self.frame_size)
            frames = np.pad(frames, ((0, 0), (0, 0), (0, wider - self.frame_size), (0, 0)))
        # The frame rate does not matter here: the videos for people are written elsewhere.
        write_video(self.clip_path(set_, number), frames, fps=10, crf=0)

    def read_clip(self, set_: str, number: int) -> Tensor:
        """Read a saved clip, (F, 3, H, W), to the bit as it was written.

        Raises:
            ScdError: it is missing, damaged or of another length.
        """
        path = self.clip_path(set_, number)
        video = VideoFile(path)
        if len(video) != self.frames:
            raise ScdError(f"{path}: {len(video)} frames, wanted {self.frames}; remove it")
        frames = torch.from_numpy(video.frames(np.arange(self.frames)))
        if self.frame_size in UNREADABLE_WIDTHS:
            frames = frames[:, :, : self.frame_size]
        return frames.permute(0, 3, 1, 2).float() / 255

    @property
    def measured(self) -> Path:
        """The folder of measurements whose features have this precision."""
        fp32 = self.fvd_precision == "fp32"
        return self.path / ("measured" if fp32 else f"measured-{self.fvd_precision}")

    def measurement_path(self, set_: str, number: int) -> Path:
        return self.measured / set_ / f"{number:05d}.safetensors"

    def write_measurement(
        self,
        set_: str,
        number: int,
        values: dict[str, Tensor],
        weights: dict[str, str | None],
    ) -> None:
        """Save quantities of a clip beside those that are saved already.

        Args:
            values: quantity -> tensor.
            weights: quantity -> hash of the weights that it was computed with; None: none.
        """
        path = self.measurement_path(set_, number)
        try:
            kept, hashes = _read_measurement(path)
        except ScdError:  # none yet, or a damaged one
            kept, hashes = {}, {}
        kept |= values
        hashes |= {name: str(weights[name]) for name in values if weights[name] is not None}
        used = json.dumps({n: h for n, h in hashes.items() if n in kept}, sort_keys=True)
        whole = safetensors.torch.save(kept, {"weights": used})
        write_atomically(path, lambda aside: aside.write_bytes(whole))

    def measured_quantities(
        self, set_: str, number: int, weights: dict[str, str | None]
    ) -> set[str]:
        """List the saved quantities of a clip that were computed with just these weights."""
        try:
            with safe_open(str(self.measurement_path(set_, number)), framework="pt") as file:
                hashes, names = _hashes(file.metadata()), set(file.keys())
        except (SafetensorError, OSError):
            return set()
        return {n for n, hash_ in weights.items() if n in names and hash_ in (None, hashes.get(n))}

    def read_measurement(self, set_: str, number: int) -> dict[str, Tensor]:
        """Read all saved quantities of a clip.

        Raises:
            ScdError: the measurement is missing or damaged.
        """
        return _read_measurement(self.measurement_path(set_, number))[0]

    def read_measurements(self, set_: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Read quantities of all clips of a set: name -> (videos, …).

        Raises:
            ScdError: a measurement is missing or damaged.
        """
        stacked = {}
        measured = [self.read_measurement(set_, number) for number in range(self.videos)]
        for name in names:
            values = [quantities.get(name) for quantities in measured]
            for number, value in enumerate(values):
                if value is None or values[0] is None or value.shape != values[0].shape:
                    path = self.measurement_path(set_, number)
                    raise ScdError(f"{path}: {name} is missing or of another shape; remove it")
            stacked[name] = torch.stack(values)  # type: ignore[arg-type]
        return stacked


def siblings(samples: SampleFolder) -> list[SampleFolder]:
    """Find other evaluations of the same real clips, cut and measured in the same way, of this
    experiment and of those beside it."""
    others: list[SampleFolder] = []
    if samples.path.parent.name != EVALUATIONS:
        return others
    for path in sorted(samples.path.parents[2].glob(f"*/{EVALUATIONS}/*")):
        try:
            other = SampleFolder(path)
            same = path != samples.path and other.clips == samples.clips
            same = same and other.fvd_precision == samples.fvd_precision
        except (ScdError, KeyError, TypeError):  # not a folder of samples, or a damaged one
            continue
        if same:
            others.append(other)
    return others


def _is_row(sets: object) -> bool:
    """Check that these are names of folders, and of none outside."""
    return (
        isinstance(sets, list)
        and bool(sets)
        and all(
            isinstance(s, str) and path_problem(s) is None and s == Path(s).name != ".."
            for s in sets
        )
    )


def _read_measurement(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the quantities of a measurement, and the hashes of their weights."""
    try:
        with safe_open(str(path), framework="pt") as file:
            hashes = _hashes(file.metadata())
        return safetensors.torch.load_file(path), hashes
    except (SafetensorError, OSError) as error:
        raise ScdError(f"{path}: not a readable measurement ({error})") from error


def _hashes(metadata: dict[str, str] | None) -> dict[str, str]:
    """Read quantity -> hash of its weights from a measurement's metadata; {} where damaged."""
    try:
        hashes = json.loads((metadata or {}).get("weights", "{}"))
    except (ValueError, RecursionError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def _data_hash(data: ClipFolder, videos: int) -> str:
    """Hash the list's entries and the content of their files, as far as the clips need them.

    Latents are left out: evaluation reads videos, and encoding them changes nothing.
    """
    digest = hashlib.sha256()
    for entry in data.entries[: 2 * videos]:  # the clips, and as many other real ones
        files = [entry.video_path, entry.actions_in if data.has_actions else None]
        contents = [
            hash_of(data.root / file) if file is not None and (data.root / file).is_file() else None
            for file, hash_of in zip(files, (identity_of, sha256), strict=True)
        ]
        label = entry.label if data.condition == "label" else None
        digest.update(json.dumps([files, contents, label]).encode())
    digest.update(str(len(data)).encode())  # after the last entry, the first one comes again
    return digest.hexdigest()
