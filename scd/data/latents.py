"""Latent files: the unscaled output of an autoencoder's encoder, (frames, C, h, w).

Own files are safetensors with the key `latents`; the `.pt` tensors of published data sets are read
too, as plain tensors only.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scd.errors import ScdError
from scd.files import write_whole


def read_latents(path: Path) -> Tensor:
    """Read (F, C, h, w) latents.

    Raises:
        ScdError: the file is missing, damaged, not finite or of another shape.
    """
    if not path.is_file():
        raise ScdError(f"{path}: no such latent file")
    try:
        if path.suffix == ".pt":
            latents = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with safe_open(str(path), framework="pt") as file:
                latents = file.get_tensor("latents")
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise ScdError(f"{path}: not a readable latent file ({error})") from error
    except Exception as error:  # torch.load refuses what is not plain data with its own types
        raise ScdError(f"{path}: refused: not a plain tensor ({type(error).__name__})") from error
    if not isinstance(latents, Tensor) or latents.ndim != 4 or not latents.is_floating_point():
        raise ScdError(f"{path}: expected one floating-point tensor (frames, C, h, w)")
    if not torch.isfinite(latents).all():
        raise ScdError(f"{path}: latents are not finite")
    return latents


def write_latents(path: Path, latents: Tensor, encoder_hash: str) -> None:
    """Write (F, C, h, w) latents with the hash of the autoencoder that made them."""
    tensors = {"latents": latents.contiguous()}
    write_whole(path, lambda aside: save_file(tensors, aside, {"autoencoder": encoder_hash}))


def latents_made_by(path: Path) -> tuple[str | None, int]:
    """Hash of the autoencoder that made a latent file, and its frames; (None, 0) if unreadable."""
    try:
        with safe_open(str(path), framework="pt") as file:
            hash_ = (file.metadata() or {}).get("autoencoder")
            return hash_, file.get_slice("latents").get_shape()[0]
    except (SafetensorError, OSError):
        return None, 0
