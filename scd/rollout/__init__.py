"""Generating video: one engine for evaluation, sampling and live use."""

from scd.rollout.engine import Rollout, continue_videos, generate

__all__ = ["Rollout", "continue_videos", "generate"]
