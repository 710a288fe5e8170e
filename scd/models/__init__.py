"""The networks: `SCD`, the dense `CausalDiT` and `BidirectionalDiT`, and the autoencoders."""

from scd.models.bidirectional_dit import BidirectionalDiT
from scd.models.causal_dit import CausalDiT
from scd.models.reference import load_reference_checkpoint
from scd.models.scd import SCD
from scd.models.world_model import CausalWorldModel, WorldModel

__all__ = [
    "SCD",
    "BidirectionalDiT",
    "CausalDiT",
    "CausalWorldModel",
    "WorldModel",
    "load_reference_checkpoint",
]
