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
