"""Typed options: one YAML file is one experiment, `key=value` overrides change single values.

Everything is checked before any data or device is touched; an unknown key, a wrong type or a
contradictory pair is an `ScdError` that names the file, the key and the nearest known name.
"""

import difflib
import json
import math
import reprlib
from dataclasses import dataclass, field, fields, is_dataclass
from decimal import Decimal
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scd.errors import ScdError, reason
from scd.option_rules import check, known_keys
from scd.utils.paths import expand, to_read, why_missing

OPTIONS_FILE = "options.yml"  # beside a model, what it was trained by
MAX_BYTES = 2**16  # of an options file; those of this project have about 2 KiB
PATHS = (
    *("output_root", "init_from", "autoencoder.path"),
    *("data.root", "data.train_list", "data.val_list"),
)
Bytes = TypeVar("Bytes", str, bytes)


@dataclass
class DataOptions:
    """Clips to train on and to evaluate on (see `scd.data.lists` for the list files)."""

    root: str = MISSING  # folder that the lists' paths are relative to
    train_list: str = "train.json"  # relative to root
    val_list: str = "val.json"
    source: str = "video"  # video | latents (precomputed by `scd encode`)
    frame_size: int = 64  # height and width of the frames that the model sees, pixels
    # Scale the videos' shorter side to this many pixels, then crop frame_size: anywhere in training
    # on videos, the centre in evaluation and in latents. null: videos have frame_size already.
    resize_shorter: int | None = None
    mirror: bool = False  # in training on videos, exchange left and right of every second clip
    frames: int = 16  # frames in a training clip
    frame_stride: int = 1  # take every n-th frame
    max_broken_clips: int = 0  # of the training list, that are left out; one more ends the run
    fps: float = 8.75  # of the videos that are written
    action_names: list[str] = field(default_factory=list)  # for tables; may stay empty


@dataclass
class AutoencoderOptions:
    """The autoencoder between pixels and latents: one to load (`path`), or one to train."""

    path: str | None = None  # a diffusers folder; null: pixel space, or one to train from scratch
    latent_channels: int = 32
    encoder_block_types: list[str] = field(default_factory=list)  # ResBlock | EfficientViTBlock
    encoder_channels: list[int] = field(default_factory=list)
    encoder_layers: list[int] = field(default_factory=list)
    decoder_block_types: list[str] = field(default_factory=list)
    decoder_channels: list[int] = field(default_factory=list)
    decoder_layers: list[int] = field(default_factory=list)
    decoder_norm: str = (
        "rms_norm"  # of its ResBlocks, with SiLU | batch_norm, with ReLU (published)
    )
    lpips_weight: float = 0.5  # loss = L1 + lpips_weight * LPIPS


@dataclass
class AdversaryOptions:
    """The second stage of an autoencoder (`autoencoder.path`: what the first one left): its decoder
    against a patch discriminator, its encoder frozen."""

    weight: float = 0.0  # of the adversarial loss, times VQGAN's adaptive weight; 0: no adversary
    channels: int = 64  # of the discriminator's first layer, doubled by each further one
    layers: int = 3  # that halve the image; 3: a logit sees 70x70 pixels, 2: 34x34, 1: 16x16


@dataclass
class ModelOptions:
    """The network (arXiv 2602.10095, section 4). Width is 64 * heads."""

    type: str = "scd"  # | causal_dit (the dense baseline)
    patch_size: int = 1
    heads: int = 16
    encoder_layers: int = 0  # of scd
    decoder_layers: int = 0  # of scd
    layers: int = 0  # of causal_dit
    fusion: str = "token_concat"  # | token_concat_with_proj | concat | add
    condition: str = "none"  # | action | action_vector (several keys at once, a mouse) | label
    num_conditions: int = 0  # actions, components of a vector, or classes; without the null one
    first_frame: bool = False  # also learn to predict frame 0, from nothing
    modulate_context: bool = True  # the encoder's output norm is modulated
    modulate_output: bool = True  # the decoder's

    @property
    def has_actions(self) -> bool:
        """Whether every frame has an action, of either kind."""
        return self.condition in ("action", "action_vector")


@dataclass
class FlowOptions:
    """The training objective (flow matching)."""

    prediction: str = "velocity"  # | data (the network predicts the clean frame)
    sigma_min: float = 0.05  # for prediction data: lower bound of the divisor of the velocity
    encoder_input: str = "clean"  # | noisy | mixed (a share of `clean_fraction` frames is clean)
    clean_fraction: float = 0.1
    # Against drift, for encoder_input clean: noise in the history's frames, of a level drawn for
    # each clip between 0 and this (arXiv 2408.14837), and the share of clips whose history is the
    # model's own prediction of each frame, made in a few steps.
    history_noise: float = 0.0
    own_history: float = 0.0
    noise_draws: int = 2  # K: noise draws of each frame on one encoder pass
    context_noise: float = 0.05  # eta of the context perturbation
    condition_dropout: float = 0.1
    logit_mean: float = 0.0  # noise level sigma = sigmoid(N(mean, std))
    logit_std: float = 1.0


