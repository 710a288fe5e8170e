"""Build what an experiment trains, and the codec of its latents: the house's own, or Wan's."""

from pathlib import Path
from typing import TypeAlias

from torch import nn

from scd.errors import ScdError, naming_option
from scd.flow.objective import FlowObjective, JointObjective
from scd.models.autoencoder import Codec, load_codec
from scd.models.load import build_world_model, refuse_other_prediction
from scd.models.weights import load_matching, read_all_weights
from scd.models.world_model import CausalWorldModel, WorldModel
from scd.options import FlowOptions, Options
from scd.rollout.resampling import ResamplingObjective
from scd.training.checkpoint import start_is_lost
from scd.wan.from_options import build_wan
from scd.wan.video_codec import WanCodec, load_video_codec

AnyCodec: TypeAlias = Codec | WanCodec


def build_codec(options: Options) -> AnyCodec:
    """Load the autoencoder of an experiment.

    Raises:
        ScdError: it is missing, damaged or of another kind.
    """
    if options.model.is_wan:
        return load_video_codec(str(options.autoencoder.path))
    return load_codec(options.autoencoder.path)


def build_network(options: Options, codec: AnyCodec) -> WorldModel:
    """Build a fresh model of the options' kind and sizes.

    Raises:
        ScdError: the frames do not divide into latents and patches.
    """
    if isinstance(codec, WanCodec):
        return build_wan(options, codec.channels, codec.downsampling)
    return build_world_model(options, codec)


def start_from(options: Options, network: nn.Module) -> None:
    """Load the weights at `init_from` into a network, if there are any, and they are needed.

    Raises:
        ScdError: they are missing, damaged, or of another model.
    """
    path = options.init_from
    if path is None or start_is_lost(options):
        return
    with naming_option("init_from"):
        if options.task == "world_model":
            refuse_other_prediction(Path(path), options)
        load_matching(network, read_all_weights(Path(path)), path)


def latent_shape(codec: AnyCodec, options: Options) -> tuple[int, int, int]:
    """Compute the shape (C, h, w) of one frame's latents.

    Raises:
        ScdError: the frame size does not divide by the downsampling.
    """
    height, width = options.data.frame_sides
    if height % codec.downsampling or width % codec.downsampling:
        raise ScdError(
            f"data.frame_size={options.data.frame_size} does not divide by {codec.downsampling}, "
            f"the downsampling of {options.autoencoder.path}; or data.frame_width={width}"
        )
    return codec.channels, height // codec.downsampling, width // codec.downsampling


def latent_frames(codec: AnyCodec, pictures: int) -> int:
    """Count the latent frames of a video, whose first is of one picture."""
    return 1 + (pictures - 1) // codec.frames_per_latent


def make_objective(model: WorldModel, options: FlowOptions, seed: int) -> FlowObjective:
    """Make the objective of teacher forcing for the model's kind."""
    if not isinstance(model, CausalWorldModel):
        return JointObjective(model, options, seed)
    kind = ResamplingObjective if options.self_forcing_prob else FlowObjective
    return kind(model, options, seed)
