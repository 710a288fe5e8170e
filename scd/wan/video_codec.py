"""Wan's autoencoder as a codec between pictures and the normalized latents that Wan sees."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from scd.errors import ScdError
from scd.utils.paths import why_missing
from scd.utils.precision import autocast, float32_products, with_weights_in
from scd.wan.convert import read_autoencoder
from scd.wan.video_decoder import VideoDecoder, latent_statistics


class WanCodec(nn.Module):
    """A causal video autoencoder: 1 + 4·(n - 1) pictures are n latent frames.

    Models see (latents - mean) / std, of each channel.

    Args:
        precision: of `encode` and `decode`, as `scd.utils.precision.resolve_precision` gives it.
    """

    def __init__(self, autoencoder: AutoencoderKLWan, precision: str = "fp32"):
        super().__init__()
        config = autoencoder.config
        self.autoencoder = autoencoder
        self.precision = precision
        self.channels = config.z_dim
        self.downsampling = config.scale_factor_spatial
        self.frames_per_latent = config.scale_factor_temporal
        self.mean: Tensor
        self.std: Tensor
        for name, statistic in zip(("mean", "std"), latent_statistics(autoencoder), strict=True):
            self.register_buffer(name, statistic, persistent=False)

    def scale(self, latents: Tensor) -> Tensor:
        """Normalize the autoencoder's latents (..., C, h, w)."""
        return (latents - self.mean) / self.std

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode pictures (B, 1 + 4·(n - 1), 3, H, W) in [0, 1] to latents (B, n, C, h, w)."""
        return self.scale(self.encode_unscaled(video))

    @torch.no_grad()
    def encode_unscaled(self, video: Tensor) -> Tensor:
        """Encode as `encode` does, but leave the mode that the encoder predicts unscaled."""
        # What is left over at the end would be encoded as a latent of too few pictures.
        whole = video.shape[1] - (video.shape[1] - 1) % self.frames_per_latent
        pixels = (video[:, :whole] * 2 - 1).transpose(1, 2).to(self.autoencoder.dtype)
        with autocast(pixels.device, self.precision), float32_products(self.precision):
            mode = self.autoencoder.encode(pixels).latent_dist.mode()  # (B, C, n, h, w)
        return mode.transpose(1, 2).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, n, C, h, w) to pictures (B, 1 + 4·(n - 1), 3, H, W)."""
        decoder = VideoDecoder(with_weights_in(self.autoencoder, self.precision), self.precision)
        return torch.cat([decoder.decode(frame) for frame in latents.unbind(dim=1)], dim=1)


def load_video_codec(path: str) -> WanCodec:
    """Load the autoencoder in the folder `vae` of those that `scd wan convert` writes.

    Raises:
        ScdError: it is missing or damaged, or no Wan's.
    """
    folder = Path(path)
    if folder.name != "vae" or not folder.is_dir():
        raise ScdError(
            f"{path}: no folder vae with Wan's autoencoder, as scd wan convert writes it: "
            f"{why_missing(folder, 'folder')}"
        )
    return WanCodec(read_autoencoder(folder.parent).requires_grad_(False))
