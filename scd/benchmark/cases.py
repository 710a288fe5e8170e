"""The cases of the benchmark: those of the table, and those of the plots."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

from scd.options import Guidance, WanEncoderFrame, WanFusion

SIDE, CHANNELS, ACTIONS = 8, 32, 4  # a frame's latents are 8x8 with 32 channels, as for Minecraft


@dataclass(frozen=True)
class RolloutCase:
    """A rollout of one video, timed frame by frame.

    Args:
        encoder_layers: 0 means the dense baseline, with `decoder_layers` layers.
        context: number of context frames.
        capacity: frames that the KV cache has room for; 0: as many as needed.
        prefill: whether to encode the context frames. If not, the cache is filled with noise: a
            frame costs the same, without minutes of prefill.
        frames: to time, after a first frame and a second one as warmup.
    """

    name: str
    heads: int = 16
    encoder_layers: int = 8
    decoder_layers: int = 4
    context: int = 36
    capacity: int = 0
    prefill: bool = True
    steps: int = 10
    guidance: Guidance = "context"
    dtype: str = "float32"
    frames: int = 7


@dataclass(frozen=True)
class TrainCase:
    """Training steps on clips of latents, with `draws` noise draws per frame."""

    name: str
    heads: int = 6
    encoder_layers: int = 4
    decoder_layers: int = 2
    frames: int = 32
    batch: int = 2
    draws: int = 2
    dtype: str = "bfloat16"
    steps: int = 5


@dataclass(frozen=True)
class LongRolloutCase:
    """A rollout at the Doom model's size, much longer than its sliding window."""

    name: str
    frames: int
    window: int = 48
    dtype: str = "float32"


@dataclass(frozen=True)
class DataCase:
    """Clips read through the training's data loader, from a data set made for this.

    Args:
        suffix: of the files: `.safetensors` and `.pt` hold latents, `.mp4` video.
        stored: dtype of the latents on disk.
        frames: per clip.
        clips: files in the data set, of `episode` frames each.
        size: height and width of the video in pixels; latents have a sixteenth of it.
        workers: numbers of workers to time; None: `worker_counts` of all cores.
        seconds: to time each number of workers for, at least.
    """

    name: str
    suffix: str
    stored: str = "float32"
    frames: int = 300
    clips: int = 24
    episode: int = 300
    size: int = 128
    workers: list[int] | None = None
    seconds: float = 3.0


@dataclass(frozen=True, kw_only=True)
class WanCase:
    """Causal Wans of random weights: a latent frame of each in turn, again and again.

    By default of Wan2.1-T2V-1.3B's sizes, split as in the paper.

    Args:
        models: `dense`, and of SCDs `encoder_frame, fusion`.
        height, width: of the pictures, in pixels.
        past: latent frames that a new one sees, through a sliding window.
        steps: numbers of denoising steps.
        frames: to time, after one as warmup, of each model and number of steps.
    """

    name: str
    models: list[str]
    height: int
    width: int
    past: int
    steps: list[int]
    frames: int
    heads: int = 12
    head_dim: int = 128
    ffn_dim: int = 8960
    layers: int = 30
    encoder_layers: int = 25
    decoder_first: int = 5
    decoder_last: int = 5
    text_dim: int = 4096
    text_length: int = 512


@dataclass(frozen=True, kw_only=True)
class WanStreamCase(WanCase):
    """Streams of one such model's pictures, decoded by an autoencoder of random weights.

    Args:
        vae: what differs from diffusers' `AutoencoderKLWan`, by default Wan2.1's.
        starts: streams to begin, after one as warmup, for the time until the first picture.
        compile: of `RolloutOptions`.
    """

    vae: dict[str, Any]
    starts: int
    compile: bool = False


Case = RolloutCase | TrainCase | LongRolloutCase | DataCase | WanCase | WanStreamCase

_SCD = RolloutCase("SCD-M", dtype="bfloat16")
_DENSE = RolloutCase("Causal DiT-M", encoder_layers=0, decoder_layers=12, dtype="bfloat16")


def _variant(case: RolloutCase, **changes: object) -> RolloutCase:
    case = replace(case, **changes)  # type: ignore[arg-type]
    guidance = "" if case.guidance == "none" else ", guidance 1.5"
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[case.dtype]
    name = f"{case.name}, context {case.context}, {case.steps} steps{guidance}, {dtype}"
    return replace(case, name=name)


TABLE: list[Case] = [
    _variant(_SCD, dtype="float32"),
    _variant(_SCD),
    _variant(_SCD, context=144, capacity=300, frames=5),
    _variant(_SCD, context=299, prefill=False, frames=5),
    _variant(_SCD, context=144, steps=50, guidance="none", frames=3),
    _variant(_DENSE, context=144, steps=50, guidance="none", frames=3),
    TrainCase("training, 384 wide, 4+2 layers, 32 frames, batch 2, K = 2, fp32", dtype="float32"),
    TrainCase("training, 384 wide, 4+2 layers, 32 frames, batch 2, K = 2, bf16"),
    LongRolloutCase(
        "2000 frames through a window of 48, 256 wide, 4+2 layers, 4 steps, fp32", 2000
    ),
    DataCase("data: latents, safetensors fp32, 300 frames", ".safetensors"),
    DataCase("data: latents, safetensors bf16, 300 frames", ".safetensors", "bfloat16"),
    DataCase("data: latents, published .pt fp32, 300 frames", ".pt"),
    DataCase("data: video, mp4, 300 frames", ".mp4"),
    DataCase("data: video, mp4, 16 of 300 frames", ".mp4", frames=16),
]
WAN_MODELS = ["dense", *map(", ".join, product(get_args(WanEncoderFrame), get_args(WanFusion)))]
_STREAM: dict[str, Any] = {"height": 480, "width": 832, "past": 20, "steps": [4, 2, 1]}
_STREAM |= {"frames": 20, "vae": {}, "starts": 3}
# They take minutes, or a GPU.
ON_REQUEST: list[Case] = [
    WanCase(
        name="wan, 256x256, 10 past latents",
        models=WAN_MODELS,
        height=256,
        width=256,
        past=10,
        steps=[4, 2, 1],
        frames=3,
    ),
    *(
        WanStreamCase(name=f"wan stream, 832x480, {model}", models=[model], **_STREAM)
        for model in WAN_MODELS
    ),
    WanStreamCase(
        name="wan stream, 832x480, shift, token_concat, compiled",
        models=["shift, token_concat"],
        compile=True,
        **_STREAM,
    ),
]
CONTEXTS = [36, 72, 144, 300, 600, 1000]
STEPS = [1, 2, 5, 10, 20, 50]
_PLOTTED: dict[str, Any] = {"guidance": "none", "prefill": False, "frames": 2}


def by_context(dtype: str) -> list[RolloutCase]:
    """List the cases of the plot of time against context frames."""
    models = (_SCD, _DENSE)
    return [_variant(m, context=n, dtype=dtype, **_PLOTTED) for m in models for n in CONTEXTS]


def by_steps(dtype: str) -> list[RolloutCase]:
    """List the cases of the plot of time against denoising steps."""
    models = (_SCD, _DENSE)
    return [_variant(m, steps=n, dtype=dtype, **_PLOTTED) for m in models for n in STEPS]
