"""The patch discriminator that an autoencoder is trained against (PatchGAN, arXiv 1611.07004)."""

from torch import Tensor, nn

GROUPS = 8  # of the group norm, which unlike batch norm does not depend on the batch's other images
SLOPE = 0.2  # of the leaky ReLU
WIDEST = 8  # times the first layer's channels


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> one logit for each overlapping patch, (B, 1, h, w).

    `layers` strided 4x4 convolutions and two plain ones: with 3 layers a logit sees 70x70 pixels,
    with 2 it sees 34x34, with 1 16x16.

    Args:
        channels: of the first layer; each further one has twice as many, up to 8 times.
        layers: how often the image is halved.
    """

    def __init__(self, channels: int, layers: int):
        super().__init__()
        widths = [channels * min(2**i, WIDEST) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(SLOPE)]
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

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)
