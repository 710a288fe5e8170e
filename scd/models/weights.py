"""Reading weight files, and loading them only where they fit."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from scd.errors import ScdError


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ScdError: the file is missing or damaged.
    """
    metadata = read_metadata(path)
    try:
        return load_file(path), metadata
    except (SafetensorError, OSError) as error:
        raise ScdError(f"{path}: not a readable safetensors file ({error})") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file, without its tensors.

    Raises:
        ScdError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ScdError(f"{path}: no such weights file")
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ScdError(f"{path}: not a readable safetensors file ({error})") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A flat state dict that others published: `.safetensors`, or `.pth` of plain tensors.

    Raises:
        ScdError: the file is missing, damaged, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)[0]
    if not path.is_file():
        raise ScdError(f"{path}: no such weights file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # refused pickles, damaged archives: many kinds
        raise ScdError(f"{path}: refused: not plain tensors ({type(error).__name__})") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ScdError(f"{path}: expected a flat state dict of tensors")
    return tensors


def load_matching(module: torch.nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load weights only if names and shapes agree entirely.

    Raises:
        ScdError: listing the first differences.
    """
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    differences = [
        f"{name} is {found.get(name, 'absent')}, the model's {wanted.get(name, 'absent')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if differences:
        shown = "; ".join(differences[:5])
        raise ScdError(
            f"{source}: does not fit the model in {len(differences)} tensors: {shown}"
            + ("; ..." if len(differences) > 5 else "")
        )
    module.load_state_dict(tensors)
