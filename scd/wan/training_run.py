"""A Wan in training: what a run writes for others, and its checkpoints read back."""

from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from scd.options import OPTIONS_FILE, Options, options_to_yaml
from scd.wan.from_options import build_wan, with_weights
from scd.wan.network import WanWorldModel
from scd.wan.video_codec import load_video_codec
from scd.wan.wan_pipeline import SCDWanPipeline

TRAINING_FILE = f"training-{OPTIONS_FILE}"  # in an export: all options of the run


def load_pipeline_of_checkpoint(path: Path, options: Options) -> SCDWanPipeline:
    """Load a checkpoint as a pipeline, with the autoencoder at its `autoencoder.path`.

    Args:
        options: as `scd.wan.from_options.options_in` finds them.

    Raises:
        ScdError: a file is missing or damaged, or does not fit.
    """
    codec = load_video_codec(str(options.autoencoder.path))
    with torch.device("meta"):
        model = build_wan(options, codec.channels, codec.downsampling)
    return pipeline_of_run(
        with_weights(model, path, "checkpoint").eval(), codec.autoencoder, options
    )


def pipeline_of_run(
    model: WanWorldModel, autoencoder: AutoencoderKLWan, options: Options
) -> SCDWanPipeline:
    """Make the pipeline of a run's model, which generates as the run's samples are made."""
    rollout = asdict(options.rollout)
    origin = {"source": str(options.output), "rollout": rollout}
    return SCDWanPipeline(model, autoencoder, rollout=rollout, options=origin)


def save_run(pipeline: SCDWanPipeline, options: Options, folder: Path) -> None:
    """Save the pipeline of a run as `scd wan convert` does, with all options beside it."""
    pipeline.save_pretrained(folder)
    (folder / TRAINING_FILE).write_text(options_to_yaml(options), encoding="utf-8")
