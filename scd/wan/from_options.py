"""Build a Wan as an experiment's options say, and fill it with weights that fit it.

Weights come from a folder, as `scd wan convert` and a run's end write it, from a checkpoint of a
run, or from any file of safetensors.
"""

import inspect
from pathlib import Path
from typing import Any

import torch

from scd.distill.teacher import teacher_path
from scd.errors import ScdError
from scd.models.config import own_config
from scd.models.weights import (
    SHOWN_DIFFERENCES,
    load_matching,
    read_all_weights,
    read_metadata,
)
from scd.options import Options, options_from_json
from scd.utils.files import read_json
from scd.wan.bidirectional_wan import BidirectionalWan
from scd.wan.causal_wan import CausalWan
from scd.wan.network import WanWorldModel
from scd.wan.scd_wan import SCDWan

KINDS: dict[str, type[WanWorldModel]] = {
    "scd_wan": SCDWan,
    "causal_wan": CausalWan,
    "bidirectional_wan": BidirectionalWan,
}
# Whose weights have the same names and mean the same: those of Wan itself, whoever may see whom.
ONE_STACK = ("WanTransformer3DModel", "CausalWan", "BidirectionalWan")
WAN_ITSELF = ("WanTransformer3DModel", "BidirectionalWan")
WITHOUT_INFLUENCE = ("rope_max_seq_len",)
MOST_LAYERS = 1000  # more are a damaged config


def build_wan(options: Options, channels: int, downsampling: int) -> WanWorldModel:
    """Build a fresh model of the options' kind and sizes.

    Args:
        channels, downsampling: of the autoencoder's latents.

    Raises:
        ScdError: the frames do not divide into latents and patches, or options contradict.
    """
    m, wan = options.model, options.wan
    cell = downsampling * m.patch_size
    if any(side % cell for side in options.data.frame_sides):
        raise ScdError(
            f"frames of {'x'.join(map(str, options.data.frame_sides))} pixels do not divide by "
            f"{cell} (autoencoder {downsampling} x model.patch_size {m.patch_size})"
        )
    config: dict[str, Any] = {
        "patch_size": (1, m.patch_size, m.patch_size),
        "num_attention_heads": m.heads,
        "attention_head_dim": wan.head_dim,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": wan.text_dim,
        "freq_dim": wan.freq_dim,
        "ffn_dim": wan.ffn_dim,
        "num_actions": m.num_conditions,
    }
    if m.type == "scd_wan":
        config |= {
            "encoder_layers": m.encoder_layers,
            "decoder_first": wan.decoder_first,
            "decoder_last": m.decoder_layers - wan.decoder_first,
            "encoder_frame": m.encoder_frame,
            "fusion": m.fusion,
            "first_frame": m.first_frame,
        }
    else:
        config["num_layers"] = m.layers
    if m.type == "causal_wan":
        config["chunk_frames"] = wan.chunk_frames
    return KINDS[m.type](**config)


def start_wan(options: Options, channels: int, downsampling: int) -> WanWorldModel:
    """Build the model of `build_wan` with the weights at `init_from`, if there are any.

    Raises:
        ScdError: see `build_wan`; or the weights are missing, or of another model.
    """
    if options.init_from is None:
        return build_wan(options, channels, downsampling)
    with torch.device("meta"):  # no time for random values that are replaced
        model = build_wan(options, channels, downsampling)
    return with_weights(model, Path(options.init_from), "init_from")


