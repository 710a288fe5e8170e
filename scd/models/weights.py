"""Reading weight files, and loading them only where they fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from scd.errors import ScdError, reason
from scd.utils.paths import why_missing
from scd.utils.tensor_files import is_plain, read_pt

SHOWN_DIFFERENCES = 20  # in one message
Network = TypeVar("Network", bound=nn.Module)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file.

    Raises:
        ScdError: the file is missing or damaged.
    """
    metadata = read_metadata(path)
    try:
        return load_file(path), metadata
    except (SafetensorError, OSError) as error:
        raise ScdError(f"{path}: not a readable safetensors file ({error})") from error


def weight_files(path: Path) -> list[Path]:
    """List the files that hold a model's weights: the file itself, or of a folder's transformer.

    Raises:
        ScdError: a folder without any.
    """
    if not path.is_dir():
        return [path]
    whole = path / "transformer" / "diffusion_pytorch_model.safetensors"
    if whole.is_file():  # beside which there may be variants
        return [whole]
    files = sorted(whole.parent.glob("diffusion_pytorch_model-*-of-*.safetensors"))
    if not files:
        raise ScdError(
            f"{path / 'transformer'}: holds no weights (diffusion_pytorch_model.safetensors)"
        )
    return files


def read_all_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of all `weight_files`.

    Raises:
        ScdError: there are none, or one of them is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
        tensors |= read_weights(file)[0]
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, without its tensors.

    Raises:
        ScdError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ScdError(f"{path}: {why_missing(path, 'weights file')}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ScdError(f"{path}: not a readable safetensors file ({error})") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a flat state dict that others published: `.safetensors`, or `.pth` of plain tensors.

    Raises:
        ScdError: the file is missing, damaged, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)[0]
    tensors = read_pt(path)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and is_plain(tensor) for name, tensor in tensors.items()
    ):
        raise ScdError(f"{path}: expected a flat state dict of tensors")
    return tensors


def build_to_fit(build: Callable[[], Network], tensors: dict[str, Tensor], source: str) -> Network:
    """Build a network and load weights into it, only if names and shapes agree entirely.

    What a foreign file announces is held against its tensors before memory is taken for it: the
    network is first built without any.

    Raises:
        ScdError: listing the differences.
    """
    try:
        with torch.device("meta"):
            announced = build()
    except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise ScdError(f"{source}: announces a network that cannot be ({reason(error)})") from error
    _refuse_differences(announced, tensors, source)
    network = build()
    load_matching(network, tensors, source)
    return network


def refuse_incomplete(found: dict[str, Any], whose: str) -> None:
    """Refuse weights that diffusers loaded although they do not fit: it left them random, or out.

    Args:
        found: diffusers' `output_loading_info`.
    """
    for kind, problem in (("missing_keys", "lack"), ("unexpected_keys", "have too much:")):
        if names := sorted(found[kind]):
            shown = ", ".join(names[:SHOWN_DIFFERENCES])
            raise ScdError(f"{whose} {len(names)} weights {problem} {shown}")


def load_matching(
    module: nn.Module, tensors: dict[str, Tensor], source: str, assign: bool = False
) -> None:
    """Load weights only if names and shapes agree entirely.

    Args:
        assign: put the tensors themselves in, also into a module that has no memory yet.

    Raises:
        ScdError: listing the differences.
    """
    _refuse_differences(module, tensors, source)
    try:
        module.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:  # number formats that cannot be converted
        raise ScdError(f"{source}: does not fit the model ({reason(error)})") from error


def _refuse_differences(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    wanted = {name: _described(tensor) for name, tensor in module.state_dict().items()}
    found = {name: _described(tensor) for name, tensor in tensors.items()}
    differences = [
        f"{name} is {found.get(name, 'absent')}, the model's {wanted.get(name, 'absent')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if differences:
        shown = "; ".join(differences[:SHOWN_DIFFERENCES])
        more = len(differences) - SHOWN_DIFFERENCES
        raise ScdError(
            f"{source}: does not fit the model in {len(differences)} tensors: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )


def _described(tensor: Tensor) -> str:
    """Describe a tensor by its shape, and its type where no weight is converted to or from it."""
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else f' {tensor.dtype}'}"