@dataclass
class OptimOptions:
    lr: float = 1e-4
    muon_lr: float | None = None  # of Muon, for the matrices of the blocks; null: AdamW for all
    decoder_lr_scale: float = 2.0
    adversary_lr: float = 1e-4  # of the discriminator, if there is one
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW
    weight_decay: float = 0.0
    # After the warm-up: constant | cosine (falls until the last step) | wsd (falls as 1 - sqrt in
    # the last decay_steps, so that a run can be made longer until then).
    schedule: str = "constant"
    warmup_steps: int = 0  # of a linear rise; the last of them has the full rate
    decay_steps: int = 0  # of wsd
    min_lr_ratio: float = 0.0  # what cosine and wsd fall to, as a share of each rate
    max_grad_norm: float = 1.0
    skip_grad_norm: float | None = None  # steps above are not applied; null: unless not finite
    ema_decay: float = 0.9999
    # With train.snapshot_every: lengths of the averages that others are made of afterwards
    # (`scd ema`), as shares of the training so far (arXiv 2312.02696, section 3).
    ema_sigma_rel: list[float] = field(default_factory=lambda: [0.05, 0.1])


@dataclass
class TrainOptions:
    steps: int = MISSING
    batch_size: int = MISSING  # clips, per process and accumulation step
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str = "auto"  # bf16 where the device has it, else fp32 | bf16 | no
    compile: bool = False  # torch.compile; needs a C++ compiler, on a GPU a C compiler
    workers: int = 2  # data loading processes
    log_every: int = 10
    sample_every: int = 0  # steps between samples and metrics on the validation set; 0: never
    val_loss_every: int = 0  # between losses on held-out clips, by noise level; 0: never
    profile_steps: list[int] = field(default_factory=list)  # the first and the last; empty: none
    save_every: int = 1000
    keep_checkpoints: int = 2
    snapshot_every: int = 0  # steps between snapshots for `scd ema`, which all stay; 0: none
    max_bad_steps: int = 3  # so many in a row that are not applied end the run
    check_weights_every: int = 0  # steps between comparisons over all processes; 0: never
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb
    wandb_project: str = "scd"  # in which a run has the experiment's name


@dataclass
class RolloutOptions:
    steps: int = 50  # a frame
    solver: str = "euler"  # | multistep (second order, as many network passes)
    spacing: str = "reference"  # of the noise levels; its last step does next to nothing | even
    shift: float = 1.0  # of the noise levels: more than 1 takes smaller steps at high noise
    guidance: str = "context"  # | condition | none
    guidance_scale: float = 1.5
    guidance_noise: float = 0.05  # eta of the perturbed context, the negative branch
    # Noise levels with guidance; the steps from other levels cost half.
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    window: int = 0  # newest frames that a frame to come can see; 0: all
    window_first: int = 0  # of the window, for the first frames of the video, which then stay
    compile: bool = False  # the denoising steps: torch.compile, and on CUDA one graph a frame
    precision: str = "fp32"  # | tf32 | bf16 | auto (bf16 where the device has it, else fp32)


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
    # Rows beside the model's; each takes as long to measure as the model's.
    comparisons: list[str] = field(default_factory=lambda: ["repeat", "autoencoder", "other"])
    fvd_precision: str = "fp32"  # | bf16: half the time where the device has it
    windows: int = 0  # of the new frames, each with an FVD of its own; 0: only of whole clips


@dataclass
class Options:
    """One experiment. Results go to `experiments/<name>/`."""

    name: str = MISSING
    task: str = MISSING  # world_model | autoencoder
    seed: int = 0
    init_from: str | None = None  # safetensors to start training from, as `scd split` writes them
    data: DataOptions = field(default_factory=DataOptions)
    autoencoder: AutoencoderOptions = field(default_factory=AutoencoderOptions)
    adversary: AdversaryOptions = field(default_factory=AdversaryOptions)
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


def load_options(path: str | Path, overrides: list[str] | None = None) -> Options:
    """Read an options file and apply `key=value` overrides.

    Raises:
        ScdError: see the module's first lines.
    """
    path = to_read(path)
    try:
        with open(path, "rb") as file:
            written = yaml.load(_bounded(file.read(MAX_BYTES + 1)).decode("utf-8"), _Loader)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ScdError(f"{path}: {why_missing(path, 'options file')}{hint}") from error
    except Exception as error:  # YAML errors of several kinds, unreadable files
        raise ScdError(f"{path}: not a readable options file ({_one_line(error)})") from error
    return _resolve(written, str(path), overrides or [])


def options_from_json(text: str, source: str, overrides: list[str] | None = None) -> Options:
    """Options as a checkpoint carries them, checked like a file's."""
    try:
        written = json.loads(_bounded(text))
    except (ValueError, RecursionError) as error:
        raise ScdError(f"{source}: unreadable options ({_one_line(error)})") from error
    return _resolve(written, source, overrides or [])


def _bounded(text: Bytes) -> Bytes:
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES // 2**10} KiB")
    return text


def options_to_dict(options: Options) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(options))  # type: ignore[return-value]


