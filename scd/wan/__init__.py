"""Pretrained text-to-video models of the Wan2.1 family as causal and as separable models."""

from scd.wan.causal_wan import CausalWan
from scd.wan.scd_wan import SCDWan
from scd.wan.wan_pipeline import SCDWanPipeline

__all__ = ["CausalWan", "SCDWan", "SCDWanPipeline"]
