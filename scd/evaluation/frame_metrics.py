"""PSNR, SSIM and LPIPS of frames, and how sharp and how moving a clip is.

All take videos (n, F, 3, H, W) in [0, 1].
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scd.errors import ScdError
from scd.evaluation.metric_weights import load_lpips_weights
from scd.utils.precision import float32_products

HIGHEST_PSNR = 100.0  # dB
_ROUNDING = 1e-4  # how far (x + 1) / 2 and the like may leave [0, 1]
_PIXELS_AT_ONCE = 2**18  # per piece of work: 64 frames of 64x64; larger pieces are no faster
SMALLEST_SHARPNESS = 3  # pixels: a pixel and its neighbours
SMALLEST_SSIM = 11  # pixels: the side of its Gaussian window
SMALLEST_LPIPS = 31  # pixels: below, AlexNet's second pooling has nothing left


def check_videos(videos: Tensor, name: str = "videos") -> None:
    """Refuse anything but a batch of videos (n, F, 3, H, W), floating point in [0, 1].

    Raises:
        ScdError: another shape or type, no pixels, NaN, or values outside [0, 1].
    """
    shape = tuple(videos.shape)
    if videos.ndim != 5 or shape[2] != 3:
        raise ScdError(f"{name}: shape {shape}, wanted (videos, frames, 3, height, width)")
    if not videos.is_floating_point():
        raise ScdError(f"{name}: {videos.dtype}, wanted floating point in [0, 1]")
    if not videos.numel():
        raise ScdError(f"{name}: shape {shape} holds no pixels")
    low, high = (value.item() for value in videos.detach().aminmax())
    if math.isnan(low) or math.isnan(high):
        raise ScdError(f"{name}: contains NaN")
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ScdError(f"{name}: values from {low:.4g} to {high:.4g}, wanted [0, 1]")


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """Compute without gradients, with convolutions and matrix products in true float32.

    Autocast and TF32, which is on by default for convolutions on a GPU, would change the third
    digit of the metrics from machine to machine.
    """
    with float32_products("fp32"), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def psnr(videos: Tensor, others: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each frame in dB, (n, F) float32.

    Capped at 100 dB, which identical frames get instead of infinity, so that a mean over frames
    stays finite. 8-bit frames of up to 226x226 pixels that differ at all stay below the cap.

    Raises:
        ScdError: the two are not videos in [0, 1] of the same shape.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    def per_image(a: Tensor, b: Tensor) -> Tensor:
        values = peak_signal_noise_ratio(
            a, b, data_range=1.0, dim=(1, 2, 3), reduction="none", base=10.0
        )
        return values.clamp(max=HIGHEST_PSNR)

    return _per_frame(per_image, videos, others, videos.device)


def ssim(videos: Tensor, others: Tensor) -> Tensor:
    """Compute the structural similarity of each frame, (n, F) float32; 1 is identical.

    Gaussian window of 11 pixels, sigma 1.5, k1 = 0.01, k2 = 0.03 (Wang et al. 2004), over every
    pixel with the frame mirrored at its borders, and over the three colors alike.

    Raises:
        ScdError: the two are not videos in [0, 1] of the same shape, or under 11 pixels a side.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    def per_image(a: Tensor, b: Tensor) -> Tensor:
        values = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
        assert isinstance(values, Tensor)
        return values.reshape(len(a))

    return _per_frame(per_image, videos, others, videos.device, smallest=SMALLEST_SSIM)