def teacher_wan(
    options: Options, student: WanWorldModel, option: str = "distill.teacher"
) -> WanWorldModel:
    """Load the frozen teacher, a folder or a checkpoint; see `scd.distill.teacher.load_teacher`.

    It has the student's sizes. For consistency distillation it is of the student's kind, for
    distribution matching it is Wan itself, as deep as it is there: a download, what `scd wan
    convert --type bidirectional` wrote, or a bidirectional_wan that was trained here.

    Raises:
        ScdError: it is missing, damaged, or does not fit. A causal Wan has the tensors of Wan
            itself, so its kind decides.
    """
    path = Path(teacher_path(options, option))
    source, own, config = f"{option}={path}", type(student).__name__, own_config(student)
    found = _config(path, student.channels) or {}
    consistency = options.distill.method == "consistency"
    if found.get("_class_name") not in ((own,) if consistency else WAN_ITSELF):
        needed = (
            f"a causal teacher of the student's kind, {own}"
            if consistency
            else "Wan itself, whose frames all see each other: a download in diffusers' format, or "
            "what `scd wan convert SOURCE --type bidirectional` makes of one"
        )
        raise ScdError(
            f"{source}: holds {found.get('_class_name', 'no known model')}, but distill.method="
            f"{options.distill.method} needs {needed}"
        )
    with torch.device("meta"):
        if consistency:
            teacher: WanWorldModel = type(student)(**config)
        else:
            layers = found.get("num_layers")
            if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
                raise ScdError(f"{source}: has {layers} layers: no Wan")
            known = inspect.signature(BidirectionalWan.__init__).parameters
            shared = {key: value for key, value in config.items() if key in known}
            teacher = BidirectionalWan(**{**shared, "num_layers": layers})
    return with_weights(teacher, path, option).requires_grad_(False)


def with_weights(model: WanWorldModel, path: Path, option: str) -> WanWorldModel:
    """Fill a model that has no memory yet with weights, in float32.

    Args:
        path: a folder or a checkpoint, which must describe this very model; or safetensors.
        option: that names the path, for messages.

    Raises:
        ScdError: listing what does not fit.
    """
    source = f"{option}={path}"
    if (found := _config(path, model.channels)) is not None:
        _check_config(model, found, source)
    tensors = {name: tensor.float() for name, tensor in read_all_weights(path).items()}
    load_matching(model, tensors, source, assign=True)
    return model


def options_in(path: Path, overrides: list[str] | None = None) -> Options | None:
    """Read the options that a checkpoint of a Wan's training carries; None: it is something else.

    Args:
        overrides: `key=value`, which may change the model's use, but not what it is.

    Raises:
        ScdError: the file is damaged, or an override cannot work.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    text = read_metadata(path).get("options")
    options = None if text is None else options_from_json(text, str(path))
    if text is None or options is None or not options.model.is_wan:
        return None
    changed = options_from_json(text, str(path), overrides)
    if (changed.model, changed.wan) != (options.model, options.wan):
        raise ScdError(f"{path}: options of model and wan are the checkpoint's: leave them out")
    return changed


def _config(path: Path, channels: int) -> dict[str, Any] | None:
    """Describe the model at a path as diffusers' config does; None: weights that say nothing."""
    if not path.is_dir():
        if (options := options_in(path)) is None:
            return None
        with torch.device("meta"):
            model = build_wan(options, channels, 1)
        return {**own_config(model), "_class_name": type(model).__name__}
    config = read_json(path / "transformer" / "config.json")
    if not isinstance(config, dict):
        raise ScdError(f"{path}/transformer/config.json: not a config")
    return config


def _check_config(model: WanWorldModel, found: dict[str, Any], source: str) -> None:
    own = type(model).__name__
    of_folder = found.get("_class_name")
    if of_folder != own and not {own, of_folder} <= set(ONE_STACK):
        raise ScdError(f"{source}: holds a {of_folder}, not a {own}")
    added = {"num_actions": 0, "chunk_frames": 1}  # which a Wan of diffusers does not have
    plain = {key: _plain(value) for key, value in {**added, **found}.items()}
    differences = [
        f"{key} is {plain.get(key)} there, {_plain(value)} in the options"
        for key, value in own_config(model).items()
        if key not in WITHOUT_INFLUENCE and _plain(value) != plain.get(key)
    ]
    if differences:
        raise ScdError(f"{source}: another model: {'; '.join(differences[:SHOWN_DIFFERENCES])}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
