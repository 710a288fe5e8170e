"""The networks: `SCD`, its parts, and the autoencoders in front of it."""

from scd.models.reference import load_reference_checkpoint
from scd.models.scd import SCD

__all__ = ["SCD", "load_reference_checkpoint"]
