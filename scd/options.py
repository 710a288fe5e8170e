"""Typed options: one YAML file is one experiment, `key=value` overrides change single values.

Everything is checked before any data or device is touched; an unknown key, a wrong type or a
contradictory pair is an `ScdError` that names the file, the key and the nearest known name.
"""

import difflib
import json
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from scd.errors import ScdError


@dataclass
class DataOptions:
    """Clips to train on and to evaluate on (see `scd.data.lists` for the list files)."""

    root: str = MISSING  # folder that the lists' paths are relative to
    train_list: str = "train.json"  # relative to root
    val_list: str = "val.json"
    source: str = "video"  # video | latents (precomputed by `scd encode`)
    frame_size: int = 64  # height and width of the videos, pixels
    frames: int = 16  # frames in a training clip
    frame_stride: int = 1  # take every n-th frame
    fps: float = 8.75  # of the videos that are written
    action_names: list[str] = field(default_factory=list)  # for tables; may stay empty


@dataclass
class AutoencoderOptions:
    """The autoencoder between pixels and latents: one to load (`path`), or one to train."""

    path: str | None = None  # a diffusers folder; null: pixel space, or train from scratch
    latent_channels: int = 32
    encoder_block_types: list[str] = field(default_factory=list)  # ResBlock | EfficientViTBlock
    encoder_channels: list[int] = field(default_factory=list)
    encoder_layers: list[int] = field(default_factory=list)
    decoder_block_types: list[str] = field(default_factory=list)
    decoder_channels: list[int] = field(default_factory=list)
    decoder_layers: list[int] = field(default_factory=list)
    lpips_weight: float = 0.5  # loss = L1 + lpips_weight * LPIPS


@dataclass
class ModelOptions:
    """The network (arXiv 2602.10095, section 4). Width is 64 * heads."""

    patch_size: int = 1
    heads: int = 16
    encoder_layers: int = 8
    decoder_layers: int = 4
    fusion: str = "token_concat"  # | token_concat_with_proj | concat | add
    condition: str = "none"  # | action | label
    num_conditions: int = 0  # actions or classes, without the null condition
    modulate_context: bool = True  # the encoder's output norm is modulated
    modulate_output: bool = True  # the decoder's


@dataclass
class FlowOptions:
    """The training objective (flow matching)."""

    prediction: str = "velocity"  # | data (the network predicts the clean frame)
    sigma_min: float = 0.05  # for prediction data: lower bound of the divisor of the velocity
    encoder_input: str = "clean"  # | noisy | mixed (a share of `clean_fraction` frames is clean)
    clean_fraction: float = 0.1
    noise_draws: int = 2  # K: noise draws of each frame on one encoder pass
    context_noise: float = 0.05  # eta of the context perturbation
    condition_dropout: float = 0.1
    logit_mean: float = 0.0  # noise level sigma = sigmoid(N(mean, std))
    logit_std: float = 1.0


@dataclass
class OptimOptions:
    lr: float = 1e-4
    decoder_lr_scale: float = 2.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    schedule: str = "constant"  # | cosine (to zero at the last step); both after the warm-up
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999


@dataclass
class TrainOptions:
    steps: int = MISSING
    batch_size: int = MISSING  # clips, per process and accumulation step
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str = "bf16"  # | no
    compile: bool = False  # torch.compile; needs a C++ compiler on the CPU
    workers: int = 2  # data loading processes
    log_every: int = 10
    sample_every: int = 0  # steps between samples and metrics on the validation set; 0: never
    save_every: int = 1000
    keep_checkpoints: int = 2
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb


@dataclass
class RolloutOptions:
    steps: int = 50  # Euler steps a frame
    guidance: str = "context"  # | condition | none
    guidance_scale: float = 1.5
    guidance_noise: float = 0.05  # eta of the perturbed context, the negative branch


@dataclass
class EvalOptions:
    context_frames: int = MISSING
    new_frames: int = MISSING
    videos: int = 256
    trajectories: int = 1
    seeds: list[int] = field(default_factory=lambda: [0])  # one for each trajectory
    batch_size: int = 16
    saved_videos: int = 16  # how many are written as mp4
    swapped_actions: list[int] = field(default_factory=list)  # the pair that a table row exchanges


