"""Which option values and pairs of values can work; everything else is refused before a run."""

import difflib
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from scd.errors import ScdError

if TYPE_CHECKING:
    from scd.options import Options, RolloutOptions

CHOICES = {
    "task": ("world_model", "autoencoder"),
    "data.source": ("video", "latents"),
    "model.type": ("scd", "causal_dit"),
    "autoencoder.decoder_norm": ("batch_norm", "rms_norm"),
    "model.fusion": ("token_concat", "token_concat_with_proj", "concat", "add"),
    "model.condition": ("none", "action", "action_vector", "label"),
    "flow.prediction": ("velocity", "data"),
    "flow.encoder_input": ("clean", "noisy", "mixed"),
    "optim.schedule": ("constant", "cosine", "wsd"),
    "train.mixed_precision": ("auto", "bf16", "no"),
    "rollout.guidance": ("none", "context", "condition"),
    "rollout.solver": ("euler", "multistep"),
    "rollout.spacing": ("reference", "even"),
    "rollout.precision": ("auto", "fp32", "tf32", "bf16"),
    "eval.fvd_precision": ("fp32", "bf16"),
}
BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")
POSITIVE = [
    "autoencoder.latent_channels",
    "adversary.channels",
    "adversary.layers",
    "data.frame_size",
    "data.frames",
    "data.frame_stride",
    "data.fps",
    "model.patch_size",
    "model.heads",
    "flow.sigma_min",
    "flow.noise_draws",
    "flow.logit_std",
    "optim.lr",
    "optim.decoder_lr_scale",
    "optim.adversary_lr",
    "optim.max_grad_norm",
    "train.steps",
    "train.batch_size",
    "train.gradient_accumulation",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.max_bad_steps",
    "rollout.steps",
    "rollout.shift",
    "eval.new_frames",
    "eval.videos",
    "eval.trajectories",
    "eval.batch_size",
]
NOT_NEGATIVE = [
    "seed",
    "data.max_broken_clips",
    "model.encoder_layers",
    "model.decoder_layers",
    "model.layers",
    "eval.context_frames",
    "model.num_conditions",
    "flow.context_noise",
    "optim.weight_decay",
    "optim.warmup_steps",
    "optim.decay_steps",
    "train.workers",
    "train.sample_every",
    "train.val_loss_every",
    "train.snapshot_every",
    "train.check_weights_every",
    "rollout.guidance_scale",
    "rollout.guidance_noise",
    "rollout.window",
    "rollout.window_first",
    "eval.saved_videos",
    "eval.windows",
    "autoencoder.lpips_weight",
    "adversary.weight",
]
FRACTIONS = [
    "flow.clean_fraction",
    "flow.history_noise",
    "flow.own_history",
    "flow.condition_dropout",
    "optim.min_lr_ratio",
    "optim.ema_decay",
]
MAX_SIGMA_REL = 0.28  # a plain mean over all of training has 0.289
FOLDERS = ("data.root", "output_root")
COMPARISONS = ("repeat", "autoencoder", "other")
TRACKERS = ("tensorboard", "wandb")


Require = Callable[[bool, str], None]
"""Of a condition and what to say where it is not met."""


def check_rollout(rollout: "RolloutOptions") -> None:
    """Refuse settings of a rollout that cannot work.

    Raises:
        ScdError: a value out of range, an unknown word, or two that contradict each other.
    """

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ScdError(message)

    for field in fields(rollout):
        _check_value(f"rollout.{field.name}", getattr(rollout, field.name), require)
    _check_rollout_pairs(rollout, require)


