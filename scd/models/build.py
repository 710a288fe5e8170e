"""From options to a fresh world model."""

from scd.errors import ScdError
from scd.models.autoencoder import Codec
from scd.models.scd import SCD
from scd.options import Options


def build_world_model(options: Options, codec: Codec) -> SCD:
    """A fresh `SCD` of the options' sizes, for the codec's latents.

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
    return SCD(
        channels=codec.channels,
        patch_size=m.patch_size,
        heads=m.heads,
        encoder_layers=m.encoder_layers,
        decoder_layers=m.decoder_layers,
        fusion=m.fusion,
        condition=m.condition,
        num_conditions=m.num_conditions,
        modulate_context=m.modulate_context,
        modulate_output=m.modulate_output,
        prediction=options.flow.prediction,
        sigma_min=options.flow.sigma_min,
    )