@dataclass
class Options:
    """One experiment. Results go to `experiments/<name>/`."""

    name: str = MISSING
    task: str = MISSING  # world_model | autoencoder
    seed: int = 0
    data: DataOptions = field(default_factory=DataOptions)
    autoencoder: AutoencoderOptions = field(default_factory=AutoencoderOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    flow: FlowOptions = field(default_factory=FlowOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    output_root: str = "experiments"

    @property
    def output(self) -> Path:
        return Path(self.output_root) / self.name


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
POSITIVE = [
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
    "eval.context_frames",
    "eval.new_frames",
    "eval.videos",
    "eval.trajectories",
    "eval.batch_size",
]
NOT_NEGATIVE = [
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


def load_options(path: str | Path, overrides: list[str] | None = None) -> Options:
    """Read an options file and apply `key=value` overrides.

    Raises:
        ScdError: see the module's first lines.
    """
    path = Path(path)
    try:
        written = OmegaConf.load(path)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ScdError(f"{path}: no such options file{hint}") from error
    except Exception as error:  # YAML errors of several kinds, unreadable files
        raise ScdError(f"{path}: not a readable options file ({_one_line(error)})") from error
    if not isinstance(written, DictConfig):
        raise ScdError(f"{path}: an options file is a mapping of names to values")
    return _resolve(written, str(path), overrides or [])


def options_from_json(text: str, source: str, overrides: list[str] | None = None) -> Options:
    """Options as a checkpoint carries them, checked like a file's."""
    try:
        written = OmegaConf.create(json.loads(text))
    except Exception as error:
        raise ScdError(f"{source}: unreadable options ({_one_line(error)})") from error
    return _resolve(written, source, overrides or [])


def options_to_dict(options: Options) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(options))  # type: ignore[return-value]


def _resolve(written: DictConfig, source: str, overrides: list[str]) -> Options:
    merged = OmegaConf.structured(Options)
    for part, where in [(written, source), *((text, f"override {text!r}") for text in overrides)]:
        if isinstance(part, str):
            key, equals, _ = part.partition("=")
            if not equals or not key.strip():
                raise ScdError(f"{where}: overrides are written key=value")
            try:
                part = OmegaConf.from_dotlist([part])
            except Exception as error:
                raise ScdError(f"{where}: {_one_line(error)}") from error
        try:
            merged = OmegaConf.merge(merged, part)
        except ConfigKeyError as error:
            raise ScdError(f"{where}: {_unknown_key(str(error.full_key))}") from error
        except OmegaConfBaseException as error:
            raise ScdError(f"{where}: {error.full_key}: {_one_line(error)}") from error
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ScdError(f"{source}: no value for {', '.join(missing)}")
    try:
        options = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ScdError(f"{source}: {_one_line(error)}") from error
    assert isinstance(options, Options)
    _check(options, source)
    return options


def _check(options: Options, source: str) -> None:
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
    require(
        "/" not in options.name and options.name not in ("", ".", ".."), "name: a folder's name"
    )
    require(len(options.optim.betas) == 2, "optim.betas takes two numbers")
    require(
        len(evaluation.seeds) == evaluation.trajectories,
        f"eval.seeds has {len(evaluation.seeds)} entries for eval.trajectories="
        f"{evaluation.trajectories}: one seed a trajectory",
    )
    pair = evaluation.swapped_actions
    require(
        not pair or (len(set(pair)) == 2 and min(pair) >= 0 and max(pair) < model.num_conditions),
        f"eval.swapped_actions={pair}: two different actions below model.num_conditions",
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


def _unknown_key(key: str) -> str:
    known = list(_known_keys(Options))
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    if not near:  # the same last name in another section
        near = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _known_keys(cls: type, prefix: str = "") -> Any:
    for item in fields(cls):
        name = prefix + item.name
        yield name
        if is_dataclass(item.type):
            yield from _known_keys(item.type, name + ".")  # type: ignore[arg-type]


def _one_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