def _check_value(key: str, value: Any, require: Require) -> None:
    """What one value must be by itself."""
    if key in CHOICES:
        near = difflib.get_close_matches(str(value), CHOICES[key], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(CHOICES[key])
        require(value in CHOICES[key], f"{key} is {value!r}, not one of {known}{hint}")
    values = value if isinstance(value, list) else [value]
    floats = [one for one in values if isinstance(one, float)]
    require(all(map(math.isfinite, floats)), f"{key} must be finite, not {value}")
    texts = [one for one in values if isinstance(one, str)]
    require(not any("\0" in text for text in texts), f"{key} has a zero byte: {values!r}")
    halves = [text for text in texts if any("\ud800" <= letter <= "\udfff" for letter in text)]
    require(not halves, f"{key} is not UTF-8: {halves}")
    if key in FOLDERS:
        require(value != "None", f"{key} is None: it needs a folder (./None, if it is called so)")
    if key in POSITIVE:
        require(value > 0, f"{key} must be above 0, not {value}")
    if key in NOT_NEGATIVE:
        require(value >= 0, f"{key} must not be negative, but is {value}")
    if key in FRACTIONS:
        require(0 <= value <= 1, f"{key} must lie between 0 and 1, not {value}")


def _check_rollout_pairs(rollout: "RolloutOptions", require: Require) -> None:
    interval = rollout.guidance_interval
    require(
        len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1,
        f"rollout.guidance_interval={interval}: the lowest and the highest noise level, in 0..1",
    )
    require(
        rollout.window_first < max(rollout.window, 1),
        f"rollout.window_first={rollout.window_first} must lie below rollout.window="
        f"{rollout.window}",
    )


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

    for key in known_keys(type(options)):
        _check_value(key, get(key), require)
    _check_rollout_pairs(options.rollout, require)
    skip = options.optim.skip_grad_norm
    require(skip is None or skip > 0, f"optim.skip_grad_norm must be above 0, not {skip}")
    for key, chosen, known in (
        ("train.trackers", options.train.trackers, TRACKERS),
        ("eval.comparisons", options.eval.comparisons, COMPARISONS),
    ):
        for one in chosen:
            require(one in known, f"{key}: unknown {one!r}; known: {', '.join(known)}")
    profiled, project = options.train.profile_steps, options.train.wandb_project
    require(
        not profiled
        or (len(profiled) == 2 and 0 < profiled[0] <= profiled[1] <= options.train.steps),
        f"train.profile_steps={profiled}: the first and the last step of those to profile, of 1 to "
        f"train.steps={options.train.steps}",
    )
    require(
        0 < len(project) <= 128 and project.isprintable() and not set(project) & set("/\\#?%:"),
        f"train.wandb_project must do as the name of a wandb project (128 characters at most, "
        f"none of /\\#?%:), but is {project!r}",
    )
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
            model.has_actions
            and len(pair) == len(set(pair)) == 2
            and all(0 <= action < model.num_conditions for action in pair)
        ),
        f"eval.swapped_actions={pair}: two different actions (or components of action_vector) "
        f"below model.num_conditions, of a model with model.condition=action or action_vector",
    )
    require(
        data.resize_shorter is None or data.resize_shorter >= data.frame_size,
        f"data.resize_shorter={data.resize_shorter} leaves too little for data.frame_size="
        f"{data.frame_size}",
    )
    require(
        not (data.mirror and model.has_actions),
        f"data.mirror contradicts model.condition={model.condition}: left and right would change "
        f"places",
    )
    require(
        not (data.mirror and data.source == "latents"),
        "data.mirror needs data.source=video: latents are encoded once, as they are",
    )
    require(
        options.init_from is None or options.task == "world_model",
        "init_from: only task world_model starts from given weights",
    )
    _check_schedule(options, require)
    _check_snapshots(options, require)
    muon_lr = options.optim.muon_lr
    require(muon_lr is None or muon_lr > 0, f"optim.muon_lr must be above 0, not {muon_lr}")
    require(
        muon_lr is None or options.task == "world_model",
        "optim.muon_lr: only task world_model has blocks with matrices for Muon",
    )
    require(
        options.train.val_loss_every == 0 or options.task == "world_model",
        "train.val_loss_every: only task world_model has a loss by noise level",
    )
    if options.task == "autoencoder":
        a = options.autoencoder
        require(data.source == "video", "task autoencoder needs data.source=video")
        if options.adversary.weight:
            _check_adversarial_stage(options, require)
            return
        require(
            a.path is None,
            "autoencoder.path in task autoencoder is what the adversarial stage starts from, "
            "but adversary.weight is 0",
        )
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
    dense = model.type == "causal_dit"
    wanted = {"encoder_layers": not dense, "decoder_layers": not dense, "layers": dense}
    for key, above_0 in wanted.items():
        found = getattr(model, key)
        needed = "above 0" if above_0 else "to be 0"
        require(
            (found > 0) == above_0,
            f"model.{key} is {found}, but model.type={model.type} needs it {needed}",
        )
    require(
        not (dense and options.rollout.guidance == "context"),
        "rollout.guidance=context contradicts model.type=causal_dit, which has no separate context",
    )
    for key in ("flow.history_noise", "flow.own_history"):
        require(
            get(key) == 0 or options.flow.encoder_input == "clean",
            f"{key}={get(key)} needs flow.encoder_input=clean, not {options.flow.encoder_input}",
        )
    require(
        not (dense and options.rollout.compile),
        "rollout.compile contradicts model.type=causal_dit: its steps see a growing past",
    )
    require(options.adversary.weight == 0, "adversary.weight: only task autoencoder has one")
    require(
        evaluation.context_frames > 0 or model.first_frame,
        "eval.context_frames=0 needs model.first_frame=true: frame 0 must have been learned",
    )
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
        not (model.has_actions and data.frame_stride != 1),
        f"data.frame_stride must be 1 with model.condition={model.condition}: skipped actions "
        f"would be lost",
    )
    require(
        not (data.source == "latents" and options.autoencoder.path is None),
        "data.source=latents needs autoencoder.path, to see pixels again",
    )


