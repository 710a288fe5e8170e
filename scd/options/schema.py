"""Every option: its type, its default, what it means, and the values that it takes by itself.

`rules.py` lists the combinations that are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

Guidance = Literal["none", "context", "condition"]
BlockType = Literal["ResBlock", "EfficientViTBlock"]
FvdPrecision = Literal["fp32", "bf16"]
EncoderFrame = Literal["shift", "noise", "joint"]
WanEncoderFrame = Literal["shift", "noise"]
WanFusion = Literal["token_concat", "middle"]
MIN_SIGMA_REL = 1e-4
MAX_SIGMA_REL = 0.28  # a plain mean over all of training has 0.289


def checked(default: Any, holds: Callable[[Any], bool], must: str) -> Any:
    """Declare an option whose value must satisfy a predicate, unless it is null.

    Args:
        must: the requirement, as it ends the sentence "NAME must ...".
    """
    metadata = {"holds": holds, "must": must}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def positive(default: Any) -> Any:
    """Declare an option above 0; in a list, every item is."""
    return checked(default, lambda value: all(n > 0 for n in items(value)), "be above 0")


def not_negative(default: Any) -> Any:
    """Declare an option of 0 or more; in a list, every item is."""
    return checked(default, lambda value: all(n >= 0 for n in items(value)), "not be negative")


def fraction(default: float) -> Any:
    """Declare an option between 0 and 1."""
    return checked(default, lambda value: 0 <= value <= 1, "lie between 0 and 1")


def folder(default: str) -> Any:
    """Declare the path of a folder that an experiment cannot do without."""
    return checked(
        default,
        lambda value: value != "None",
        "be a folder (write ./None if that is its name)",
    )


def items(value: Any) -> list:
    """Return a list as it is, and a single value as a list of one."""
    return value if isinstance(value, list) else [value]


def _is_folder_name(name: str) -> bool:
    return name.isprintable() and "/" not in name and name not in ("", ".", "..")


def _is_project_name(name: str) -> bool:
    return 0 < len(name) <= 128 and name.isprintable() and not set(name) & set("/\\#?%:")


@dataclass
class DataOptions:
    """The clips to train and evaluate on (see `scd.data.lists` for the list files)."""

    root: str = folder(MISSING)  # the folder that all paths in the lists are relative to
    train_list: str = "train.json"  # list of the training clips, relative to root
    val_list: str = "val.json"  # list of the validation clips, relative to root
    # latents: precomputed by `scd encode`. prompts: no videos, the lines of train_list alone.
    source: Literal["video", "latents", "prompts"] = "video"
    frame_size: int = positive(64)  # height and width of the model's frames, in pixels
    frame_width: int | None = positive(None)  # of a Wan, where frames are no squares
    # Scale the shorter side of each video to this many pixels, then crop to frame_size: at random
    # when training on videos, in the center for evaluation and latents. null: no scaling, the
    # videos have frame_size already.
    resize_shorter: int | None = None
    mirror: bool = False  # when training on videos, flip clips horizontally with probability 1/2
    frames: int = positive(16)  # frames per training clip; of a Wan, latent ones
    frame_stride: int = positive(1)  # use every n-th frame of a video
    max_broken_clips: int = not_negative(0)  # unreadable training clips to skip before giving up
    fps: float = positive(8.75)  # frame rate of the videos that are written
    action_names: list[str] = field(default_factory=list)  # for tables and play; may stay empty

    @property
    def frame_sides(self) -> tuple[int, int]:
        """Height and width of the model's frames, in pixels."""
        return self.frame_size, self.frame_width or self.frame_size


@dataclass
class AutoencoderOptions:
    """The autoencoder between pixels and latents: one to load (`path`), or one to train."""

    # A folder in diffusers' format. null: a world model works on pixels, and an autoencoder is
    # trained from scratch with the architecture below: one entry per resolution, highest first.
    path: str | None = None
    latent_channels: int = positive(32)
    encoder_block_types: list[BlockType] = field(default_factory=list)
    encoder_channels: list[int] = positive([])
    encoder_layers: list[int] = not_negative([])
    decoder_block_types: list[BlockType] = field(default_factory=list)
    decoder_channels: list[int] = positive([])
    decoder_layers: list[int] = not_negative([])
    # Norm of the decoder's ResBlocks: rms_norm with SiLU, or batch_norm with ReLU as in the
    # published weights.
    decoder_norm: Literal["batch_norm", "rms_norm"] = "rms_norm"
    lpips_weight: float = not_negative(0.5)  # loss = L1 + lpips_weight * LPIPS
    # To train the decoder of `path` on what it will decode, a world model of its latents: it
    # predicts the last predicted_frames frames of every clip. They and the frame before them are
    # decoded, and compared with the real ones.
    world_model: str | None = None
    predicted_frames: int = positive(3)


