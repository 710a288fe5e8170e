"""Build a world model from options, or load one from any weights file."""

import hashlib
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from scd.errors import ScdError
from scd.models.autoencoder import Codec, load_codec
from scd.models.bidirectional_dit import BidirectionalDiT
from scd.models.causal_dit import CausalDiT
from scd.models.config import own_config
from scd.models.reference import load_reference_checkpoint
from scd.models.scd import SCD
from scd.models.weights import (
    build_to_fit,
    read_all_weights,
    read_metadata,
    read_weights,
    weight_files,
)
from scd.models.world_model import WorldModel
from scd.options import (
    OPTIONS_FILE,
    ModelOptions,
    Options,
    RolloutOptions,
    load_options,
    options_from_json,
)
from scd.utils.files import read_json, sha256
from scd.utils.paths import project_file, why_missing
from scd.utils.precision import resolve_precision, with_weights_in
from scd.utils.processes import agree_on_precision
from scd.utils.tensor_files import is_torch_archive


def build_world_model(options: Options, codec: Codec) -> WorldModel:
    """Build a fresh model of the options' kind and sizes, for the codec's latents.

    Raises:
        ScdError: the frames do not divide into latents and patches.
    """
    m = options.model
    cell = codec.downsampling * m.patch_size
    if options.data.frame_size % cell:
        raise ScdError(
            f"data.frame_size={options.data.frame_size} does not divide by {cell} (autoencoder "
            f"{codec.downsampling} x model.patch_size {m.patch_size})"
        )
    shared = {
        "channels": codec.channels,
        "patch_size": m.patch_size,
        "heads": m.heads,
        "condition": m.condition,
        "num_conditions": m.num_conditions,
        "first_frame": m.first_frame,
        "modulate_output": m.modulate_output,
        "prediction": options.flow.prediction,
        "sigma_min": options.flow.sigma_min,
    }
    if m.type == "causal_dit":
        return CausalDiT(layers=m.layers, **shared)
    if m.type == "bidirectional_dit":
        return BidirectionalDiT(layers=m.layers, **shared)
    return SCD(
        encoder_layers=m.encoder_layers,
        decoder_layers=m.decoder_layers,
        fusion=m.fusion,
        modulate_context=m.modulate_context,
        encoder_frame=m.encoder_frame,
        **shared,
    )


REFERENCE_OPTIONS = "options/scd_minecraft.yml"  # for files that carry no options
FOR_WANS = (
    "which other commands are for: `scd wan generate` makes videos of prompts, with --vbench those "
    "that VBench's tool wants, and `scd wan measure` measures long ones"
)
# What makes the same tensors another model. Of the autoencoder only the place may change.
FIXED = [f"model.{field.name}" for field in fields(ModelOptions)]
FIXED += ["flow.prediction", "flow.sigma_min"]
ONE_NETWORK = {"noise", "joint"}  # of model.encoder_frame, in two passes or in one


@dataclass
class LoadedModel:
    """A model in evaluation mode, what it needs to see pixels, and where it came from."""

    model: WorldModel
    codec: Codec
    options: Options
    source: dict[str, str | int | None]  # path, sha256, step

    def for_rollouts(self) -> "LoadedModel":
        """Resolve `rollout.precision`, and put weights and codec into it; collective."""
        rollout = resolved_on(self.model.device, self.options.rollout)
        codec = copy(self.codec)  # a run that is validated goes on training with its own
        codec.precision = rollout.precision
        return replace(
            self,
            codec=codec,
            model=with_weights_in(self.model, rollout.precision),
            options=replace(self.options, rollout=rollout),
        )


def resolved_on(device: torch.device, rollout: RolloutOptions) -> RolloutOptions:
    """Replace a `precision` by what all processes have of it; collective."""
    found = agree_on_precision(resolve_precision(rollout.precision, device))
    return replace(rollout, precision=found)


