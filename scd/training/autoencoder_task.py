"""Train an autoencoder: first all of it, then its decoder against a patch discriminator.

The first stage minimises L1 + LPIPS on single frames (arXiv 2410.10733).

In the second, the encoder is frozen, so that its latents, and every model trained on them, stay
valid. Losses are hinge losses; the generator's is weighted against the reconstruction loss as in
VQGAN (arXiv 2012.09841, equation 7).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from scd.data.clips import clip_folder, with_float_pixels
from scd.errors import ScdError
from scd.evaluation.frame_metrics import load_lpips
from scd.evaluation.metrics import AvailableMetrics
from scd.models.autoencoder import (
    ENCODING,
    Autoencoder,
    LatentCodec,
    build_autoencoder,
    downsampling,
    load_codec,
    unscaled_latents,
)
from scd.models.discriminator import PatchDiscriminator
from scd.models.weights import load_matching, read_all_weights
from scd.options import Options
from scd.utils.files import write_atomically
from scd.utils.processes import processes

RECONSTRUCTIONS_SHOWN = 16
MAX_ADAPTIVE_WEIGHT = 1e4


class AutoencoderTask:
    """The task of training an autoencoder; see `scd.training.tasks.Task`."""

    pictures = {"reconstructions.png": "real above reconstructed"}
    held_out = None  # there are no noise levels

    def __init__(self, options: Options, device: torch.device):
        self.options = options
        self.device = device
        self.critic: PatchDiscriminator | None = None
        self.network: Autoencoder
        self.objective: nn.Module
        reconstruction = ReconstructionLoss(options.autoencoder.lpips_weight, device)
        torch.manual_seed(options.seed)
        if options.discriminator.weight:
            a = options.discriminator
            self.network = _with_frozen_encoder(options)
            self.critic = PatchDiscriminator(a.channels, a.layers, a.frames)
            self.objective = AdversarialObjective(
                self.network, self.critic, reconstruction, a.weight, a.frames
            )
        else:
            self.network = build_autoencoder(options.autoencoder)
            if options.init_from is not None:
                tensors = read_all_weights(Path(options.init_from))
                load_matching(self.network, tensors, options.init_from)
            self.objective = ReconstructionObjective(self.network, reconstruction)
        self.training_data = clip_folder(options, options.data.train_list, "video")
        self.validation_data = clip_folder(options, options.data.val_list, "video")

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_float_pixels(batch)

    def clip_cost(self) -> None:
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        lr, scale = self.options.optim.lr, self.options.optim.decoder_lr_scale
        encoding: list[nn.Parameter] = []
        decoding: list[nn.Parameter] = []
        for name, parameter in self.network.named_parameters():
            (encoding if name.startswith(ENCODING) else decoding).append(parameter)
        groups = [{"params": encoding, "lr": lr}, {"params": decoding, "lr": lr * scale}]
        return groups if self.critic is None else groups[1:]

    def critic_groups(self) -> list[dict[str, Any]]:
        assert self.critic is not None
        lr = self.options.optim.discriminator_lr
        return [{"params": list(self.critic.parameters()), "lr": lr}]

    def trains_network(self, step: int) -> bool:
        return True

    def averaged(self, average: dict[str, Tensor]) -> None:
        pass

    @torch.no_grad()
    def validate(self, network: Autoencoder, folder: Path) -> dict[str, float]:
        if not processes().is_main_process:
            return {}
        real = self._validation_frames()
        codec = LatentCodec(network)
        out = codec.decode(codec.encode(real))
        shown = RECONSTRUCTIONS_SHOWN
        pairs = torch.stack([real[:shown, 0], out[:shown, 0]]).clamp(0, 1)
        rows = rearrange(pairs, "k n c h w -> (k h) (n w) c").mul(255).round().byte().cpu().numpy()
        picture = Image.fromarray(rows)
        picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
        write_atomically(folder / "reconstructions.png", picture.save)
        metrics = AvailableMetrics().compare_frames(out, real)
        return {name: float(values.mean()) for name, values in metrics.items()}

    @torch.no_grad()
    def export(self, network: Autoencoder, folder: Path) -> None:
        """Save in half precision, with the scaling factor that gives the latents unit variance.

        Rounding the weights moves a reconstruction by far less than its error. The adversarial
        stage leaves the latents alone, and hence their scaling factor.
        """
        if self.critic is None:
            codec = LatentCodec(network)
            unscaled = codec.encode_images(self._validation_frames().flatten(0, 1))
            network.register_to_config(scaling_factor=round(1 / float(unscaled.std()), 4))
        network.half().save_pretrained(folder)

    def _validation_frames(self) -> Tensor:
        """Read fixed frames of `eval.videos` different clips, (n, 1, 3, H, W) in [0, 1]."""
        count = min(self.options.eval.videos, len(self.validation_data))
        frames = [
            self.validation_data.read(i, 1, rng=np.random.default_rng(i))["video"]
            for i in range(count)
        ]
        return torch.stack(frames).to(self.device)


def _with_frozen_encoder(options: Options) -> Autoencoder:
    """Load the autoencoder at `autoencoder.path` with gradients for its decoder only.

    Raises:
        ScdError: see `load_codec`; or the frame size does not divide by its downsampling.
    """
    codec = load_codec(options.autoencoder.path)
    assert isinstance(codec, LatentCodec)
    autoencoder = codec.autoencoder.float().train()
    cell = downsampling(autoencoder)
    if options.data.frame_size % cell:
        raise ScdError(
            f"data.frame_size={options.data.frame_size} does not divide by {cell}, the "
            f"downsampling of {options.autoencoder.path}"
        )
    for name, parameter in autoencoder.named_parameters():
        parameter.requires_grad_(not name.startswith(ENCODING))
    return autoencoder


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


class AdversarialObjective(nn.Module):
    """The loss of a batch's frames: reconstruction + w · λ · −D(x̂) + hinge loss of D.

    One backward pass serves both sides: the generator's terms give the discriminator no gradient,
    the discriminator's give the decoder none.

    Args:
        autoencoder: its encoder takes no gradient.
        weight: w, on top of the adaptive weight λ.
        frames: that the discriminator sees at a time.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        discriminator: nn.Module,
        reconstruction: ReconstructionLoss,
        weight: float,
        frames: int,
    ):
        super().__init__()
        self.autoencoder = autoencoder
        self.discriminator = discriminator
        self.reconstruction = reconstruction
        self.weight = weight
        self.frames = frames

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of `video` (B, F, 3, H, W) in [0, 1], and its parts."""
        images = images_of(batch)
        with torch.no_grad():
            latents = unscaled_latents(self.autoencoder, images)
        decoded = self.autoencoder.decode(latents).sample.float()
        values = self.reconstruction(decoded, images)

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
