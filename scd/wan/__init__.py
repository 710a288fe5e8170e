"""Pretrained text-to-video models of the Wan2.1 family: causal, separable, and as they are."""

from scd.wan.bidirectional_wan import BidirectionalWan
from scd.wan.causal_wan import CausalWan
from scd.wan.scd_wan import SCDWan
from scd.wan.wan_pipeline import SCDWanPipeline

__all__ = ["BidirectionalWan", "CausalWan", "SCDWan", "SCDWanPipeline"]
