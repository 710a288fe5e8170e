"""Which option values and pairs of values can work; everything else is refused before a run."""

import difflib
import math
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from scd.errors import ScdError

if TYPE_CHECKING:
    from scd.options import Options

CHOICES = {
    "task": ("world_model", "autoencoder"),
    "data.source": ("video", "latents"),
    "model.fusion": ("token_concat", "token_concat_with_proj", "concat", "add"),
    "model.condition": ("none", "action", "label"),
    "flow.prediction": ("velocity", "data"),
    "flow.encoder_input": ("clean", "noisy", "mixed"),
    "optim.schedule": ("constant", "cosine"),
    "train.mixed_precision": ("no", "bf16"),
    "rollout.guidance": ("none", "context", "condition"),
}
BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")
POSITIVE = [
    "autoencoder.latent_channels",
    "data.frame_size",
    "data.frames",
    "data.frame_stride",
    "data.fps",
    "model.patch_size",
    "model.heads",
    "model.encoder_layers",
    "model.decoder_layers",
    "flow.sigma_min",
    "flow.noise_draws",
    "flow.logit_std",
    "optim.lr",
    "optim.decoder_lr_scale",
    "optim.max_grad_norm",
    "train.steps",
    "train.batch_size",
    "train.gradient_accumulation",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "rollout.steps",
    "eval.new_frames",
    "eval.videos",
    "eval.trajectories",
    "eval.batch_size",
]
NOT_NEGATIVE = [
    "seed",
    "eval.context_frames",
    "model.num_conditions",
    "flow.context_noise",
    "optim.weight_decay",
    "optim.warmup_steps",
    "train.workers",
    "train.sample_every",
    "rollout.guidance_scale",
    "rollout.guidance_noise",
    "eval.saved_videos",
    "autoencoder.lpips_weight",
]
FRACTIONS = ["flow.clean_fraction", "flow.condition_dropout", "optim.ema_decay"]
TRACKERS = ("tensorboard", "wandb")


def check(options: "Options", source: str) -> None:
    """Refuse values and pairs of values that cannot work."""

    def get(key: str) -> Any:
        value: Any = options
        for part in key.split("."):
            value = getattr(value, part)
        return value

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ScdError(f"{source}: {message}")

    for key, choices in CHOICES.items():
        value = get(key)
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        require(value in choices, f"{key} is {value!r}, not one of {', '.join(choices)}{hint}")
    for key in known_keys(type(options)):
        values = get(key) if isinstance(get(key), list) else [get(key)]
        floats = [value for value in values if isinstance(value, float)]
        require(all(map(math.isfinite, floats)), f"{key} must be finite, not {get(key)}")
    for key in POSITIVE:
        require(get(key) > 0, f"{key} must be above 0, not {get(key)}")
    for key in NOT_NEGATIVE:
        require(get(key) >= 0, f"{key} must not be negative, but is {get(key)}")
    for key in FRACTIONS:
        require(0 <= get(key) <= 1, f"{key} must lie between 0 and 1, not {get(key)}")
    for tracker in options.train.trackers:
        known = ", ".join(TRACKERS)
        require(tracker in TRACKERS, f"train.trackers: unknown {tracker!r}; known: {known}")
    model, data, evaluation = options.model, options.data, options.eval
    name, betas = options.name, options.optim.betas
    require(
        name.isprintable() and "/" not in name and name not in ("", ".", ".."),
        f"name must do as a folder's name, but is {name!r}",
    )
    require(options.seed < 2**63, "seed must lie below 2^63")
    require(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        f"optim.betas takes two numbers from 0 to below 1, not {betas}",
    )
    require(
        len(evaluation.seeds) == evaluation.trajectories,
        f"eval.seeds has {len(evaluation.seeds)} entries for eval.trajectories="
        f"{evaluation.trajectories}: one seed a trajectory",
    )
    pair = evaluation.swapped_actions
    require(
        not pair
        or (
            model.condition == "action"
            and len(pair) == len(set(pair)) == 2
            and all(0 <= action < model.num_conditions for action in pair)
        ),
        f"eval.swapped_actions={pair}: two different actions below model.num_conditions, of a "
        f"model with model.condition=action",
    )
    if options.task == "autoencoder":
        a = options.autoencoder
        require(data.source == "video", "task autoencoder needs data.source=video")
        for side in ("encoder", "decoder"):
            lengths = {
                len(getattr(a, f"{side}_{part}")) for part in ("block_types", "channels", "layers")
            }
            require(
                len(lengths) == 1 and lengths != {0},
                f"autoencoder.{side}_block_types, _channels and _layers need one entry a stage",
            )
            types = getattr(a, f"{side}_block_types")
            require(
                set(types) <= set(BLOCK_TYPES),
                f"autoencoder.{side}_block_types={types}: known are {', '.join(BLOCK_TYPES)}",
            )
            channels, layers = getattr(a, f"{side}_channels"), getattr(a, f"{side}_layers")
            require(
                min(channels) > 0 and min(layers) >= 0 and channels[-1] % a.latent_channels == 0,
                f"autoencoder.{side}_channels={channels} must be above 0 and the last divide by "
                f"latent_channels={a.latent_channels}; {side}_layers={layers} not be negative",
            )
        stages = len(a.encoder_channels)
        require(
            len(a.decoder_channels) == stages,
            "autoencoder.encoder_channels and decoder_channels need as many stages",
        )
        require(
            data.frame_size % 2 ** (stages - 1) == 0,
            f"data.frame_size={data.frame_size} does not divide by {2 ** (stages - 1)}, the "
            f"downsampling of {stages} autoencoder stages",
        )
        return
    require(data.frames >= 2, "data.frames: a world model needs at least 2 frames a clip")
    require(
        (model.condition == "none") == (model.num_conditions == 0),
        f"model.condition={model.condition} contradicts "
        f"model.num_conditions={model.num_conditions}",
    )
    require(
        not (options.rollout.guidance == "condition" and model.condition == "none"),
        "rollout.guidance=condition contradicts model.condition=none",
    )
    require(
        not (model.condition == "action" and data.frame_stride != 1),
        "data.frame_stride must be 1 with model.condition=action: skipped actions would be lost",
    )
    require(
        not (data.source == "latents" and options.autoencoder.path is None),
        "data.source=latents needs autoencoder.path, to see pixels again",
    )


def known_keys(cls: type, prefix: str = "") -> Any:
    for item in fields(cls):
        name = prefix + item.name
        yield name
        if is_dataclass(item.type):
            yield from known_keys(item.type, name + ".")  # type: ignore[arg-type]
