"""Generating video: one engine for evaluation, sampling and live use."""

from scd.rollout.engine import Rollout, generate

__all__ = ["Rollout", "generate"]