def options_to_yaml(options: Options) -> str:
    """An options file with every value written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(options))


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars stay text, but for null: the option's type says what they are.

    By itself YAML reads `no` as false, `1.10` as 1.1 and `1e-3` as text. Merge keys (`<<`) work as
    in YAML 1.1: what a section says itself goes before what it takes over.
    """

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            raise yaml.MarkedYAMLError(
                problem="a key stands twice in one section", problem_mark=node.start_mark
            )
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # PyYAML's own takes the first of several merged sections in some versions, and the last in
        # others. Each key is kept once: sections merged many times over stay small.
        taken: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        own = {str(key.value): (key, value) for key, value in node.value if key.tag != _MERGE}
        for key, value in node.value:
            for section in self._merged(value) if key.tag == _MERGE else []:
                self.flatten_mapping(section)
                for pair in section.value:
                    taken.setdefault(str(pair[0].value), pair)
        node.value = list((taken | own).values())

    def _merged(self, node: yaml.Node) -> list[yaml.MappingNode]:
        sections = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(section, yaml.MappingNode) for section in sections):
            raise yaml.MarkedYAMLError(
                problem="<< takes a section, or a list of sections", problem_mark=node.start_mark
            )
        return sections


_MERGE = "tag:yaml.org,2002:merge"
_SPECIAL = ("tag:yaml.org,2002:null", _MERGE)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _SPECIAL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _resolve(written: Any, source: str, overrides: list[str]) -> Options:
    parts = [(source, written)]
    parts += [(f"override {text!r}", _parse_override(text)) for text in overrides]
    merged = OmegaConf.structured(Options)
    for where, part in parts:
        if not isinstance(part, dict):
            raise ScdError(f"{where}: an options file is a mapping of names to values")
        try:
            merged = OmegaConf.merge(merged, _plain(part, Options, where))
        except OmegaConfBaseException as error:
            raise ScdError(f"{where}: {error.full_key}: {_one_line(error)}") from error
        except OverflowError as error:
            raise ScdError(f"{where}: a number is too large ({_one_line(error)})") from error
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ScdError(f"{source}: no value for {', '.join(missing)}")
        options = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ScdError(f"{source}: {error.full_key}: {_one_line(error)}") from error
    assert isinstance(options, Options)
    check(options, source)
    _expand_paths(options)
    return options


def _expand_paths(options: Options) -> None:
    """Expand `~` in every path."""
    for key in PATHS:
        section, _, name = key.rpartition(".")
        part = getattr(options, section) if section else options
        if (text := getattr(part, name)) is not None:
            setattr(part, name, expand(text))


def _parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` as {"a": {"b": value}}."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ScdError(f"override {text!r}: overrides are written key=value")
    try:
        part = yaml.load(value, _Loader)
    except Exception as error:
        raise ScdError(f"override {text!r}: {_one_line(error)}") from error
    for name in reversed(key.strip().split(".")):
        part = {name: part}
    return part


def _plain(part: dict, section: type, where: str, prefix: str = "") -> dict[str, Any]:
    """Values as their options take them (`_as`).

    Raises:
        ScdError: an unknown key, or sections, lists and single values in each other's place.
    """
    plain: dict[str, Any] = {}
    types: dict[Any, Any] = {item.name: item.type for item in fields(section)}
    for key, value in part.items():
        name = f"{prefix}{key}"
        if key not in types:
            raise ScdError(f"{where}: {_unknown_key(name)}")
        if is_dataclass(types[key]):
            if not isinstance(value, dict):
                short = reprlib.repr(value)
                raise ScdError(f"{where}: {name} is a section of options, not {short}")
            plain[key] = _plain(value, types[key], where, f"{name}.")
            continue
        wants_list = get_origin(types[key]) is list
        items = value if wants_list and isinstance(value, list) else [value]
        if any(isinstance(item, str) and "${" in item for item in items):
            # To OmegaConf a reference: to another option, or to the reader's environment.
            raise ScdError(f"{where}: {name} is plain data, which ${{...}} is not")
        if wants_list != isinstance(value, list) or any(isinstance(i, list | dict) for i in items):
            wanted = "a list" if wants_list else "a single value"
            raise ScdError(f"{where}: {name} takes {wanted}, not {reprlib.repr(value)}")
        kinds = get_args(types[key]) or (types[key],)
        plain[key] = [_as(kinds, item) for item in value] if wants_list else _as(kinds, value)
    return plain


def _as(kinds: tuple[type, ...], value: Any) -> Any:
    """Read `1e5` as an integer and `None` as null, where an option takes these."""
    if isinstance(value, str) and NoneType in kinds and value.lower() == "none":
        return None
    if isinstance(value, str) and int in kinds:
        try:
            # Of numbers beyond floats OmegaConf tells that they are none.
            whole = math.isfinite(float(value)) and float(value).is_integer()
            return int(Decimal(value)) if whole else value
        except (ValueError, ArithmeticError):
            return value
    return value


def _unknown_key(key: str) -> str:
    known = list(known_keys(Options))
    if key in known:
        return f"unknown key {key!r}: write sections as nested keys, not with dots"
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    if not near:  # the same last name in another section
        near = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return reason(error)
