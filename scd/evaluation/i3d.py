"""Features of videos from DeepMind's Kinetics-400 I3D, for the video distances.

The network is the Inception-I3D of Carreira and Zisserman (arXiv 1705.07750), for inference only.
Its features of a video are the 400 class logits, averaged over time.
"""

import functools
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scd.errors import ScdError
from scd.evaluation.frame_metrics import check_videos, measuring
from scd.evaluation.metric_weights import load_i3d_weights
from scd.options import FvdPrecision
from scd.utils.precision import DTYPES, resolve_precision

SHORTEST = 9  # frames; time is halved three times and the last pooling needs two steps
_SIDE = 224  # pixels the network sees, in height and width
_BATCH_NORM_EPSILON = 1e-3
FRAMES_AT_ONCE = 64  # half a GB of activations; larger batches are no faster on CPU

_MIXED_BEFORE_POOL_4 = ("3b", "3c")
_MIXED_BEFORE_POOL_5 = ("4b", "4c", "4d", "4e", "4f")
_MIXED_LAST = ("5b", "5c")


class Unit(nn.Module):
    """Convolution, BatchNorm and ReLU in one: y = relu(w * x + b), with TensorFlow's SAME padding.

    Several units that read the same input are joined along their output channels. Channels stay
    innermost in memory, whatever convolution torch chooses: poolings behind one that had put them
    first were a third of the network's time on CPU.

    Args:
        weights: all arrays of the network by name.
        names: the units to join.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weights: Mapping[str, Tensor], *names: str, stride: int = 1):
        super().__init__()
        folded = [fold_batch_norm(weights, name) for name in names]
        weight = torch.cat([weight for weight, _ in folded])
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last_3d))
        self.register_buffer("bias", torch.cat([bias for _, bias in folded]))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[2:]
        if kernel.numel() == 1:  # a matrix product over the channels
            x = F.linear(x.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias)
            return x.permute(0, 4, 1, 2, 3).relu_()
        if self.stride == 1:
            padding = [side // 2 for side in kernel]
            x = F.conv3d(x, self.weight, self.bias, padding=padding)
        else:  # F.pad starts at the last axis
            sides = zip(reversed(x.shape[2:]), reversed(kernel), strict=True)
            pads = [pad for size, side in sides for pad in same_padding(size, side, self.stride)]
            x = F.conv3d(F.pad(x, pads), self.weight, self.bias, stride=self.stride)
        return x.contiguous(memory_format=torch.channels_last_3d).relu_()


class Mixed(nn.Module):
    """An Inception module: four branches over (B, C, F, H, W), joined along the channels."""

    def __init__(self, weights: Mapping[str, Tensor], name: str):
        super().__init__()
        entries = [f"{name}/Branch_{branch}/Conv3d_0a_1x1" for branch in range(3)]
        self.entry = Unit(weights, *entries)
        self.widths = [_kernel(weights, entry).shape[-1] for entry in entries]
        self.branch_1 = Unit(weights, f"{name}/Branch_1/Conv3d_0b_3x3")
        self.branch_2 = Unit(weights, f"{name}/Branch_2/Conv3d_0b_3x3")
        self.branch_3 = Unit(weights, f"{name}/Branch_3/Conv3d_0b_1x1")

    def forward(self, x: Tensor) -> Tensor:
        branch_0, branch_1, branch_2 = self.entry(x).split(self.widths, dim=1)
        branch_3 = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        branches = [self.branch_1(branch_1), self.branch_2(branch_2), self.branch_3(branch_3)]
        return torch.cat([branch_0, *branches], dim=1)


class InceptionI3d(nn.Module):
    """The classifier up to its logits. All its tensors are frozen buffers.

    Args:
        weights: what `load_i3d_weights` returns.
    """

    classifier: Tensor
    classifier_bias: Tensor

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()

        def mixed(names: tuple[str, ...]) -> nn.Sequential:
            return nn.Sequential(*[Mixed(weights, f"Mixed_{name}") for name in names])

        self.conv_1 = Unit(weights, "Conv3d_1a_7x7", stride=2)
        self.conv_2 = nn.Sequential(Unit(weights, "Conv3d_2b_1x1"), Unit(weights, "Conv3d_2c_3x3"))
        self.mixed_3 = mixed(_MIXED_BEFORE_POOL_4)
        self.mixed_4 = mixed(_MIXED_BEFORE_POOL_5)
        self.mixed_5 = mixed(_MIXED_LAST)
        logits = "Logits/Conv3d_0c_1x1"
        self.register_buffer("classifier", _kernel(weights, logits).permute(4, 3, 0, 1, 2))
        self.register_buffer("classifier_bias", weights[f"params/{logits}/Conv_0/bias"])

    def forward(self, x: Tensor) -> Tensor:
        """Classify videos (B, 3, F, 224, 224) in [-1, 1], F >= 9: logits (B, 400)."""
        x = self.conv_1(x.to(self.conv_1.weight.dtype))  # (B, 64, F/2, 112, 112)
        x = max_pool_same(x, (1, 3, 3), (1, 2, 2))
        x = self.conv_2(x)  # (B, 192, F/2, 56, 56)
        x = max_pool_same(x, (1, 3, 3), (1, 2, 2))
        x = self.mixed_3(x)  # (B, 480, F/2, 28, 28)
        x = max_pool_same(x, (3, 3, 3), (2, 2, 2))
        x = self.mixed_4(x)  # (B, 832, F/4, 14, 14)
        x = max_pool_same(x, (2, 2, 2), (2, 2, 2))
        x = self.mixed_5(x)  # (B, 1024, F/8, 7, 7)
        x = F.avg_pool3d(x.float(), (2, 7, 7), stride=1)  # (B, 1024, F/8 - 1, 1, 1)
        x = F.conv3d(x, self.classifier, self.classifier_bias)  # (B, 400, F/8 - 1, 1, 1)
        return x.mean(dim=(2, 3, 4))


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Compute TensorFlow's SAME padding of one axis: (before, after), the odd element after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def max_pool_same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Max-pool (B, C, F, H, W) with SAME padding that never wins.

    Padding both sides by what SAME puts before, and letting the last window hang over the end
    (`ceil_mode`), covers exactly the windows of SAME without copying the input to pad it.
    """
    axes = zip(x.shape[2:], kernel, stride, strict=True)
    before = tuple(same_padding(*axis)[0] for axis in axes)
    return F.max_pool3d(x, kernel, stride, padding=before, ceil_mode=True)


