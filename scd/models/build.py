"""From options to a fresh world model."""

from scd.errors import ScdError
from scd.models.autoencoder import Codec
from scd.models.causal_dit import CausalDiT
from scd.models.scd import SCD
from scd.models.world_model import WorldModel
from scd.options import Options


def build_world_model(options: Options, codec: Codec) -> WorldModel:
    """A fresh model of the options' kind and sizes, for the codec's latents.

    Raises:
        ScdError: the frames do not divide into latents and patches.
    """
    m = options.model
    cell = codec.downsampling * m.patch_size
    if options.data.frame_size % cell:
        raise ScdError(
            f"data.frame_size={options.data.frame_size} does not divide by {cell} (autoencoder "
            f"{codec.downsampling} x model.patch_size {m.patch_size})"
        )
    shared = {
        "channels": codec.channels,
        "patch_size": m.patch_size,
        "heads": m.heads,
        "condition": m.condition,
        "num_conditions": m.num_conditions,
        "first_frame": m.first_frame,
        "modulate_output": m.modulate_output,
        "prediction": options.flow.prediction,
        "sigma_min": options.flow.sigma_min,
    }
    if m.type == "causal_dit":
        return CausalDiT(layers=m.layers, **shared)
    return SCD(
        encoder_layers=m.encoder_layers,
        decoder_layers=m.decoder_layers,
        fusion=m.fusion,
        modulate_context=m.modulate_context,
        **shared,
    )
