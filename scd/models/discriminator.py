"""The patch discriminator that an autoencoder is trained against.

A PatchGAN (arXiv 1611.07004) on wavelet bands instead of pixels (as in SWAGAN, arXiv 2102.06108).
What tells a blurred picture from a real one is faint beside what they share; bands set it apart.
There is a band value at every pixel: of every second one only, a decoder learns a grid between.
"""

import torch
from torch import Tensor, nn

GROUPS = 8  # of the group norm, which unlike batch norm does not depend on the batch's other images
SLOPE = 0.2  # of the leaky ReLU
WIDEST = 8  # times the first layer's channels
DETAIL_GAIN = 8.0  # of the detail bands: about what brings them to the size of the coarse one


class PatchDiscriminator(nn.Module):
    """Short clips (B, 3·frames, H, W) in [-1, 1] -> a logit per overlapping patch, (B, 1, h, w).

    `layers` strided 4x4 convolutions and two plain ones, on bands of 2x2 pixels: with 3 layers a
    logit sees 71x71 pixels, with 2 it sees 35x35, with 1 17x17.

    Args:
        channels: of the first layer; each further one has twice as many, up to 8 times.
        layers: how often the image is halved.
        frames: that it sees at a time, stacked as channels. One frame does not show whether the
            detail that a decoder adds moves as the scene does.
    """

    def __init__(self, channels: int, layers: int, frames: int = 1):
        super().__init__()
        widths = [channels * min(2**i, WIDEST) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(12 * frames, channels, 4, 2, 2), nn.LeakyReLU(SLOPE)]
        for i in range(layers):
            parts += [
                # No bias: the norm would take it away.
                nn.Conv2d(widths[i], widths[i + 1], 4, 2 if i < layers - 1 else 1, 1, bias=False),
                nn.GroupNorm(GROUPS, widths[i + 1]),
                nn.LeakyReLU(SLOPE),
            ]
        self.net = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, clips: Tensor) -> Tensor:
        return self.net(haar_bands(clips))


def haar_bands(images: Tensor) -> Tensor:
    """Compute the undecimated Haar wavelet bands of images (B, C, H, W), (B, 4·C, H−1, W−1).

    Of each channel the mean of every 2x2 pixels, and their details across, down and along the
    diagonal, `DETAIL_GAIN` times as large.
    """
    upper, lower = images[..., :-1, :], images[..., 1:, :]
    a, b, c, d = upper[..., :-1], upper[..., 1:], lower[..., :-1], lower[..., 1:]
    details = (a - b + c - d, a + b - c - d, a - b - c + d)
    bands = [a + b + c + d, *(DETAIL_GAIN * detail for detail in details)]
    return torch.cat(bands, dim=1) / 4
