"""Latent files: the unscaled output of an autoencoder's encoder, (frames, C, h, w).

Own files are safetensors with the key `latents`; the `.pt` tensors of published data sets are read
too, as plain tensors only.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scd.errors import ScdError, reason
from scd.files import write_whole
from scd.tensor_files import is_plain, read_pt

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_latents(path: Path) -> Tensor:
    """Read (F, C, h, w) latents.

    Raises:
        ScdError: the file is missing, damaged, not finite or of another shape.
    """
    if not path.is_file():
        raise ScdError(f"{path}: no such latent file")
    if path.suffix == ".pt":
        latents = read_pt(path)
    else:
        try:
            with safe_open(str(path), framework="pt") as file:
                latents = file.get_tensor("latents")
        except Exception as error:  # damaged files raise many kinds
            raise ScdError(f"{path}: not a readable latent file ({reason(error)})") from error
    if (
        not is_plain(latents)
        or latents.ndim != 4
        or not latents.numel()
        or latents.dtype not in FLOATS
    ):
        raise ScdError(f"{path}: expected one floating-point tensor (frames, C, h, w)")
    if not torch.isfinite(latents).all():
        raise ScdError(f"{path}: latents are not finite")
    return latents.detach()


def write_latents(path: Path, latents: Tensor, made_by: str) -> None:
    """Write (F, C, h, w) latents with what made them (see `scd.data.encode.encoding_name`).

    Raises:
        ScdError: they are not finite, or the file cannot be written.
    """
    if not torch.isfinite(latents).all():
        raise ScdError(f"{path}: the autoencoder gives latents that are not finite; not written")
    data = save({"latents": latents.contiguous()}, {"autoencoder": made_by})
    write_whole(path, lambda aside: aside.write_bytes(data))


@dataclass(frozen=True)
class LatentHeader:
    """What a latent file says of itself: `made_by` (None: it does not say) and (F, C, h, w)."""

    made_by: str | None
    shape: tuple[int, ...]


def latent_header(path: Path) -> LatentHeader | None:
    """A latent file's header, without its values; None if there is no readable file."""
    if path.suffix == ".pt":
        try:
            return LatentHeader(None, tuple(read_latents(path).shape))
        except ScdError:
            return None
    try:
        with safe_open(str(path), framework="pt") as file:
            made_by = (file.metadata() or {}).get("autoencoder")
            return LatentHeader(made_by, tuple(file.get_slice("latents").get_shape()))
    except (SafetensorError, OSError, ValueError):
        return None


def check_latents(
    paths: list[Path], made_by: str, frame_shape: tuple[int, ...], max_broken: int = 0
) -> dict[Path, int]:
    """Refuse latents that another autoencoder made, or that do not fit a model.

    They would train without a word and decode to noise. Headers only; of published `.pt` files,
    which have none, just the first is read, and the others when their turn comes.

    Args:
        frame_shape: (C, h, w).
        max_broken: files that may be missing or damaged.

    Returns:
        The number of frames in each file whose header was read.

    Raises:
        ScdError: naming the first file that is missing, damaged or does not fit.
    """
    own = [path for path in paths if path.suffix != ".pt"]
    published = [path for path in paths if path.suffix == ".pt"][:1]
    frames: dict[Path, int] = {}
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
    return frames


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
