"""Pixels to scaled latents and back, behind one small interface."""

from pathlib import Path

import torch
from diffusers import AutoencoderDC
from einops import rearrange
from torch import Tensor, nn

from scd.errors import ScdError
from scd.files import sha256
from scd.options import AutoencoderOptions

CHUNK_FRAMES = 64  # frames in one pass of the autoencoder; bounds its memory


class PixelCodec(nn.Module):
    """Pixel space: the "latents" are the pixels, in [-1, 1]."""

    channels = 3
    downsampling = 1

    def scale(self, latents: Tensor) -> Tensor:
        return latents

    def encode(self, video: Tensor) -> Tensor:
        """(B, F, 3, H, W) in [0, 1] -> (B, F, 3, H, W) in [-1, 1]."""
        return video * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return (latents.clamp(-1, 1) + 1) / 2


class LatentCodec(nn.Module):
    """An autoencoder. Latents are multiplied by its `scaling_factor` before diffusion.

    Args:
        autoencoder: maps images (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f) and back.
    """

    def __init__(self, autoencoder: AutoencoderDC):
        super().__init__()
        self.autoencoder = autoencoder
        self.channels = autoencoder.config.latent_channels
        self.downsampling = autoencoder.spatial_compression_ratio

    def scale(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder gives them -> as the diffusion model sees them."""
        return latents * self.autoencoder.config.scaling_factor

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """(B, F, 3, H, W) in [0, 1] -> scaled latents (B, F, C, H/f, W/f)."""
        return self.scale(self._per_frame(self.encode_images, video))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, F, C, h, w) -> (B, F, 3, H, W) in [0, 1]."""
        return self._per_frame(self._decode_images, latents).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> unscaled latents (B, C, h, w)."""
        return self.autoencoder.encode(images * 2 - 1).latent

    def _decode_images(self, latents: Tensor) -> Tensor:
        unscaled = latents / self.autoencoder.config.scaling_factor
        return (self.autoencoder.decode(unscaled).sample + 1) / 2

    @staticmethod
    def _per_frame(function, clips: Tensor) -> Tensor:
        images = rearrange(clips, "b f c h w -> (b f) c h w")
        out = torch.cat([function(chunk) for chunk in images.split(CHUNK_FRAMES)])
        return rearrange(out, "(b f) c h w -> b f c h w", b=clips.shape[0])


Codec = PixelCodec | LatentCodec


def build_autoencoder(options: AutoencoderOptions) -> AutoencoderDC:
    """A deep-compression autoencoder (DC-AE, arXiv 2410.10733) with fresh weights."""
    stages = len(options.encoder_channels)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=options.latent_channels,
        attention_head_dim=32,
        encoder_block_types=list(options.encoder_block_types),
        decoder_block_types=list(options.decoder_block_types),
        encoder_block_out_channels=tuple(options.encoder_channels),
        decoder_block_out_channels=tuple(options.decoder_channels),
        encoder_layers_per_block=tuple(options.encoder_layers),
        decoder_layers_per_block=tuple(options.decoder_layers),
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=1.0,
    )


def load_codec(path: str | None) -> Codec:
    """The codec of an experiment: pixel space, or an autoencoder saved by diffusers.

    Raises:
        ScdError: there is no autoencoder at `path`, or its files are damaged.
    """
    if path is None:
        return PixelCodec()
    if not (Path(path) / "config.json").is_file():
        raise ScdError(f"{path}: no autoencoder there (config.json is missing)")
    try:
        autoencoder = AutoencoderDC.from_pretrained(path, use_safetensors=True)
    except Exception as error:  # diffusers raises many kinds for damaged folders
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ScdError(f"{path}: not a readable autoencoder ({first})") from error
    return LatentCodec(autoencoder.eval().requires_grad_(False))


def autoencoder_hash(path: str) -> str:
    """What identifies an autoencoder's weights: the SHA-256 of its weight file."""
    weights = Path(path) / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise ScdError(f"{weights}: no such file")
    return sha256(weights)
