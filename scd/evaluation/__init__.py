"""Measuring videos: Fréchet video distance, and PSNR, SSIM and LPIPS of single frames."""

from scd.evaluation.frame_metrics import load_lpips, lpips_distance, psnr, ssim
from scd.evaluation.fvd import frechet_distance, frechet_video_distance, i3d_features
from scd.evaluation.metric_weights import MetricUnavailable, fetch_metric_weights, weights_hash

__all__ = [
    "MetricUnavailable",
    "fetch_metric_weights",
    "frechet_distance",
    "frechet_video_distance",
    "i3d_features",
    "load_lpips",
    "lpips_distance",
    "psnr",
    "ssim",
    "weights_hash",
]