def fold_batch_norm(weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Fold a BatchNorm into its convolution: weight (out, in, time, rows, columns), bias (out,).

    The BatchNorm has a shift but no scale: y = (w * x - mean) / sqrt(var + 1e-3) + shift.
    """
    statistics = f"batch_stats/{name}/BatchNorm_0"
    mean = weights[f"{statistics}/mean"].flatten().double()
    gain = (weights[f"{statistics}/var"].flatten().double() + _BATCH_NORM_EPSILON).rsqrt()
    shift = weights[f"params/{name}/BatchNorm_0/bias"].double()
    weight = _kernel(weights, name).permute(4, 3, 0, 1, 2).double()
    return (weight * gain[:, None, None, None, None]).float(), (shift - mean * gain).float()


def _kernel(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Get the kernel of a convolution, (time, rows, columns, in, out)."""
    return weights[f"params/{name}/Conv_0/kernel"]


@functools.lru_cache(maxsize=2)
def load_i3d(device: torch.device, precision: str) -> InceptionI3d:
    """Build the network on a device, once per process.

    Raises:
        MetricUnavailable: its weights are not in the cache.
    """
    network = InceptionI3d(load_i3d_weights()).to(device).eval()
    for module in network.modules():
        if isinstance(module, Unit):  # not the classifier
            module.to(DTYPES[resolve_precision(precision, device)])
    return network


def i3d_features(
    videos: Tensor,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "fp32",
) -> Tensor:
    """Compute the I3D features of videos.

    Args:
        videos: (n, F, 3, H, W) in [0, 1], F >= 9.
        batch_size: videos at once; by default as many as make 64 frames, at least one.
        device: where to compute; by default where the videos are.
        precision: of the convolutions, whatever autocast says. bf16 takes half the time on a CPU
            that has it (see `scd.utils.precision`); features move by one to two percent.

    Returns:
        (n, 400) float32 on the CPU.

    Raises:
        ScdError: wrong shape, type or range, NaN, too few frames, or an unknown precision.
        MetricUnavailable: the I3D weights have not been fetched.
    """
    check_videos(videos)
    frames = videos.shape[1]
    if frames < SHORTEST:
        raise ScdError(f"I3D needs videos of at least {SHORTEST} frames, these have {frames}")
    if batch_size is not None and batch_size < 1:
        raise ScdError(f"batch_size: {batch_size}, wanted at least 1")
    known = get_args(FvdPrecision)
    if precision not in known:
        raise ScdError(f"precision: {precision!r}, known are {', '.join(known)}")
    device = videos.device if device is None else torch.device(device)
    network = load_i3d(device, precision)
    chunks = videos.split(batch_size or max(1, FRAMES_AT_ONCE // frames))
    with measuring(device):
        return torch.cat([network(_as_input(chunk.to(device))).cpu() for chunk in chunks])


def _as_input(videos: Tensor) -> Tensor:
    """Resize videos (b, F, 3, H, W) in [0, 1] to (b, 3, F, 224, 224) in [-1, 1].

    Bilinear, corners not aligned, no antialiasing. Channels are left innermost in memory, which
    makes the convolutions and above all the poolings of the network several times faster on CPU.
    """
    images = videos.flatten(0, 1).float().clamp(0, 1)
    images = images.contiguous(memory_format=torch.channels_last)
    images = F.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
    videos = images.unflatten(0, videos.shape[:2]).transpose(1, 2).mul(2).sub(1)
    return videos.contiguous(memory_format=torch.channels_last_3d)
