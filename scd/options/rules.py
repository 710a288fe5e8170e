"""Which option values can work, alone and together; all others are refused before a run starts."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from scd.errors import ScdError, did_you_mean
from scd.options.distill_rules import DISTILLATION
from scd.options.schema import AutoencoderOptions, Options, RolloutOptions, items
from scd.options.wan_rules import NO_WAN, WAN, Rule

ROLLOUT: list[Rule] = [
    (
        lambda o: o.rollout.sink_frames < max(o.rollout.window, 1),
        "rollout.sink_frames={rollout.sink_frames} must lie below rollout.window={rollout.window}",
    ),
]

COMMON: list[Rule] = [
    *ROLLOUT,
    (
        lambda o: not o.train.profile_steps or _are_steps(o.train.profile_steps, o.train.steps),
        "train.profile_steps={train.profile_steps}: the first and the last step to profile, from 1 "
        "to train.steps={train.steps}",
    ),
    (
        lambda o: len(o.eval.seeds) == o.eval.trajectories,
        "eval.seeds={eval.seeds} for eval.trajectories={eval.trajectories}: each trajectory "
        "needs one seed",
    ),
    (
        lambda o: not o.eval.swapped_actions or _are_two_actions(o),
        "eval.swapped_actions={eval.swapped_actions}: two different actions (or components of "
        "action_vector) below model.num_conditions, of a model with model.condition=action or "
        "action_vector; [] swaps none",
    ),
    (
        lambda o: o.data.resize_shorter is None or o.data.resize_shorter >= min(o.data.frame_sides),
        "data.resize_shorter={data.resize_shorter} leaves too little for "
        "data.frame_size={data.frame_size} and data.frame_width={data.frame_width}",
    ),
    (
        lambda o: not (o.data.mirror and o.model.has_actions),
        "data.mirror contradicts model.condition={model.condition}: left and right "
        "would be swapped",
    ),
    (
        lambda o: not (o.data.mirror and o.data.source == "latents"),
        "data.mirror needs data.source=video: latents are encoded once, as they are",
    ),
    (
        lambda o: (o.optim.decay_steps > 0) == (o.optim.schedule == "wsd"),
        "optim.decay_steps={optim.decay_steps} with optim.schedule={optim.schedule}: only wsd "
        "has such steps, and it needs some",
    ),
    (
        lambda o: (
            o.optim.schedule != "wsd" or o.optim.warmup_steps + o.optim.decay_steps <= o.train.steps
        ),
        "optim.warmup_steps={optim.warmup_steps} and optim.decay_steps={optim.decay_steps} are "
        "more than train.steps={train.steps}",
    ),
    (
        lambda o: o.optim.min_lr_ratio == 0 or o.optim.schedule != "constant",
        "optim.min_lr_ratio={optim.min_lr_ratio}: optim.schedule=constant never falls",
    ),
]

WORLD_MODEL: list[Rule] = [
    (
        lambda o: (o.model.encoder_layers > 0) == o.model.is_separable,
        "model.encoder_layers={model.encoder_layers} contradicts model.type={model.type}: scd "
        "needs it above 0, and scd_wan; the others need 0",
    ),
    (
        lambda o: (o.model.decoder_layers > 0) == o.model.is_separable,
        "model.decoder_layers={model.decoder_layers} contradicts model.type={model.type}: scd "
        "needs it above 0, and scd_wan; the others need 0",
    ),
    (
        lambda o: (o.model.layers > 0) != o.model.is_separable,
        "model.layers={model.layers} contradicts model.type={model.type}: causal and "
        "bidirectional models need it above 0, scd has encoder_layers and decoder_layers",
    ),
    (
        lambda o: o.model.is_separable or o.model.encoder_frame == "shift",
        "model.encoder_frame={model.encoder_frame} contradicts model.type={model.type}: only an "
        "scd has an encoder",
    ),
    (
        lambda o: o.model.is_separable or o.rollout.guidance != "context",
        "rollout.guidance=context contradicts model.type={model.type}: it has no separate context",
    ),
    (
        lambda o: o.model.is_separable or not o.rollout.compile,
        "rollout.compile contradicts model.type={model.type}: only an scd's steps see a single "
        "frame",
    ),
    (
        lambda o: (o.model.condition == "none") == (o.model.num_conditions == 0),
        "model.condition={model.condition} contradicts model.num_conditions={model.num_conditions}",
    ),
    (
        lambda o: (
            o.rollout.guidance != "condition" or o.model.condition != "none" or o.model.is_wan
        ),
        "rollout.guidance=condition contradicts model.condition=none",
    ),
    (
        lambda o: o.flow.history_noise_max == 0 or o.flow.encoder_input == "clean",
        "flow.history_noise_max={flow.history_noise_max} needs flow.encoder_input=clean, not "
        "{flow.encoder_input}",
    ),
    (
        lambda o: o.flow.self_forcing_prob == 0 or o.flow.encoder_input == "clean",
        "flow.self_forcing_prob={flow.self_forcing_prob} needs flow.encoder_input=clean, not "
        "{flow.encoder_input}",
    ),
    (
        lambda o: o.model.is_bidirectional == bool(o.flow.prefix_frames),
        "flow.prefix_frames={flow.prefix_frames} with model.type={model.type}: a bidirectional "
        "model needs the lowest and the highest number, the others have none",
    ),
    (
        lambda o: not o.flow.prefix_frames or _are_prefixes(o.flow.prefix_frames, o.data.frames),
        "flow.prefix_frames={flow.prefix_frames}: the lowest and the highest number of given "
        "frames, below data.frames={data.frames}",
    ),
    (
        lambda o: min(o.flow.prefix_frames, default=1) > 0 or o.model.first_frame,
        "flow.prefix_frames={flow.prefix_frames}: without given frames, model.first_frame=true",
    ),
    (
        lambda o: not o.model.is_bidirectional or o.rollout.first_frame_steps == 0,
        "rollout.first_frame_steps={rollout.first_frame_steps}: {model.type} denoises all new "
        "frames at once, and needs 0",
    ),
    (
        lambda o: not o.model.is_bidirectional or o.flow.encoder_input == "clean",
        "flow.encoder_input={flow.encoder_input}: {model.type} has no encoder",
    ),
    (
        lambda o: (
            not o.model.is_bidirectional
            or o.flow.history_noise_max == o.flow.self_forcing_prob == 0
        ),
        "flow.history_noise_max and flow.self_forcing_prob: {model.type} has no history",
    ),
    (
        lambda o: (
            not o.model.is_bidirectional
            or o.eval.context_frames + o.eval.new_frames <= o.data.frames
        ),
        "eval.context_frames={eval.context_frames} and eval.new_frames={eval.new_frames} are more "
        "than data.frames={data.frames}, which a {model.type} denoises at once",
    ),
    (
        lambda o: o.eval.context_frames > 0 or o.model.first_frame,
        "eval.context_frames=0 needs model.first_frame=true: frame 0 must have been learned",
    ),
    (
        lambda o: o.data.frames >= 2,
        "data.frames={data.frames}: a world model needs at least 2 frames per clip",
    ),
    (
        lambda o: o.data.frame_stride == 1 or not o.model.has_actions,
        "data.frame_stride must be 1 with model.condition={model.condition}: skipped actions would "
        "be lost",
    ),
    (
        lambda o: o.data.source == "video" or o.autoencoder.path is not None,
        "data.source=latents needs autoencoder.path, to see pixels again",
    ),
    (
        lambda o: o.discriminator.weight == 0,
        "discriminator.weight={discriminator.weight}: only task autoencoder has a discriminator",
    ),
    (
        lambda o: o.autoencoder.world_model is None,
        "autoencoder.world_model={autoencoder.world_model}: only task autoencoder trains a decoder",
    ),
]

AUTOENCODER: list[Rule] = [
    *NO_WAN,
    (lambda o: o.data.source == "video", "task autoencoder needs data.source=video"),
    (
        lambda o: o.distill.method == "none",
        "distill.method={distill.method}: only task world_model is distilled",
    ),
    (
        lambda o: o.optim.muon_lr is None,
        "optim.muon_lr: only task world_model has blocks with matrices for Muon",
    ),
    (
        lambda o: not o.train.gradient_checkpointing,
        "train.gradient_checkpointing: only task world_model can",
    ),
    (
        lambda o: o.train.val_loss_every == 0,
        "train.val_loss_every: only task world_model has a loss by noise level",
    ),
    (
        lambda o: o.train.snapshot_every == 0,
        "train.snapshot_every: `scd ema` averages world models, not autoencoders",
    ),
]


def _stages(side: Literal["encoder", "decoder"]) -> list[Rule]:
    """List the rules for the stages of an autoencoder that is built from scratch."""

    def part(o: Options, name: str) -> list:
        return getattr(o.autoencoder, f"{side}_{name}")

    return [
        (
            lambda o: (
                0
                < len(part(o, "block_types"))
                == len(part(o, "channels"))
                == len(part(o, "layers"))
            ),
            f"autoencoder.{side}_block_types, _channels and _layers need one entry per stage",
        ),
        (
            lambda o: part(o, "channels")[-1] % o.autoencoder.latent_channels == 0,
            f"autoencoder.{side}_channels={{autoencoder.{side}_channels}}: the last must be a "
            f"multiple of autoencoder.latent_channels={{autoencoder.latent_channels}}",
        ),
    ]


TRAINING: list[Rule] = [  # of world models; they do not bind their use
    (
        lambda o: (
            o.rollout.guidance != "condition"
            or o.rollout.guidance_scale == 1
            or o.model.is_wan
            or o.distill.method != "none"
            or 0 < o.flow.condition_dropout < 1
        ),
        "rollout.guidance=condition needs both the condition and the null condition, which "
        "flow.condition_dropout={flow.condition_dropout} does not train; begin with 0.1",
    ),
    (
        lambda o: (
            not o.model.has_actions or len(o.data.action_names) in (0, o.model.num_conditions)
        ),
        "data.action_names={data.action_names} for model.num_conditions={model.num_conditions}: "
        "name all, or none",
    ),
]

FIRST_STAGE: list[Rule] = [
    (
        lambda o: o.discriminator.weight == 0,
        "discriminator.weight={discriminator.weight} needs autoencoder.path, a trained "
        "autoencoder: its encoder is frozen",
    ),
    (
        lambda o: o.autoencoder.world_model is None,
        "autoencoder.world_model={autoencoder.world_model} needs autoencoder.path, the autoencoder "
        "of its latents",
    ),
    *_stages("encoder"),
    *_stages("decoder"),
    (
        lambda o: len(o.autoencoder.encoder_channels) == len(o.autoencoder.decoder_channels),
        "autoencoder.encoder_channels and decoder_channels need equally many stages",
    ),
    (
        lambda o: o.data.frame_size % 2 ** (len(o.autoencoder.encoder_channels) - 1) == 0,
        "data.frame_size={data.frame_size} is not divisible by the downsampling of the "
        "autoencoder, a factor of 2 after each stage but the last: "
        "autoencoder.encoder_channels={autoencoder.encoder_channels}",
    ),
]

DECODER_STAGE: list[Rule] = [
    (
        lambda o: o.discriminator.weight > 0 or o.autoencoder.world_model is not None,
        "autoencoder.path in task autoencoder is what the decoder's stage starts from, but nothing "
        "to train it with is named: autoencoder.world_model is null, discriminator.weight is 0",
    ),
    (
        lambda o: o.init_from is None,
        "init_from with autoencoder.path: this stage starts from autoencoder.path",
    ),
    *(
        (
            lambda o, key=key: getattr(o.autoencoder, key) == getattr(AutoencoderOptions(), key),
            f"autoencoder.{key}: the decoder's stage keeps the sizes of {{autoencoder.path}}; "
            f"leave it out",
        )
        for key in (
            *("latent_channels", "encoder_block_types", "encoder_channels", "encoder_layers"),
            *("decoder_block_types", "decoder_channels", "decoder_layers", "decoder_norm"),
        )
    ),
    (
        lambda o: not (o.train.compile and o.discriminator.weight),
        "train.compile with discriminator.weight: the adaptive weight needs gradients that a "
        "compiled decoder does not give",
    ),
    (
        lambda o: o.discriminator.channels % 8 == 0,
        "discriminator.channels={discriminator.channels} must be a multiple of 8, the groups of "
        "its norms",
    ),
    (
        lambda o: o.data.frame_size >> o.discriminator.layers >= 3,
        "discriminator.layers={discriminator.layers}: too many for frames of {data.frame_size} "
        "pixels",
    ),
    (
        lambda o: o.autoencoder.world_model is None or _decoded_frames(o) <= o.data.frames,
        "autoencoder.predicted_frames={autoencoder.predicted_frames}: as many as data.frames="
        "{data.frames} or more, but a prediction needs a frame before it",
    ),
    (
        lambda o: not o.discriminator.weight or _decoded_frames(o) % o.discriminator.frames == 0,
        "discriminator.frames={discriminator.frames} does not divide the decoded frames of a clip: "
        "data.frames={data.frames}; or with autoencoder.world_model, 1 + autoencoder."
        "predicted_frames={autoencoder.predicted_frames}",
    ),
]


def check(options: Options, source: str) -> None:
    """Refuse options that no model can have.

    Raises:
        ScdError: naming the source and the first value or pair of values that is wrong.
    """
    _raise_first(_wrong_values(options), source)
    if options.task == "world_model":
        rules = [*COMMON, *WORLD_MODEL, *(WAN if options.model.is_wan else NO_WAN)]
    elif options.autoencoder.path is None:
        rules = [*COMMON, *AUTOENCODER, *FIRST_STAGE]
    else:
        rules = [*COMMON, *AUTOENCODER, *DECODER_STAGE]
    _raise_first(_broken(rules, options), source)


def check_training(options: Options, source: str) -> None:
    """Refuse options that a model could be used with, but not be trained.

    Raises:
        ScdError: as `check` does.
    """
    if options.task == "world_model":
        _raise_first(_broken(TRAINING + DISTILLATION, options), source)


def check_rollout(rollout: RolloutOptions) -> None:
    """Refuse settings of a rollout that cannot work.

    Raises:
        ScdError: a value out of range, an unknown choice, or two that contradict each other.
    """
    _raise_first(_wrong_values(rollout, "rollout."))
    _raise_first(_broken(ROLLOUT, Options(rollout=rollout)))


def choices(kind: Any) -> tuple:
    """List what a `Literal` type, or a list of one, can be; empty for other types."""
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    return get_args(kind) if get_origin(kind) is Literal else ()


def wrong_choice(key: str, kind: Any, value: Any) -> str | None:
    """Say which item of a value is none of its type's choices, and which one is nearest."""
    known = choices(kind)
    wrong = [one for one in items(value) if known and one not in known]
    if not wrong:
        return None
    has, hint = "has" if isinstance(value, list) else "is", did_you_mean(str(wrong[0]), known)
    return f"{key} {has} {wrong[0]!r}, not one of {', '.join(known)}{hint}"


