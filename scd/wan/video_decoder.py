"""Wan's autoencoder for streams: pictures of every latent frame as soon as it is there."""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor

from scd.utils.precision import float32_products, without_autocast


def latent_statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Make mean and standard deviation of an autoencoder's latents, (C, 1, 1) each.

    Models see (latents - mean) / std.
    """
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=vae.device).view(-1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


class VideoDecoder:
    """Decodes latent frames one by one, as `AutoencoderKLWan.decode` does all of them, bit for bit.

    Diffusers' decoder goes frame by frame itself, over features that its causal convolutions keep
    of the frames before, but it forgets them after every call. Here the stream keeps them: memory
    is the same however long it gets, and several streams can share an autoencoder.

    The first latent frame is one picture, every other one as many as `vae.temporal_compression`
    (4). Tiling (`vae.enable_tiling`) is not used.

    Args:
        precision: of float32 products, as `scd.utils.precision.resolve_precision` gives it; the
            autoencoder computes in the type of its weights.
    """

    def __init__(self, vae: AutoencoderKLWan, precision: str = "fp32"):
        self.vae = vae
        self.precision = precision
        convolutions = [m for m in vae.decoder.modules() if isinstance(m, WanCausalConv3d)]
        self._features: list[Tensor | str | None] = [None] * len(convolutions)
        self._first = True
        self._mean, self._std = latent_statistics(vae)  # (C, 1, 1) each

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latent frame of each video.

        Args:
            latents: (B, C, h, w), normalized as the model's latents are.

        Returns:
            (B, 1 or 4, 3, H, W), float32 in [0, 1].
        """
        vae = self.vae
        with without_autocast(vae.device), float32_products(self.precision):
            z = latents.to(self._mean) * self._std + self._mean  # (B, C, h, w)
            z = vae.post_quant_conv(z[:, :, None].to(vae.dtype))  # (B, C, 1, h, w)
            pictures = vae.decoder(
                z, feat_cache=self._features, feat_idx=[0], first_chunk=self._first
            )  # (B, 3, 1 or 4, H, W)
        self._first = False
        if vae.config.patch_size is not None:  # of Wan2.2
            pictures = unpatchify(pictures, patch_size=vae.config.patch_size)
        pictures = (pictures.float().clamp(-1, 1) + 1) / 2
        return pictures.transpose(1, 2)  # (B, 1 or 4, 3, H, W)

    @property
    def bytes_kept(self) -> int:
        """Memory of the features that the stream keeps."""
        return sum(kept.nbytes for kept in self._features if isinstance(kept, Tensor))
