"""The adversarial stage of an autoencoder: its decoder against a patch discriminator.

The encoder is frozen, so the latents stay what they were, and with them all that was trained on
them. Hinge losses; the generator's is weighed against the reconstruction loss as VQGAN does
(arXiv 2012.09841, equation 7).
"""

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.func import functional_call

from scd.models.autoencoder import Autoencoder, unscaled_latents
from scd.training.reconstruction import ReconstructionLoss, images_of

MOST = 1e4  # the adaptive weight at most


class AdversarialObjective(nn.Module):
    """Batch -> reconstruction loss + w · λ · −D(x̂) + hinge loss of D.

    One backward pass serves both sides: the generator's terms give the discriminator no gradient,
    the discriminator's give the decoder none.

    Args:
        autoencoder: its encoder takes no gradient.
        weight: w, on top of the adaptive weight λ.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        discriminator: nn.Module,
        reconstruction: ReconstructionLoss,
        weight: float,
    ):
        super().__init__()
        self.autoencoder = autoencoder
        self.discriminator = discriminator
        self.reconstruction = reconstruction
        self.weight = weight

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`video` (B, F, 3, H, W) in [0, 1]."""
        images = images_of(batch)
        with torch.no_grad():
            latents = unscaled_latents(self.autoencoder, images)
        decoded = self.autoencoder.decode(latents).sample.float()
        values = self.reconstruction(decoded, images)

        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        generator = generator_hinge(functional_call(self.discriminator, fixed, (decoded,)))
        adaptive = adaptive_weight(values["loss"], generator, last_layer(self.autoencoder))

        real, fake = self.discriminator(torch.cat([images, decoded.detach()])).chunk(2)
        discriminator = discriminator_hinge(real, fake)
        return {
            **values,
            "loss": values["loss"] + self.weight * adaptive * generator + discriminator,
            "generator": generator.detach(),
            "discriminator": discriminator.detach(),
            "adaptive_weight": adaptive,
        }


def generator_hinge(fake: Tensor) -> Tensor:
    """−mean D(x̂), from logits of any shape."""
    return -fake.float().mean()


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """½ (mean max(0, 1 − D(x)) + mean max(0, 1 + D(x̂))): 1 while it knows nothing."""
    return 0.5 * ((1 - real.float()).relu().mean() + (1 + fake.float()).relu().mean())


def adaptive_weight(reconstruction: Tensor, generator: Tensor, layer: Tensor) -> Tensor:
    """λ = |∇ reconstruction| / |∇ generator|, both at `layer`, in fp32, at most `MOST`.

    Of gradients that are averaged over all processes, as those of the step are.
    """
    norms = []
    for loss in (reconstruction, generator):
        (gradient,) = torch.autograd.grad(loss, layer, retain_graph=True)
        norms.append(reduce(gradient.float(), "mean").norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=MOST).detach()


def last_layer(autoencoder: Autoencoder) -> Tensor:
    """The weight of the decoder's last convolution, which may be part of an upsampling block."""
    output = autoencoder.decoder.conv_out
    return output.weight if isinstance(output, nn.Conv2d) else output.conv.weight
