"""The losses of autoencoders and of their decoders: L1 + LPIPS, and a patch discriminator's.

Its losses are hinge losses; the generator's is weighted against the reconstruction loss as in VQGAN
(arXiv 2012.09841, equation 7).
"""

from typing import Any

import torch
from accelerate.utils import reduce
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from scd.evaluation.frame_metrics import load_lpips
from scd.models.autoencoder import Autoencoder, unscaled_latents

MAX_ADAPTIVE_WEIGHT = 1e4


class ReconstructionLoss(nn.Module):
    """The loss |x̂ − x| + w · LPIPS(x̂, x), averaged over images (B, 3, H, W) in [−1, 1]."""

    def __init__(self, lpips_weight: float, device: torch.device):
        super().__init__()
        self.lpips_weight = lpips_weight
        self.perceptual: nn.Module | None = load_lpips(device) if lpips_weight else None

    def forward(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        l1 = (decoded.float() - images).abs().mean()
        values = {"loss": l1, "l1": l1.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(decoded, images).float().mean()
            values["loss"] = l1 + self.lpips_weight * distance
            values["lpips"] = distance.detach()
        return values


class ReconstructionObjective(nn.Module):
    """The reconstruction loss of a batch's frames."""

    def __init__(self, autoencoder: Autoencoder, reconstruction: ReconstructionLoss):
        super().__init__()
        self.autoencoder = autoencoder
        self.reconstruction = reconstruction

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of `video` (B, F, 3, H, W) in [0, 1], and its parts."""
        images = images_of(batch)
        latents = unscaled_latents(self.autoencoder, images)
        return self.reconstruction(self.autoencoder.decode(latents).sample, images)


def images_of(batch: dict[str, Tensor]) -> Tensor:
    """Rearrange the frames of a batch to images (B·F, 3, H, W) in [−1, 1]."""
    return rearrange(batch["video"], "b f c h w -> (b f) c h w") * 2 - 1


class DecoderObjective(nn.Module):
    """The loss of decoded latents: reconstruction + w · λ · −D(x̂) + hinge loss of D.

    One backward pass serves both sides: the generator's terms give the discriminator no gradient,
    the discriminator's give the decoder none.

    Args:
        discriminator: D; None: reconstruction alone.
        weight: w, on top of the adaptive weight λ.
        frames: that the discriminator sees at a time.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        reconstruction: ReconstructionLoss,
        discriminator: nn.Module | None = None,
        weight: float = 0.0,
        frames: int = 1,
    ):
        super().__init__()
        self.autoencoder = autoencoder
        self.reconstruction = reconstruction
        self.discriminator = discriminator
        self.weight = weight
        self.frames = frames

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of a batch, and its parts.

        Args:
            batch: `video` (B, F, 3, H, W) in [0, 1], and `latents` (B, F, C, h, w), unscaled,
                that its decoded frames are to be like.
        """
        images = images_of(batch)
        decoded = self.autoencoder.decode(batch["latents"].flatten(0, 1)).sample.float()
        values = self.reconstruction(decoded, images)
        if self.discriminator is None:
            return values

        stacked = "(n f) c h w -> n (f c) h w"
        clips, decoded_clips = (rearrange(x, stacked, f=self.frames) for x in (images, decoded))
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        generator = generator_hinge(functional_call(self.discriminator, fixed, (decoded_clips,)))
        adaptive = adaptive_weight(values["loss"], generator, last_layer(self.autoencoder))

        real, fake = self.discriminator(torch.cat([clips, decoded_clips.detach()])).chunk(2)
        discriminator = discriminator_hinge(real, fake)
        return {
            **values,
            "loss": values["loss"] + self.weight * adaptive * generator + discriminator,
            "generator": generator.detach(),
            "discriminator": discriminator.detach(),
            "adaptive_weight": adaptive,
        }


def generator_hinge(fake: Tensor) -> Tensor:
    """Compute −mean D(x̂), from logits of any shape."""
    return -fake.float().mean()


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Compute ½ (mean max(0, 1 − D(x)) + mean max(0, 1 + D(x̂))), which is 1 at logits of 0."""
    return 0.5 * ((1 - real.float()).relu().mean() + (1 + fake.float()).relu().mean())


def adaptive_weight(reconstruction: Tensor, generator: Tensor, layer: Tensor) -> Tensor:
    """Compute λ = |∇ reconstruction| / |∇ generator| at `layer`, in fp32, with a maximum.

    The gradients are averaged over all processes, as those of the step are.
    """
    norms = []
    for loss in (reconstruction, generator):
        (gradient,) = torch.autograd.grad(loss, layer, retain_graph=True)
        norms.append(reduce(gradient.float(), "mean").norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=MAX_ADAPTIVE_WEIGHT).detach()


def last_layer(autoencoder: Autoencoder) -> Tensor:
    """Return the weight of the decoder's last convolution, maybe part of an upsampling block."""
    output = autoencoder.decoder.conv_out
    return output.weight if isinstance(output, nn.Conv2d) else output.conv.weight
