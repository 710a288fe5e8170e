"""The metrics that can be computed here, and why the others cannot."""

from torch import Tensor

from scd.evaluation.frame_metrics import lpips_distance, psnr, ssim
from scd.evaluation.fvd import i3d_features
from scd.evaluation.metric_weights import (
    MetricUnavailable,
    load_i3d_weights,
    load_lpips_weights,
    weights_hash,
)


class Measures:
    """Which metrics can be computed here, and why not the others.

    Args:
        fvd_precision: see `i3d_features`.
    """

    def __init__(self, fvd_precision: str = "fp32") -> None:
        self.fvd_precision = fvd_precision
        self.hashes: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        for metric, name, load in (
            ("lpips", "lpips", load_lpips_weights),
            ("fvd", "i3d", load_i3d_weights),
        ):
            try:
                load()
                self.hashes[name] = weights_hash(name)
            except MetricUnavailable as error:
                self.missing[metric] = str(error)

    def frames(self, video: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Metric -> (n, frames), of predicted frames against real ones."""
        metrics = {"psnr": psnr, "ssim": ssim, "lpips": lpips_distance}
        return {
            name: metric(video, real).cpu()
            for name, metric in metrics.items()
            if name not in self.missing
        }

    def features(self, video: Tensor) -> Tensor | None:
        if "fvd" in self.missing:
            return None
        return i3d_features(video, precision=self.fvd_precision)
