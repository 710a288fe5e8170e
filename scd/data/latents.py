"""Latent files: the unscaled output of an autoencoder's encoder, (frames, C, h, w).

Own files are safetensors with the key `latents`; the `.pt` tensors of published data sets are read
too, as plain tensors only.
"""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scd.errors import ScdError, reason
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
    except pickle.UnpicklingError as error:
        raise ScdError(f"{path}: refused: not a plain tensor, or damaged") from error
    except Exception as error:  # damaged files raise many kinds
        raise ScdError(f"{path}: not a readable latent file ({reason(error)})") from error
    if not isinstance(latents, Tensor) or latents.ndim != 4 or not latents.is_floating_point():
        raise ScdError(f"{path}: expected one floating-point tensor (frames, C, h, w)")
    if latents.layout != torch.strided or latents.device.type != "cpu":
        raise ScdError(f"{path}: expected a dense tensor, not {latents.layout}, {latents.device}")
    if not torch.isfinite(latents).all():
        raise ScdError(f"{path}: latents are not finite")
    return latents.detach()


def write_latents(path: Path, latents: Tensor, encoder_hash: str) -> None:
    """Write (F, C, h, w) latents with the hash of the autoencoder that made them."""
    data = save({"latents": latents.contiguous()}, {"autoencoder": encoder_hash})
    write_whole(path, lambda aside: aside.write_bytes(data))


def latents_made_by(path: Path) -> tuple[str | None, int]:
    """Hash of the autoencoder that made a latent file, and its frames; (None, 0) if unreadable."""
    try:
        with safe_open(str(path), framework="pt") as file:
            hash_ = (file.metadata() or {}).get("autoencoder")
            frames, _, _, _ = file.get_slice("latents").get_shape()
            return hash_, frames
    except (SafetensorError, OSError, ValueError):
        return None, 0