@dataclass
class DiscriminatorOptions:
    """A patch discriminator, against which the decoder of `autoencoder.path` is trained."""

    # Weight of the adversarial loss, times VQGAN's adaptive weight. 0: no discriminator.
    weight: float = not_negative(0.0)
    channels: int = positive(64)  # width of the first layer; each further layer doubles it
    # Layers that halve the resolution: with 3, each logit sees 71x71 pixels, with 2 35x35, with 1
    # 17x17.
    layers: int = positive(3)
    # Consecutive frames that it sees at a time; the decoded frames of a clip must divide by them.
    frames: int = positive(1)


@dataclass
class ModelOptions:
    """The network (arXiv 2602.10095, section 4)."""

    # causal_dit: the dense baseline. bidirectional_dit: the teacher of a distillation, which
    # denoises all frames of a clip at once. *_wan: the same of a pretrained text-to-video Wan.
    type: Literal[
        "scd", "causal_dit", "bidirectional_dit", "scd_wan", "causal_wan", "bidirectional_wan"
    ] = "scd"
    patch_size: int = positive(1)  # side of the square of latents that makes one token
    heads: int = positive(16)  # attention heads; the width is 64 * heads, or wan.head_dim * heads
    encoder_layers: int = not_negative(0)  # of scd and scd_wan; 0 for the others
    decoder_layers: int = not_negative(0)  # of scd and scd_wan; 0 for the others
    layers: int = not_negative(0)  # of causal and bidirectional models; 0 for the others
    # How the decoder joins context and noisy tokens: token_concat, token_concat_with_proj, concat,
    # add, or whatever else is in `scd.models.decoder.FUSIONS`, which refuses other names. Of
    # scd_wan: a `WanFusion`.
    fusion: str = "token_concat"
    # What drives a frame: one action out of num_conditions, a vector of num_conditions numbers
    # (several keys at once, a mouse), or one class label per video.
    condition: Literal["none", "action", "action_vector", "label"] = "none"
    num_conditions: int = not_negative(0)  # the null condition does not count
    first_frame: bool = False  # also learn to generate frame 0, without any context
    # What the context of frame i is the encoder's output at. shift: the clean frame i-1, one pass a
    # frame. noise (the paper's, for pretrained weights): frame i, of high noise in training and
    # pure noise in a rollout; the clean frames go into the KV cache in a pass of their own. joint:
    # the same network, whose rollouts make these two passes at once. scd_wan has no joint: its
    # noise makes one pass.
    encoder_frame: EncoderFrame = "shift"
    modulate_context: bool = True  # whether the norm at the encoder's output is modulated
    modulate_output: bool = True  # whether the norm at the decoder's output is modulated

    @property
    def has_actions(self) -> bool:
        """Whether every frame has an action, of either kind."""
        return self.condition in ("action", "action_vector")

    @property
    def is_wan(self) -> bool:
        """Whether the model is of a pretrained Wan's blocks, under a text."""
        return self.type.endswith("_wan")

    @property
    def is_separable(self) -> bool:
        """Whether the model is an encoder and a decoder, not a single stack of layers."""
        return self.type in ("scd", "scd_wan")

    @property
    def is_bidirectional(self) -> bool:
        """Whether the model denoises all frames of a clip at once."""
        return self.type in ("bidirectional_dit", "bidirectional_wan")


@dataclass
class WanOptions:
    """Models of Wan's blocks, beside `model` (see `scd/wan/README.md`); sizes are Wan2.1 1.3B's."""

    head_dim: int = positive(128)  # channels of an attention head
    ffn_dim: int = positive(8960)  # width inside the feed-forward networks
    freq_dim: int = positive(256)  # channels of a noise level's sinusoid
    text_dim: int = positive(4096)  # width of the text encoder's output
    text_length: int = positive(512)  # tokens of a prompt, behind whose end there are zeros
    decoder_first: int = not_negative(5)  # of scd_wan's decoder layers: those from Wan's beginning
    chunk_frames: int = positive(1)  # of causal_wan: frames that are denoised together
    # The prompt that means none: flow.condition_dropout puts it in place of a clip's own, and the
    # teacher's guidance leads away from it. Its embedding must be beside those of the prompts.
    negative_prompt: str = ""


