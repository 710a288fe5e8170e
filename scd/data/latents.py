"""Latent files: the unscaled output of an autoencoder's encoder, (frames, C, h, w).

Own files are safetensors with the key `latents`; the `.pt` tensors of published data sets are read
too, as plain tensors only.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

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
SAFE_FLOATS = ("F16", "BF16", "F32", "F64")  # the same, as safetensors names them


class LatentFile:
    """A file of latents (F, C, h, w), of which only those frames are read that are wanted.

    The `.pt` files of published data sets can be read whole alone.

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
            with self._told():
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
            with self._told():
                latents = self._part[first:last]
        latents = latents[torch.from_numpy(indices - first)]  # a copy: the file may go
        # NaN is passed on. `isfinite` of all of them would take most of the time of reading a clip.
        if not torch.isfinite(torch.stack(latents.aminmax())).all():
            raise ScdError(f"{self.path}: latents are not finite")
        return latents

    @contextmanager
    def _told(self) -> Iterator[None]:
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
    """Write (F, C, h, w) latents with what made them (see `scd.training.encode.encoding_name`).

    Args:
        video: the identity of what they were made of (see `scd.data.video_checks.identity_of`).

    Raises:
        ScdError: they are not finite, or the file cannot be written.
    """
    if not torch.isfinite(latents).all():
        raise ScdError(f"{path}: the autoencoder gives latents that are not finite; not written")
    of_video = {} if video is None else {"video": video}
    data = save({"latents": latents.contiguous()}, {"autoencoder": made_by, **of_video})
    write_atomically(path, lambda aside: aside.write_bytes(data))


@dataclass(frozen=True)
class LatentHeader:
    """What a latent file says of itself: `made_by`, (F, C, h, w), and the identity of its video.

    None: it does not say.
    """

    made_by: str | None
    shape: tuple[int, ...]
    video: str | None = None


def latent_header(path: Path) -> LatentHeader | None:
    """A latent file's header, without its values; None if there is no readable file."""
    if path.suffix == ".pt":
        try:
            return LatentHeader(None, tuple(read_latents(path).shape))
        except ScdError:
            return None
    try:
        with safe_open(str(path), framework="pt") as file:
            said = file.metadata() or {}
            shape = tuple(file.get_slice("latents").get_shape())
            return LatentHeader(said.get("autoencoder"), shape, said.get("video"))
    except (SafetensorError, OSError, ValueError):
        return None


def check_latents(
    paths: list[Path],
    made_by: str,
    frame_shape: tuple[int, ...],
    max_broken: int = 0,
    videos: Mapping[Path, Path] = MappingProxyType({}),
) -> dict[Path, int]:
    """Refuse latents that another autoencoder made, of other videos, or that do not fit a model.

    They would train without a word and decode to noise. Headers only; of published `.pt` files,
    which have none, just the first is read, and the others when their turn comes.

    Args:
        frame_shape: (C, h, w).
        max_broken: files that may be missing or damaged.
        videos: what latents are of, as far as it is there; its identity must be the one they say.

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
    # Waiting for the disk, most of all a distant one, takes longer than the work.
    with ThreadPoolExecutor(16) as pool:
        for path, header in zip(
            own + published, pool.map(latent_header, own + published), strict=True
        ):
            if header is None and broken < max_broken:
                broken += 1
                continue
            frames[path] = _checked(path, header, made_by, frame_shape).shape[0]
            headers[path] = header
        of_videos = [path for path in headers if path in videos]
        for told in pool.map(
            lambda path: of_another_video(headers[path], path, videos[path], hastily=True),
            of_videos,
        ):
            if told is not None:
                raise ScdError(told)
    return frames


def of_another_video(
    header: LatentHeader | None, path: Path, video: Path, hastily: bool = False
) -> str | None:
    """Tell that latents were made of another video than is there now; None: they were not.

    Nothing is known of latents that do not say what they were made of, as older ones.

    Args:
        hastily: read the video only if it is of the same size and younger than the latents.
    """
    if header is None or header.video is None or not video.is_file():
        return None
    now, then = video.stat(), path.stat()
    same = header.video.startswith(f"{now.st_size}-")
    if same and not (hastily and now.st_mtime < then.st_mtime):
        same = header.video == identity_of(video)
    return None if same else f"{path}: latents of another video than {video} is now: run scd encode"


def _checked(
    path: Path, header: LatentHeader | None, made_by: str, frame_shape: tuple[int, ...]
) -> LatentHeader:
    if header is None:
        raise ScdError(f"{path}: missing or damaged latents: run scd encode")
    if header.made_by not in (None, made_by):
        raise ScdError(
            f"{path} was made by another autoencoder or another data.resize_shorter than the "
            f"options': run scd encode"
        )
    if header.shape[1:] != frame_shape:
        found, wanted = ("x".join(map(str, shape)) for shape in (header.shape[1:], frame_shape))
        raise ScdError(
            f"{path}: latents of {found}, but the autoencoder and data.frame_size make {wanted}"
        )
    return header