def load_checkpoint_for_use(
    path: Path, options_path: str | None = None, overrides: list[str] | None = None
) -> LoadedModel:
    """Load a checkpoint, or a folder as `scd export` writes it (see `load_folder`).

    Checkpoints are `ema.safetensors` or `model.safetensors` of this project, or the reference's
    `ema.pth`.

    Args:
        options_path: an options file instead of the options in the checkpoint.
        overrides: `key=value`, on top of either.

    Raises:
        ScdError: the file is missing, damaged, no world model, or does not fit the options.
    """
    options = options_for_use(path, options_path, overrides)
    if path.is_dir():
        return load_folder(path, options)
    metadata, source = _metadata(path), source_of(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: WorldModel
    if "options" in metadata:
        tensors, _ = read_weights(path)
        codec = load_codec(options.autoencoder.path)
        model = _built(options, codec, tensors, path)
    else:
        model = load_reference_checkpoint(path, options.model.patch_size, options.model.fusion)
        codec = load_codec(options.autoencoder.path)
        _check_reference(model, codec, options, path)
    return LoadedModel(model.to(device).eval(), codec.to(device), options, source)


def source_of(path: Path) -> dict[str, str | int | None]:
    """Say which checkpoint a model comes from: path, SHA-256 and step.

    Raises:
        ScdError: it is missing, damaged, or not the file that its manifest describes.
    """
    return {"path": str(path), "sha256": _checked_hash(path), "step": _step(_metadata(path), path)}


def load_folder(folder: Path, options: Options) -> LoadedModel:
    """Load what `SCDPipeline.save_pretrained` wrote.

    The network is built as the options say, and takes only weights that fit it: nothing in the
    folder names code to be imported.

    Raises:
        ScdError: a part of it is missing or damaged, or does not fit the options.
    """
    if options.autoencoder.path is not None:
        vae = replace(options.autoencoder, path=str(folder / "vae"))  # the one that is used
        options = replace(options, autoencoder=vae)
    codec = load_codec(options.autoencoder.path)
    files = weight_files(folder)
    model = _built(options, codec, read_all_weights(folder), folder / "transformer")
    _check_config(model, folder / "transformer" / "config.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source: dict[str, str | int | None] = {
        "path": str(folder),
        "sha256": sha256(files[0]) if len(files) == 1 else _hash_of_shards(files),
        "step": None,
    }
    return LoadedModel(model.to(device).eval(), codec.to(device), options, source)


def _hash_of_shards(files: list[Path]) -> str:
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def _check_config(model: WorldModel, path: Path) -> None:
    """Refuse a folder whose two descriptions of the model contradict each other.

    This project goes by the options, diffusers by the config.
    """
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ScdError(f"{path}: not a config")
    wrong = [
        f"{key} is {config[key]}, but {value} in {OPTIONS_FILE}"
        for key, value in own_config(model).items()
        if config.get(key, value) != value and {str(config[key]), str(value)} != ONE_NETWORK
    ]
    if wrong:
        raise ScdError(f"{path}: {'; '.join(wrong)}")


def _built(options: Options, codec: Codec, tensors: dict[str, Tensor], path: Path) -> WorldModel:
    m = options.model
    layers = m.encoder_layers + m.decoder_layers + m.layers
    if layers > len(tensors):
        raise ScdError(f"{path}: {layers} layers in its options, but {len(tensors)} tensors")
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():  # in float64 it may be, and too large for float32
            raise ScdError(f"{path}: {name} is not finite")
    return build_to_fit(lambda: build_world_model(options, codec), tensors, str(path))


def options_for_use(
    path: Path, options_path: str | None = None, overrides: list[str] | None = None
) -> Options:
    """Find the options that `load_checkpoint_for_use` goes by, without reading the weights.

    Raises:
        ScdError: the file is missing or damaged, no world model, or the options cannot work.
    """
    refuse_wan_folder(path)
    own = _own_options(path)
    if options_path is not None or own is None:
        options = load_options(options_path or project_file(REFERENCE_OPTIONS), overrides)
    else:
        options = _own_options(path, overrides) or own
    for found in (own or options, options):
        if found.task != "world_model":
            raise ScdError(f"{path}: holds an {found.task}, not a world model")
        if found.model.is_wan:
            raise ScdError(f"{path}: a {found.model.type}, {FOR_WANS}")
    if own is not None:
        _refuse_other_model(own, options, path)
    return options


def refuse_wan_folder(path: Path) -> None:
    """Refuse the pipeline of a Wan, which other commands are for."""
    index = path / "model_index.json"
    found = read_json(index) if index.is_file() else None
    if isinstance(found, dict) and found.get("_class_name") == "SCDWanPipeline":
        raise ScdError(f"{path}: the pipeline of a Wan, {FOR_WANS}")


def _own_options(path: Path, overrides: list[str] | None = None) -> Options | None:
    """Read the options that a checkpoint or a folder carries; None for the reference's files."""
    if path.parent.name == "transformer" and (path.parents[1] / OPTIONS_FILE).is_file():
        raise ScdError(f"{path}: weights of an exported model: give its folder, {path.parents[1]}")
    if path.is_dir():
        if (path / "checkpoints").is_dir():
            raise ScdError(
                f"{path}: the folder of a run; give one of its models, {path}/exported or "
                f"{path}/checkpoints/step-…/ema.safetensors"
            )
        if (path / "ema.safetensors").is_file():
            raise ScdError(f"{path}: the folder of a checkpoint; give {path}/ema.safetensors")
        if not (path / OPTIONS_FILE).is_file():
            raise ScdError(
                f"{path}: no such weights file, and a folder without {OPTIONS_FILE} is no exported "
                f"model"
            )
        return load_options(path / OPTIONS_FILE, overrides)
    metadata = _metadata(path)
    if "options" not in metadata:
        return None
    return options_from_json(metadata["options"], str(path), overrides)


def _metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; a file of `torch.save` has none."""
    if path.suffix == ".safetensors":
        return read_metadata(path)
    if path.is_file() and not is_torch_archive(path):
        raise ScdError(
            f"{path}: no checkpoint, neither safetensors nor tensors of torch.save (or damaged)"
        )
    if not path.is_file():
        raise ScdError(f"{path}: {why_missing(path, 'weights file')}")
    return {}


def _step(metadata: dict[str, str], path: Path) -> int | None:
    step = metadata.get("step")
    if step is not None and not (step.isascii() and step.isdecimal() and len(step) < 19):
        raise ScdError(f"{path}: its step is {step[:40]!r}, no number")
    return None if step is None else int(step)


def _checked_hash(path: Path) -> str:
    """Hash a file; where it lies beside a manifest, refuse another SHA-256 than that names."""
    digest = sha256(path)
    manifest = path.with_name("manifest.json")
    described = read_json(manifest) if manifest.is_file() else None
    files = described.get("files") if isinstance(described, dict) else None
    if isinstance(files, dict) and digest not in str(files.get(path.name, digest)):
        raise ScdError(f"{path}: damaged, it is not the file that manifest.json describes")
    return digest


def refuse_other_prediction(path: Path, options: Options) -> None:
    """Refuse weights that were trained to predict something else, where they say it.

    The kind of model may be another: a causal model may start from a bidirectional one.
    """
    if path.parent.name == "transformer":  # the weights of an exported model
        path = path.parents[1]
    refuse_wan_folder(path)
    if path.is_dir() and not (path / OPTIONS_FILE).is_file():
        return
    if (own := _own_options(path)) is None:
        return
    for key in ("prediction", "sigma_min"):
        was, is_ = getattr(own.flow, key), getattr(options.flow, key)
        if was != is_:
            raise ScdError(f"{path}: its flow.{key} is {was}, but {is_} in the options")


def _refuse_other_model(own: Options, options: Options, path: Path) -> None:
    """Refuse options that would make the checkpoint another model; they may change its use."""
    differences = []
    for key in FIXED:
        section, _, name = key.partition(".")
        was, is_ = (getattr(getattr(o, section), name) for o in (own, options))
        if was != is_ and {was, is_} != ONE_NETWORK:
            differences.append(f"{key} is {was} in the checkpoint, {is_} in the options")
    if differences:
        raise ScdError(f"{path}: does not fit the options: {'; '.join(differences)}")


def _check_reference(model: WorldModel, codec: Codec, options: Options, path: Path) -> None:
    """Refuse a reference checkpoint whose tensors contradict the codec and data of the options."""
    differences = [
        f"{key} is {found} in the checkpoint, {wanted} in the options"
        for key, found, wanted in (
            ("channels (model.patch_size)", model.config.channels, codec.channels),
            ("model.condition", model.config.condition, options.model.condition),
            ("model.num_conditions", model.config.num_conditions, options.model.num_conditions),
        )
        if found != wanted
    ]
    if differences:
        raise ScdError(f"{path}: does not fit the options: {'; '.join(differences)}")