@dataclass
class FlowOptions:
    """The training objective (flow matching)."""

    prediction: Literal["velocity", "data"] = "velocity"  # data: the network predicts clean frames
    # With prediction data: the velocity is a difference divided by sigma, clamped to at least this.
    sigma_min: float = positive(0.05)
    # The frames that the causal encoder sees in training. mixed: each frame is clean with
    # probability clean_fraction, otherwise noisy.
    encoder_input: Literal["clean", "noisy", "mixed"] = "clean"
    clean_fraction: float = fraction(0.1)
    # Two remedies against drift in long rollouts, both for encoder_input clean: noise added to the
    # history, at a level drawn per clip from 0 to this maximum (arXiv 2408.14837) ...
    history_noise_max: float = fraction(0.0)
    # ... and the share of steps whose histories are made anew by the model, frame after frame, out
    # of the real frames under noise of a level in this range (Resampling Forcing, arXiv
    # 2512.15702). At level 1 they are rollouts. The first few frames, and the frames to predict,
    # stay real.
    self_forcing_prob: float = fraction(0.0)
    self_forcing_sigma: list[float] = checked(
        [0.4, 1.0],
        lambda sigma: len(sigma) == 2 and 0 < sigma[0] <= sigma[1] <= 1,
        "be the lowest and the highest noise level, above 0 and up to 1",
    )
    # Given frames at the start of a training clip, of bidirectional models: each draw of the noise
    # has as many as are drawn from the lowest to the highest number.
    prefix_frames: list[int] = not_negative([])
    noise_draws: int = positive(2)  # K: noise draws per frame that share one encoder pass
    context_noise: float = not_negative(0.05)  # eta: strength of the context perturbation
    condition_dropout: float = fraction(0.1)  # probability of training with the null condition
    logit_mean: float = 0.0  # noise levels are sigmoid(N(logit_mean, logit_std))
    logit_std: float = positive(1.0)


@dataclass
class DistillOptions:
    """Post-training of a student, the model at `init_from` (see `scd/distill/README.md`)."""

    # consistency: causal consistency distillation. dmd: distribution matching on own rollouts.
    method: Literal["none", "consistency", "dmd"] = "none"
    # The frozen teacher, a checkpoint or an exported folder; of a Wan, a folder with its
    # transformer. consistency needs a causal model; dmd takes a bidirectional one, which scores
    # clips, or a causal one, which scores every frame after the generated ones before it.
    teacher: str | None = None
    levels: int = positive(48)  # N: noise levels that consistency distillation goes through
    shift: float = positive(5.0)  # timestep shift of the levels; dmd: of those clips are scored at
    # The teacher's guidance, v⁻ + w·(v⁺ - v⁻). 1: none.
    guidance_scale: float = not_negative(1.0)
    # What its guidance leads away from: a weaker model of its kind, for example of an early
    # checkpoint (autoguidance, arXiv 2406.02507). null: from itself under the null condition.
    weak_teacher: str | None = None
    # Of dmd: given frames of a clip, the others are generated.
    context_frames: int = not_negative(16)
    # Of dmd: length of the windows that are generated and scored after their given frames. null:
    # whole clips. Fewer than data.frames: windows begin further into a clip too, and their given
    # frames are then the student's own (streaming long tuning, arXiv 2509.22622).
    window_frames: int | None = positive(None)
    critic_updates: int = positive(5)  # of dmd: updates of the critic for each one of the student
    critic_lr: float = positive(1e-4)  # of dmd: learning rate of the critic
    # Of dmd: whether the student generates its clips as in use. false: from real frames, by teacher
    # forcing, as a control.
    self_rollout: bool = True
    # Of dmd: whether the loss of a frame also teaches how earlier frames were written into the
    # history (arXiv 2607.20368). false: the gradient stops at the KV cache, as in Self-Forcing.
    history_gradient: bool = True
    # Of dmd: weight of the difference of the scores; 0, with an adversarial weight, leaves the
    # student to the discriminator alone.
    matching_weight: float = not_negative(1.0)
    # Of dmd: weight of an adversarial loss, of a head on the teacher's features that tells
    # generated from real clips. 0: no head.
    adversarial_weight: float = not_negative(0.0)
    score_range: list[float] = checked(  # of dmd: lowest and highest noise level to score clips at
        [0.02, 0.98],
        lambda bounds: len(bounds) == 2 and 0 < bounds[0] < bounds[1] <= 1,
        "be the lowest and the highest noise level, above 0 and at most 1",
    )