def lpips_distance(
    videos: Tensor, others: Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Compute the learned perceptual distance of each frame (AlexNet; arXiv 1801.03924).

    Args:
        videos, others: (n, F, 3, H, W) in [0, 1], at least 31 pixels a side.
        device: where to compute; by default where the videos are.

    Returns:
        (n, F) float32 where the videos are; 0 is identical.

    Raises:
        ScdError: the two are not videos in [0, 1] of the same shape, or too small.
        MetricUnavailable: the LPIPS weights have not been fetched.
    """
    device = videos.device if device is None else torch.device(device)

    def per_image(a: Tensor, b: Tensor) -> Tensor:
        return _shared_lpips(device)(a * 2 - 1, b * 2 - 1).flatten()

    return _per_frame(per_image, videos, others, device, smallest=SMALLEST_LPIPS)


def load_lpips(device: torch.device | str = "cpu") -> nn.Module:
    """Load LPIPS (AlexNet): images a, b (n, 3, H, W) in [-1, 1] -> (n, 1, 1, 1).

    Differentiable in both inputs, hence also a training loss. Its own weights take no gradient,
    it has no dropout for `train()` to switch on, and loading it draws no random numbers.

    Raises:
        MetricUnavailable: the LPIPS weights have not been fetched.
    """
    import lpips

    weights = load_lpips_weights()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # torchvision warns about the arguments with which lpips builds its AlexNet.
        warnings.simplefilter("ignore")
        # Random trunk and heads: every one of them is replaced below.
        network = lpips.LPIPS(
            net="alex", pretrained=False, pnet_rand=True, use_dropout=False, verbose=False
        )
    state = dict(network.scaling_layer.state_dict(prefix="scaling_layer."))
    for layer, index in enumerate((0, 3, 6, 8, 10)):  # places of the convolutions in AlexNet
        source, target = f"AlexNet_0/Conv_{layer}", f"net.slice{layer + 1}.{index}"
        state[f"{target}.weight"] = weights[f"{source}/kernel"].permute(3, 2, 0, 1)
        state[f"{target}.bias"] = weights[f"{source}/bias"]
        head = weights[f"NetLinLayer_{layer}/Conv_0/kernel"].permute(3, 2, 0, 1)
        # The module lists each head under two names.
        state[f"lin{layer}.model.0.weight"] = state[f"lins.{layer}.model.0.weight"] = head
    network.load_state_dict(state, strict=True)
    return network.to(device).eval().requires_grad_(False)


@torch.no_grad()
def sharpness(videos: Tensor) -> Tensor:
    """Compute the mean absolute Laplacian of each frame, (n, F) float32.

    A blurred edge has the same gradients in sum, only spread out, but less curvature: the mean
    absolute Laplacian of an edge falls with its width.

    Raises:
        ScdError: not videos in [0, 1], or under 3 pixels a side.
    """
    _check_size(videos, SMALLEST_SHARPNESS)

    def of_frames(x: Tensor) -> Tensor:  # (F, 3, H, W)
        neighbours = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
        return (neighbours - 4 * x[..., 1:-1, 1:-1]).abs().mean(dim=(1, 2, 3))

    return torch.stack([of_frames(video.float()) for video in videos])  # one at a time: memory


@torch.no_grad()
def motion(videos: Tensor) -> Tensor:
    """Compute the mean absolute change from each frame to the next, (n, F - 1) float32.

    Raises:
        ScdError: not videos in [0, 1].
    """
    check_videos(videos)
    return torch.stack([video.float().diff(dim=0).abs().mean(dim=(1, 2, 3)) for video in videos])


@functools.lru_cache(maxsize=2)
def _shared_lpips(device: torch.device) -> nn.Module:
    return load_lpips(device)


def _per_frame(
    per_image: Callable[[Tensor, Tensor], Tensor],
    videos: Tensor,
    others: Tensor,
    device: torch.device,
    smallest: int = 1,
) -> Tensor:
    """Apply a metric of images (b, 3, H, W), (b, 3, H, W) -> (b,) in bounded pieces, in fp32."""
    _check_size(videos, smallest)
    check_videos(others, "other videos")
    if videos.shape != others.shape:
        raise ScdError(f"videos {tuple(videos.shape)} and {tuple(others.shape)} differ in shape")
    height, width = videos.shape[-2:]
    images_at_once = max(1, _PIXELS_AT_ONCE // (height * width))
    pieces = [clips.flatten(0, 1).split(images_at_once) for clips in (videos, others)]
    values = []
    with measuring(device):
        for pair in zip(*pieces, strict=True):
            a, b = (images.to(device).float().clamp(0, 1) for images in pair)
            values.append(per_image(a, b).to(videos.device))
    return torch.cat(values).reshape(videos.shape[:2])


def _check_size(videos: Tensor, smallest: int) -> None:
    check_videos(videos)
    height, width = videos.shape[-2:]
    if min(height, width) < smallest:
        raise ScdError(f"frames of {height}x{width} pixels, this metric needs {smallest} a side")
