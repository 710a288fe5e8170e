"""Generating video: one engine for evaluation, sampling and live use."""

from scd.rollout.continuation import continue_videos, generate
from scd.rollout.engine import Rollout

__all__ = ["Rollout", "continue_videos", "generate"]
