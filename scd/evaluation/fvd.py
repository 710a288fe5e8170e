"""Fréchet and kernel video distance (Unterthiner et al., arXiv 1812.01717), on I3D features."""

import numpy as np
import torch
from torch import Tensor

from scd.errors import ScdError
from scd.evaluation.frame_metrics import check_videos
from scd.evaluation.i3d import i3d_features


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Compute the Fréchet distance of two Gaussians.

    It is |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with the means m and the unbiased
    covariances C of the two sets of features. With A and B the centered features divided by
    sqrt(n - 1), C_a = A'A, and the trace of the root is the sum of the singular values of A B'. So
    no covariance and no matrix root is ever formed, and fewer samples than features, where a root
    of the singular product fails, are no special case.

    Args:
        features_a, features_b: (n, d) and (m, d), n and m at least 2.

    Raises:
        ScdError: fewer than two samples, differing d, or values that are not finite.
    """
    a, mean_a = _centered(features_a)
    b, mean_b = _centered(features_b)
    if len(mean_a) != len(mean_b):
        raise ScdError(f"features of {len(mean_a)} and {len(mean_b)} numbers cannot be compared")
    cross = float(np.linalg.svd(a @ b.T, compute_uv=False).sum())
    spread = float(np.square(a).sum() + np.square(b).sum())
    return max(float(np.square(mean_a - mean_b).sum()) + spread - 2 * cross, 0.0)


def kernel_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Compute the squared maximum mean discrepancy of two sets of features, without bias.

    The kernel is (x·y / d + 1)³, as for the kernel inception distance (arXiv 1801.01401). The
    estimate does not depend on n on average, and may be below 0 for sets of the same kind.

    Args:
        features_a, features_b: (n, d) each, n at least 2.

    Raises:
        ScdError: fewer than two samples, differing n or d, or values that are not finite.
    """
    from torchmetrics.image.kid import poly_mmd

    a, b = _checked(features_a), _checked(features_b)
    if a.shape != b.shape:  # poly_mmd divides by the size of the first set only
        raise ScdError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
    return float(poly_mmd(a, b))


def _checked(features: Tensor) -> Tensor:
    """Convert features to float64 on the CPU.

    Raises:
        ScdError: not (n, d) with n at least 2, or not finite.
    """
    values = features.detach().cpu().double()
    if values.ndim != 2 or len(values) < 2:
        raise ScdError(
            f"features of shape {tuple(values.shape)}: the distance needs at least 2 samples"
        )
    if not values.isfinite().all():
        raise ScdError("features hold values that are not finite")
    return values


def _centered(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Center features: A in float64 with A'A = the unbiased covariance, and the mean (d,).

    A has at most d rows.
    """
    values = _checked(features).numpy()
    mean = values.mean(axis=0)
    rows = (values - mean) / np.sqrt(len(values) - 1)
    if len(rows) > rows.shape[1]:  # A = QR: R has the same A'A and is smaller
        rows = np.linalg.qr(rows, mode="r")
    return rows, mean


def frechet_video_distance(
    real: Tensor,
    fake: Tensor,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> float:
    """Compute the FVD of two sets of videos, (n, F, 3, H, W) and (m, F, 3, H, W) in [0, 1].

    The number depends on n and m: report them with it. Arguments as for `i3d_features`.

    Raises:
        ScdError: wrong shape, type or range, NaN, fewer than 2 videos a side or 9 frames a video.
        MetricUnavailable: the I3D weights have not been fetched.
    """
    check_videos(real, "real videos")
    check_videos(fake, "fake videos")
    if min(len(real), len(fake)) < 2:
        raise ScdError(f"FVD needs at least 2 videos a side, got {len(real)} and {len(fake)}")
    if real.shape[1] != fake.shape[1]:
        raise ScdError(f"real videos have {real.shape[1]} frames, fake ones {fake.shape[1]}")
    return frechet_distance(
        i3d_features(real, batch_size, device), i3d_features(fake, batch_size, device)
    )
