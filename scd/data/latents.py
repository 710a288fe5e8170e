"""Latent files: the unscaled output of an autoencoder's encoder, (frames, C, h, w).

Files written here are safetensors with the key `latents`. The `.pt` files of published data sets
are read too, but only as plain tensors.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scd.data.video_checks import identity_of
from scd.errors import ScdError, reason
from scd.utils.files import write_atomically
from scd.utils.paths import why_missing
from scd.utils.tensor_files import is_plain, read_pt

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SAFE_FLOATS = ("F16", "BF16", "F32", "F64")  # safetensors' names for them


class LatentSpec(NamedTuple):
    """Encoder (see `scd.training.encode.encoding_name`) and shape (C, h, w) of latents."""

    made_by: str
    shape: tuple[int, int, int]
    frames_per_latent: int = 1  # of the video; its first frame is a latent by itself


class LatentFile:
    """A file of latents (F, C, h, w) that reads only the frames that are needed.

    A `.pt` file of a published data set has to be read as a whole.

    Raises:
        ScdError: the file is missing, damaged or of another shape.
    """

    def __init__(self, path: Path):
        self.path = path
        self._whole: Tensor | None = None
        self._part: Any = None
        if not path.is_file():
            raise ScdError(f"{path}: {why_missing(path, 'latent file')}")
        if path.suffix == ".pt":
            latents = read_pt(path)
            plain = is_plain(latents) and latents.dtype in FLOATS
            self._whole = latents.detach() if plain else None
            self.shape = tuple(latents.shape) if plain else ()
        else:
            with self._one_clear_error():
                self._part = safe_open(str(path), framework="pt").get_slice("latents")
                floats = self._part.get_dtype() in SAFE_FLOATS
                self.shape = tuple(self._part.get_shape()) if floats else ()
        if len(self.shape) != 4 or 0 in self.shape:
            raise ScdError(f"{path}: expected one floating-point tensor (frames, C, h, w)")

    def __len__(self) -> int:
        return self.shape[0]

    def frames(self, indices: np.ndarray) -> Tensor:
        """Read the latents (n, C, h, w) of frames in ascending order.

        Raises:
            ScdError: they cannot be read, or are not finite.
        """
        first, last = int(indices[0]), int(indices[-1]) + 1
        if self._whole is not None:
            latents = self._whole[first:last]
        else:
            with self._one_clear_error():
                latents = self._part[first:last]
        latents = latents[torch.from_numpy(indices - first)]  # a copy: the file may disappear
        # Minimum and maximum are NaN if any value is. `isfinite` on every value would take most of
        # the time of reading a clip.
        if not torch.isfinite(torch.stack(latents.aminmax())).all():
            raise ScdError(f"{self.path}: latents are not finite")
        return latents

    @contextmanager
    def _one_clear_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # damaged files raise many kinds
            raise ScdError(f"{self.path}: not a readable latent file ({reason(error)})") from error


def read_latents(path: Path) -> Tensor:
    """Read all (F, C, h, w) latents of a file.

    Raises:
        ScdError: the file is missing, damaged, not finite or of another shape.
    """
    file = LatentFile(path)
    return file.frames(np.arange(len(file)))


def write_latents(path: Path, latents: Tensor, made_by: str, video: str | None = None) -> None:
    """Write latents (F, C, h, w) with the name of their encoder.

    Args:
        made_by: see `scd.training.encode.encoding_name`.
        video: the identity of the encoded video (see `scd.data.video_checks.identity_of`).

    Raises:
        ScdError: they are not finite, or the file cannot be written.
    """
    if not torch.isfinite(latents).all():
        raise ScdError(f"{path}: the autoencoder made latents that are not finite; not written")
    metadata = {"autoencoder": made_by} | ({} if video is None else {"video": video})
    data = save({"latents": latents.contiguous()}, metadata)
    write_atomically(path, lambda aside: aside.write_bytes(data))


@dataclass(frozen=True)
class LatentHeader:
    """The header of a latent file: its encoder, (F, C, h, w), and the identity of its video.

    Encoder and video are None where the file does not name them.
    """

    made_by: str | None
    shape: tuple[int, ...]
    video: str | None = None


def latent_header(path: Path) -> LatentHeader | None:
    """Read the header of a latent file, without its values; None if the file cannot be read."""
    if path.suffix == ".pt":
        try:
            return LatentHeader(None, tuple(read_latents(path).shape))
        except ScdError:
            return None
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            shape = tuple(file.get_slice("latents").get_shape())
            return LatentHeader(metadata.get("autoencoder"), shape, metadata.get("video"))
    except (SafetensorError, OSError, ValueError):
        return None


def check_latents(
    paths: list[Path],
    made_by: str,
    frame_shape: tuple[int, ...],
    max_broken: int = 0,
    videos: Mapping[Path, Path] = MappingProxyType({}),
) -> dict[Path, int]:
    """Refuse latents of another autoencoder, of other videos, or of a shape that does not fit.

    Training on them would raise no error, and samples would decode to noise. Only headers are read.
    Published `.pt` files have none: of these the first one is read here, the others in training.

    Args:
        frame_shape: (C, h, w).
        max_broken: number of files that may be missing or damaged.
        videos: latent file -> its video, where known; the file must name the identity of the video.

    Returns:
        The number of frames in each file whose header was read.

    Raises:
        ScdError: naming the first file that is missing, damaged or does not fit.
    """
    own = [path for path in paths if path.suffix != ".pt"]
    published = [path for path in paths if path.suffix == ".pt"][:1]
    frames: dict[Path, int] = {}
    headers: dict[Path, LatentHeader | None] = {}
    broken = 0
    # In threads: waiting for a disk, above all a remote one, takes longer than the work.
    with ThreadPoolExecutor(16) as pool:
        for path, header in zip(
            own + published, pool.map(latent_header, own + published), strict=True
        ):
            if header is None and broken < max_broken:
                broken += 1
                continue
            frames[path] = _checked(path, header, made_by, frame_shape).shape[0]
            headers[path] = header
        with_video = [path for path in headers if path in videos]
        for problem in pool.map(
            lambda path: of_another_video(headers[path], path, videos[path], trust_mtime=True),
            with_video,
        ):
            if problem is not None:
                raise ScdError(problem)
    return frames


def of_another_video(
    header: LatentHeader | None, path: Path, video: Path, trust_mtime: bool = False
) -> str | None:
    """Return a message if latents were encoded from another video than the present one, else None.

    Latents that do not name their video, as in older files, are accepted.

    Args:
        trust_mtime: read the video only if its size is right and it is younger than the latents.
    """
    if header is None or header.video is None or not video.is_file():
        return None
    now, then = video.stat(), path.stat()
    same = header.video.startswith(f"{now.st_size}-")
    if same and not (trust_mtime and now.st_mtime < then.st_mtime):
        same = header.video == identity_of(video)
    return (
        None if same else f"{path}: latents of another video, {video} has changed: run scd encode"
    )


def _checked(
    path: Path, header: LatentHeader | None, made_by: str, frame_shape: tuple[int, ...]
) -> LatentHeader:
    if header is None:
        raise ScdError(f"{path}: missing or damaged latents: run scd encode")
    if header.made_by not in (None, made_by):
        raise ScdError(
            f"{path} was made by another autoencoder or with another data.resize_shorter than the "
            f"options have: run scd encode"
        )
    if header.shape[1:] != frame_shape:
        actual, wanted = ("x".join(map(str, shape)) for shape in (header.shape[1:], frame_shape))
        raise ScdError(
            f"{path}: latents of {actual}, but the autoencoder and data.frame_size make {wanted}"
        )
    return header
