"""The networks: `SCD`, the dense baseline `CausalDiT`, their parts, and the autoencoders."""

from scd.models.causal_dit import CausalDiT
from scd.models.reference import load_reference_checkpoint
from scd.models.scd import SCD
from scd.models.world_model import WorldModel

__all__ = ["SCD", "CausalDiT", "WorldModel", "load_reference_checkpoint"]