def _wrong_values(section: Any, prefix: str = "") -> Iterator[str]:
    """Go through a section and those in it, and describe each value that cannot work by itself."""
    for item in fields(section):
        key, value = f"{prefix}{item.name}", getattr(section, item.name)
        if is_dataclass(value):
            yield from _wrong_values(value, f"{key}.")
        else:
            yield from _wrong_value(key, item, value)


def _wrong_value(key: str, item: Field, value: Any) -> Iterator[str]:
    if message := wrong_choice(key, item.type, value):
        yield message
    for one in items(value):
        if isinstance(one, float) and not math.isfinite(one):
            yield f"{key} must be finite, but is {value}"
        if isinstance(one, str) and "\0" in one:
            yield f"{key} has a zero byte: {value!r}"
        if isinstance(one, str) and any("\ud800" <= letter <= "\udfff" for letter in one):
            yield f"{key} is not UTF-8: {value!r}"
    if "holds" in item.metadata and value is not None and not item.metadata["holds"](value):
        yield f"{key} must {item.metadata['must']}, but is {value!r}"


def _broken(rules: Iterable[Rule], options: Options) -> Iterator[str]:
    return (message.format(**vars(options)) for holds, message in rules if not holds(options))


def _raise_first(problems: Iterator[str], source: str | None = None) -> None:
    for problem in problems:
        raise ScdError(f"{source}: {problem}" if source else problem)


def _decoded_frames(o: Options) -> int:
    predicted = o.autoencoder.world_model is not None
    return 1 + o.autoencoder.predicted_frames if predicted else o.data.frames


def _are_steps(profiled: list[int], steps: int) -> bool:
    return len(profiled) == 2 and 0 < profiled[0] <= profiled[1] <= steps


def _are_prefixes(numbers: list[int], frames: int) -> bool:
    return len(numbers) == 2 and numbers[0] <= numbers[1] < frames


def _are_two_actions(o: Options) -> bool:
    pair, known = o.eval.swapped_actions, o.model.num_conditions
    different = len(pair) == len(set(pair)) == 2
    return o.model.has_actions and different and all(0 <= action < known for action in pair)
