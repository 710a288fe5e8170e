"""Metrics of generated videos, and the protocol that they are measured by."""

from scd.evaluation.frame_metrics import (
    load_lpips,
    lpips_distance,
    motion,
    psnr,
    sharpness,
    ssim,
)
from scd.evaluation.fvd import frechet_distance, frechet_video_distance, kernel_distance
from scd.evaluation.i3d import i3d_features
from scd.evaluation.metric_weights import MetricUnavailable, fetch_metric_weights, weights_hash

__all__ = [
    "MetricUnavailable",
    "fetch_metric_weights",
    "frechet_distance",
    "frechet_video_distance",
    "i3d_features",
    "kernel_distance",
    "load_lpips",
    "lpips_distance",
    "motion",
    "psnr",
    "sharpness",
    "ssim",
    "weights_hash",
]