def _check_schedule(options: "Options", require: Require) -> None:
    o, steps = options.optim, options.train.steps
    require(
        (o.decay_steps > 0) == (o.schedule == "wsd"),
        f"optim.decay_steps={o.decay_steps} with optim.schedule={o.schedule}: wsd needs it above "
        f"0, the others have none",
    )
    require(
        o.schedule != "wsd" or o.warmup_steps + o.decay_steps <= steps,
        f"optim.warmup_steps={o.warmup_steps} and optim.decay_steps={o.decay_steps} are more than "
        f"train.steps={steps}",
    )
    require(
        o.min_lr_ratio == 0 or o.schedule != "constant",
        f"optim.min_lr_ratio={o.min_lr_ratio}: optim.schedule=constant falls to nothing",
    )


def _check_snapshots(options: "Options", require: Require) -> None:
    widths = options.optim.ema_sigma_rel
    require(
        0 < len(widths) == len(set(widths)) and all(0 < width <= MAX_SIGMA_REL for width in widths),
        f"optim.ema_sigma_rel={widths}: one or more different numbers above 0, at most "
        f"{MAX_SIGMA_REL}",
    )
    require(
        options.train.snapshot_every == 0 or options.task == "world_model",
        "train.snapshot_every: `scd ema` averages world models, not autoencoders",
    )


def _check_adversarial_stage(options: "Options", require: Callable[[bool, str], None]) -> None:
    a, adversary, size = options.autoencoder, options.adversary, options.data.frame_size
    require(
        a.path is not None,
        f"adversary.weight={adversary.weight} needs autoencoder.path, a trained autoencoder: its "
        f"encoder is frozen",
    )
    written = [
        f"autoencoder.{side}_{part}"
        for side in ("encoder", "decoder")
        for part in ("block_types", "channels", "layers")
        if getattr(a, f"{side}_{part}")
    ]
    require(
        not written,
        f"{', '.join(written)}: the adversarial stage keeps the sizes of {a.path}; leave them out",
    )
    require(
        not options.train.compile,
        "train.compile with adversary.weight: the adaptive weight needs gradients that a compiled "
        "decoder does not give",
    )
    require(
        adversary.channels % 8 == 0,
        f"adversary.channels={adversary.channels} must divide by 8, the groups of its norms",
    )
    require(
        size // 2**adversary.layers >= 3,
        f"adversary.layers={adversary.layers}: too many for frames of {size} pixels",
    )


def known_keys(cls: type, prefix: str = "") -> Any:
    for item in fields(cls):
        name = prefix + item.name
        yield name
        if is_dataclass(item.type):
            yield from known_keys(item.type, name + ".")  # type: ignore[arg-type]