@dataclass
class OptimOptions:
    """The optimizer, the learning rate schedule and the EMA."""

    lr: float = positive(1e-4)  # peak learning rate of AdamW
    # Learning rate of Muon for the matrices in the blocks. null: AdamW trains everything.
    muon_lr: float | None = positive(None)
    decoder_lr_scale: float = positive(2.0)  # the decoder's learning rates are this many times lr
    discriminator_lr: float = positive(1e-4)  # learning rate of the discriminator
    betas: list[float] = checked(  # of AdamW
        [0.9, 0.999],
        lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "be two numbers from 0 to below 1",
    )
    weight_decay: float = not_negative(0.0)
    # After the warm-up the rate stays constant, falls until the last step (cosine), or falls as
    # 1 - sqrt during the last decay_steps (wsd), so that a run can be extended until then.
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = not_negative(0)  # length of the linear warm-up; its last step has full rate
    decay_steps: int = not_negative(0)  # length of wsd's decay
    min_lr_ratio: float = fraction(0.0)  # where cosine and wsd end, as a share of each rate
    max_grad_norm: float = positive(1.0)  # gradients are clipped to this norm
    # Skip steps whose gradient norm exceeds this. null: skip only those that are not finite.
    skip_grad_norm: float | None = positive(None)
    ema_decay: float = fraction(0.9999)  # of the averaged weights that are validated and exported
    # With train.snapshot_every: lengths of the averages from which `scd ema` makes others
    # afterwards, as shares of the training so far (arXiv 2312.02696, section 3).
    ema_sigma_rel: list[float] = checked(
        [0.05, 0.1],
        lambda widths: (
            0 < len(widths) == len(set(widths))
            and all(MIN_SIGMA_REL <= w <= MAX_SIGMA_REL for w in widths)
        ),
        f"be one or more different numbers in {MIN_SIGMA_REL:g}..{MAX_SIGMA_REL}",
    )


@dataclass
class TrainOptions:
    """The training loop: length, batches, precision, and what is written when."""

    steps: int = positive(MISSING)  # optimizer steps of the whole run
    batch_size: int = positive(MISSING)  # clips per process and accumulation step
    gradient_accumulation: int = positive(1)  # batches per optimizer step
    gradient_checkpointing: bool = False  # recompute activations: less memory, more time
    # auto: bf16 where the device computes it at least as fast as fp32, otherwise fp32.
    mixed_precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False  # torch.compile; needs a C++ compiler on a CPU, a C compiler on a GPU
    workers: int = not_negative(2)  # data loading processes per training process
    log_every: int = positive(10)  # steps between log lines
    # Steps between rollouts on the validation set, with samples and metrics. 0: never.
    sample_every: int = not_negative(0)
    # Steps between losses on validation clips, by noise level. 0: never.
    val_loss_every: int = not_negative(0)
    profile_steps: list[int] = field(default_factory=list)  # first and last step; empty: none
    save_every: int = positive(1000)  # steps between checkpoints
    keep_checkpoints: int = positive(2)  # how many of the newest checkpoints stay on disk
    # Steps between snapshots for `scd ema`, all of which stay on disk. 0: none.
    snapshot_every: int = not_negative(0)
    max_bad_steps: int = positive(3)  # this many skipped steps in a row end the run
    # Steps between checks that all processes have the same weights. 0: never.
    check_weights_every: int = not_negative(0)
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    # The wandb project of the run; the run itself is named after the experiment.
    wandb_project: str = checked(
        "scd",
        _is_project_name,
        "be a possible name of a wandb project (at most 128 characters, none of /\\#?%:)",
    )


