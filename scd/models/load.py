"""From a weights file to a model that is ready to use."""

from dataclasses import dataclass
from pathlib import Path

import torch

from scd.errors import ScdError
from scd.files import sha256
from scd.models.autoencoder import Codec, load_codec
from scd.models.build import build_world_model
from scd.models.reference import load_reference_checkpoint
from scd.models.weights import load_matching, read_metadata, read_weights
from scd.models.world_model import WorldModel
from scd.options import Options, load_options, options_from_json

REFERENCE_OPTIONS = "options/scd_minecraft.yml"  # for files that carry no options


@dataclass
class LoadedModel:
    """A model in evaluation mode, what it needs to see pixels, and where it came from."""

    model: WorldModel
    codec: Codec
    options: Options
    source: dict[str, str | int | None]  # path, sha256, step


def load_checkpoint_for_use(
    path: Path, options_path: str | None = None, overrides: list[str] | None = None
) -> LoadedModel:
    """Load `ema.safetensors` or `model.safetensors` of this project, or the reference's `ema.pth`.

    Args:
        options_path: an options file instead of the options in the checkpoint.
        overrides: `key=value`, on top of either.

    Raises:
        ScdError: the file is missing, damaged, no world model, or does not fit the options.
    """
    options = options_for_use(path, options_path, overrides)
    tensors, metadata = read_weights(path) if path.suffix == ".safetensors" else (None, {})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec = load_codec(options.autoencoder.path).to(device)
    if tensors is not None and "options" in metadata:
        model = build_world_model(options, codec)
        load_matching(model, tensors, str(path))
    else:
        model = load_reference_checkpoint(path, options.model.patch_size, options.model.fusion)
        _check_reference(model, codec, options, path)
    source: dict[str, str | int | None] = {
        "path": str(path),
        "sha256": sha256(path),
        "step": int(metadata["step"]) if "step" in metadata else None,
    }
    return LoadedModel(model.to(device).eval(), codec, options, source)


def options_for_use(
    path: Path, options_path: str | None = None, overrides: list[str] | None = None
) -> Options:
    """The options that `load_checkpoint_for_use` goes by, found without reading the weights.

    Raises:
        ScdError: the file is missing or damaged, no world model, or the options cannot work.
    """
    metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
    if options_path is not None:
        options = load_options(options_path, overrides)
    elif "options" in metadata:
        options = options_from_json(metadata["options"], str(path), overrides)
    else:
        options = load_options(REFERENCE_OPTIONS, overrides)
    if options.task != "world_model":
        raise ScdError(f"{path}: holds an {options.task}, not a world model")
    return options


def _check_reference(model: WorldModel, codec: Codec, options: Options, path: Path) -> None:
    """Sizes come from the tensors, codec and data from the options: they must tell one story."""
    for key, found, wanted in (
        ("channels (model.patch_size)", model.config.channels, codec.channels),
        ("model.condition", model.config.condition, options.model.condition),
        ("model.num_conditions", model.config.num_conditions, options.model.num_conditions),
    ):
        if found != wanted:
            raise ScdError(f"{path}: {key} is {found} in the checkpoint, {wanted} in the options")
