"""What is timed: the cases of the table, and those of the plots."""

from dataclasses import dataclass, replace
from typing import Any

from scd.options import Guidance

SIDE, CHANNELS, ACTIONS = 8, 32, 4  # latents of a frame: 8x8 of 32 channels, as Minecraft's


@dataclass(frozen=True)
class StreamCase:
    """A rollout of one video.

    Args:
        encoder_layers: 0: the dense baseline, of `decoder_layers` layers.
        context: frames before the first new one.
        capacity: frames that the cache has room for; 0: just those that are needed.
        prefill: whether the context is encoded. If not, the cache is filled with noise: a frame
            costs the same, without minutes of prefill.
        frames: timed one by one, after a first one and a second one that warms up.
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
    """Optimiser steps on clips of latents, with K noise draws."""

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
class EndlessCase:
    """A stream of the Doom model's size, longer than its window."""

    name: str
    frames: int
    window: int = 48
    dtype: str = "float32"


@dataclass(frozen=True)
class DataCase:
    """Clips through the loader of training, from a data set of its own.

    Args:
        suffix: of its files: `.safetensors` and `.pt` hold latents, `.mp4` video.
        stored: type of the latents' numbers on disk.
        frames: of a clip.
        clips: in the data set, of `episode` frames each.
        size: of the frames, pixels; latents have a sixteenth of it.
        workers: how many, in turn; None: `worker_counts` of all cores.
        seconds: that each count is timed for, at least.
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


Case = StreamCase | TrainCase | EndlessCase | DataCase

_SCD = StreamCase("SCD-M", dtype="bfloat16")
_DENSE = StreamCase("Causal DiT-M", encoder_layers=0, decoder_layers=12, dtype="bfloat16")


def _named(case: StreamCase, **changes: object) -> StreamCase:
    case = replace(case, **changes)  # type: ignore[arg-type]
    guided = "" if case.guidance == "none" else ", guidance 1.5"
    type_ = {"float32": "fp32", "bfloat16": "bf16"}[case.dtype]
    name = f"{case.name}, context {case.context}, {case.steps} steps{guided}, {type_}"
    return replace(case, name=name)


TABLE: list[Case] = [
    _named(_SCD, dtype="float32"),
    _named(_SCD),
    _named(_SCD, context=144, capacity=300, frames=5),
    _named(_SCD, context=299, prefill=False, frames=5),
    _named(_SCD, context=144, steps=50, guidance="none", frames=3),
    _named(_DENSE, context=144, steps=50, guidance="none", frames=3),
    TrainCase("training, 384 wide, 4+2 layers, 32 frames, batch 2, K = 2, fp32", dtype="float32"),
    TrainCase("training, 384 wide, 4+2 layers, 32 frames, batch 2, K = 2, bf16"),
    EndlessCase("2000 frames through a window of 48, 256 wide, 4+2 layers, 4 steps, fp32", 2000),
    DataCase("data: latents, safetensors fp32, 300 frames", ".safetensors"),
    DataCase("data: latents, safetensors bf16, 300 frames", ".safetensors", "bfloat16"),
    DataCase("data: latents, published .pt fp32, 300 frames", ".pt"),
    DataCase("data: video, mp4, 300 frames", ".mp4"),
    DataCase("data: video, mp4, 16 of 300 frames", ".mp4", frames=16),
]
CONTEXTS = [36, 72, 144, 300, 600, 1000]
STEPS = [1, 2, 5, 10, 20, 50]
_PLOTTED: dict[str, Any] = {"guidance": "none", "prefill": False, "frames": 2}


def by_context(dtype: str) -> list[StreamCase]:
    """List the cases of the plot against context."""
    models = (_SCD, _DENSE)
    return [_named(m, context=n, dtype=dtype, **_PLOTTED) for m in models for n in CONTEXTS]


def by_steps(dtype: str) -> list[StreamCase]:
    """List the cases of the plot against denoising steps."""
    models = (_SCD, _DENSE)
    return [_named(m, steps=n, dtype=dtype, **_PLOTTED) for m in models for n in STEPS]