@dataclass
class RolloutOptions:
    """How frames are generated."""

    steps: int = positive(50)  # denoising steps per frame
    # multistep: second order, with as many network passes. consistency: for models that were
    # distilled to few steps: each step predicts the clean frame, to which fresh noise is added.
    solver: Literal["euler", "multistep", "consistency"] = "euler"
    # Spacing of the noise levels. diffusers: as FlowMatchEulerDiscreteScheduler has them, evenly
    # from 1 to 0.001 and then 0, so that the last step does next to nothing. even: equal steps
    # from 1 to 0.
    spacing: Literal["diffusers", "even"] = "diffusers"
    shift: float = positive(1.0)  # timestep shift: above 1, smaller steps at high noise
    # Denoising steps of a rollout's first new frame, which later frames build on. 0: as many as
    # `steps`.
    first_frame_steps: int = not_negative(0)
    # Standard deviation of the noise that frames are made from. Below 1: nearer to the expected,
    # less varied.
    temperature: float = positive(1.0)
    # The negative branch: a perturbed context (scd only), or the null condition.
    guidance: Guidance = "context"
    guidance_scale: float = not_negative(1.5)  # 1: no guidance
    guidance_noise: float = not_negative(0.05)  # eta of the perturbed context
    # Noise levels at which guidance applies; steps at other levels cost half.
    guidance_interval: list[float] = checked(
        [0.0, 1.0],
        lambda interval: len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1,
        "be the lowest and the highest noise level, in 0..1",
    )
    # Past frames that a new frame attends to; 0: all of them. Once a learned start (first_frame of
    # an SCD) has slid out, one more takes its place; sink frames keep it.
    window: int = not_negative(0)
    # How many of the window's places the first frames of the video keep for good.
    sink_frames: int = not_negative(0)
    compile: bool = False  # torch.compile of the denoising steps; on CUDA, one graph per frame
    # auto: bf16 where the device computes it at least as fast as fp32, otherwise fp32. With weights
    # in bf16, fp32 counts as auto.
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "fp32"


@dataclass
class EvalOptions:
    """The evaluation protocol: how many videos, of which length, against what."""

    context_frames: int = not_negative(MISSING)  # given frames per video
    new_frames: int = positive(MISSING)  # generated frames per video
    videos: int = positive(256)  # validation clips to evaluate on; of a Wan, at most 4 prompts
    # Predictions per clip: frame metrics take the best of them, FVD their mean.
    trajectories: int = positive(1)
    seeds: list[int] = field(default_factory=lambda: [0])  # one per trajectory
    batch_size: int = positive(16)  # clips generated at a time
    saved_videos: int = not_negative(16)  # how many predictions are kept as mp4 to look at
    swapped_actions: list[int] = field(default_factory=list)  # two actions that a table row swaps
    # Extra rows of the table; each takes as long to measure as the model's own. `other_keys` (two
    # rows) needs clips of `scd record`: the simulator plays on with the keys of other clips.
    comparisons: list[Literal["repeat", "autoencoder", "other", "other_keys"]] = field(
        default_factory=lambda: ["repeat", "autoencoder", "other"]
    )
    # Precision of the FVD network. bf16: half the time where the device has it.
    fvd_precision: FvdPrecision = "fp32"
    # Split the new frames into this many windows, each with an FVD of its own; 0: whole clips only.
    windows: int = not_negative(0)


@dataclass
class Options:
    """One experiment. Results go to `output_root/name`."""

    name: str = checked(MISSING, _is_folder_name, "be a possible name of a folder")
    task: Literal["world_model", "autoencoder"] = MISSING
    seed: int = checked(0, lambda seed: 0 <= seed < 2**63, "lie between 0 and 2^63 - 1")
    # What training starts from: safetensors, as `scd split` writes them, or a folder with a
    # transformer, as `scd wan convert` and an export write it; of an autoencoder its safetensors.
    init_from: str | None = None
    data: DataOptions = field(default_factory=DataOptions)
    autoencoder: AutoencoderOptions = field(default_factory=AutoencoderOptions)
    discriminator: DiscriminatorOptions = field(default_factory=DiscriminatorOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    wan: WanOptions = field(default_factory=WanOptions)
    flow: FlowOptions = field(default_factory=FlowOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    output_root: str = folder("experiments")

    @property
    def output(self) -> Path:
        """The folder of the experiment's checkpoints, logs and results."""
        return Path(self.output_root) / self.name


def known_keys(cls: type = Options, prefix: str = "") -> list[str]:
    """List every option and section by its dotted name."""
    keys = []
    for item in fields(cls):
        keys.append(prefix + item.name)
        if is_dataclass(item.type):
            keys += known_keys(item.type, f"{prefix}{item.name}.")  # type: ignore[arg-type]
    return keys
