"""Codecs between pixels and scaled latents: pixel space, and diffusers autoencoders.

Three kinds of latents: pixels as they are, those of a deep-compression autoencoder (DC-AE, arXiv
2410.10733), and those of a variational one (diffusers' `AutoencoderKL`), whose mode is taken.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scd.errors import ScdError, reason
from scd.models.weights import read_weights, refuse_incomplete
from scd.options import AutoencoderOptions
from scd.utils.files import read_json, sha256
from scd.utils.paths import to_read, why_missing
from scd.utils.precision import autocast, float32_products

CHUNK_FRAMES = 64  # frames in one pass of the autoencoder; bounds its memory
ENCODING = ("encoder.", "quant_conv.")  # the weights of either kind that latents depend on
PUBLISHED_SCALING = 0.2889  # 1 / standard deviation of the published autoencoders' latents

Autoencoder: TypeAlias = AutoencoderDC | AutoencoderKL
KINDS: dict[str, type[Autoencoder]] = {
    "AutoencoderDC": AutoencoderDC,
    "AutoencoderKL": AutoencoderKL,
}


class PixelCodec(nn.Module):
    """Pixel space: the "latents" are the pixels, in [-1, 1]."""

    channels = 3
    downsampling = 1
    frames_per_latent = 1
    precision = "fp32"

    def scale(self, latents: Tensor) -> Tensor:
        return latents

    def encode(self, video: Tensor) -> Tensor:
        """Map pixels (B, F, 3, H, W) from [0, 1] to [-1, 1]."""
        return video * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return (latents.clamp(-1, 1) + 1) / 2


class LatentCodec(nn.Module):
    """An autoencoder as a codec; models see (latents - shift_factor) * scaling_factor.

    Where diffusers' config has them, `latents_mean` takes the place of the shift, and `latents_std`
    divides as well: one number a channel.

    Args:
        autoencoder: maps images (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f) and back.
        precision: of `encode` and `decode`, as `scd.utils.precision.resolve_precision` gives it.
    """

    frames_per_latent = 1

    def __init__(self, autoencoder: Autoencoder, precision: str = "fp32"):
        super().__init__()
        self.autoencoder = autoencoder
        self.precision = precision
        self.shift: Tensor
        self.factor: Tensor
        self.channels = autoencoder.config.latent_channels
        self.downsampling = downsampling(autoencoder)
        config = autoencoder.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        shift = config.get("shift_factor") or 0.0 if mean is None else mean  # of AutoencoderDC none
        shift, std = (
            torch.tensor(x, device=autoencoder.device).view(-1, 1, 1)
            for x in (shift, 1.0 if std is None else std)
        )
        self.register_buffer("shift", shift, persistent=False)  # (C or 1, 1, 1)
        self.register_buffer("factor", config.scaling_factor / std, persistent=False)

    def scale(self, latents: Tensor) -> Tensor:
        """Scale the autoencoder's latents to those that the diffusion model sees."""
        return (latents - self.shift) * self.factor

    def unscale(self, latents: Tensor) -> Tensor:
        """Undo `scale`."""
        return latents / self.factor + self.shift

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode pixels (B, F, 3, H, W) in [0, 1] to scaled latents (B, F, C, H/f, W/f)."""
        with self._arithmetic():
            return self.scale(self._per_frame(self.encode_images, video))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, F, C, h, w) to pixels (B, F, 3, H, W) in [0, 1]."""
        with self._arithmetic():
            return self._per_frame(self._decode_images, latents).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to unscaled latents (B, C, h, w)."""
        return unscaled_latents(self.autoencoder, self._as_input(images * 2 - 1)).float()

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Compute in this codec's precision, whatever autocast it is called under."""
        device = next(self.autoencoder.parameters()).device
        with autocast(device, self.precision), float32_products(self.precision):
            yield

    def _decode_images(self, latents: Tensor) -> Tensor:
        unscaled = self._as_input(self.unscale(latents))
        return (self.autoencoder.decode(unscaled).sample.float() + 1) / 2

    def _as_input(self, images: Tensor) -> Tensor:
        # Channels innermost in memory, which norms over channels like, and convolutions as well.
        return images.to(self.autoencoder.dtype, memory_format=torch.channels_last)

    @staticmethod
    def _per_frame(function, clips: Tensor) -> Tensor:
        images = rearrange(clips, "b f c h w -> (b f) c h w")
        if not len(images):  # attention takes no empty batch: one black image tells the shape
            shape = function(clips.new_zeros(1, *clips.shape[2:])).shape[1:]
            return clips.new_zeros(*clips.shape[:2], *shape)
        out = torch.cat([function(chunk) for chunk in images.split(CHUNK_FRAMES)])
        return rearrange(out, "(b f) c h w -> b f c h w", b=clips.shape[0])


Codec = PixelCodec | LatentCodec


def encode_alike(one: Codec, other: Codec) -> bool:
    """Check whether two codecs give the same latents: they encode with equal numbers."""
    if not (isinstance(one, LatentCodec) and isinstance(other, LatentCodec)):
        return type(one) is type(other)
    weights, others = (
        {k: v.float() for k, v in c.autoencoder.state_dict().items() if k.startswith(ENCODING)}
        for c in (one, other)
    )
    weights |= {"shift": one.shift, "factor": one.factor}
    others |= {"shift": other.shift, "factor": other.factor}
    return weights.keys() == others.keys() and all(
        torch.equal(tensor, others[name].to(tensor)) for name, tensor in weights.items()
    )


def unscaled_latents(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """Encode images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), a distribution's mode."""
    encoded = autoencoder.encode(pixels)
    return encoded.latent if isinstance(autoencoder, AutoencoderDC) else encoded.latent_dist.mode()


def downsampling(autoencoder: Autoencoder) -> int:
    """Count the pixels per side of one latent: every stage but one halves the image."""
    if isinstance(autoencoder, AutoencoderDC):
        return autoencoder.spatial_compression_ratio
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)


def build_autoencoder(options: AutoencoderOptions) -> AutoencoderDC:
    """Build a deep-compression autoencoder (DC-AE, arXiv 2410.10733) with fresh weights.

    `decoder_norm` is that of the decoder's ResBlocks; every other block has RMS norm.

    Raises:
        ScdError: channels of neighbouring stages between which there is no shortcut.
    """
    stages = len(options.encoder_channels)
    try:  # without memory
        with torch.device("meta"):
            trial = _autoencoder(options)
            latents = trial.encode(torch.empty(1, 3, 2**stages, 2**stages)).latent
            trial.decode(latents)
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise ScdError(
            f"autoencoder.encoder_channels={options.encoder_channels} and decoder_channels="
            f"{options.decoder_channels}: a DC-AE of these cannot be computed, since its shortcuts "
            f"average or repeat whole groups of channels: let them double, or stay"
        ) from error
    return _autoencoder(options)


def _autoencoder(options: AutoencoderOptions) -> AutoencoderDC:
    batch_norm = [
        options.decoder_norm == "batch_norm" and kind == "ResBlock"
        for kind in options.decoder_block_types
    ]
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
        encoder_qkv_multiscales=((),) * len(options.encoder_channels),
        decoder_qkv_multiscales=((),) * len(options.decoder_channels),
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
        decoder_norm_types=["batch_norm" if batch else "rms_norm" for batch in batch_norm],
        decoder_act_fns=["relu" if batch else "silu" for batch in batch_norm],
        scaling_factor=1.0,
    )


def load_codec(path: str | None) -> Codec:
    """Load the codec of an experiment: pixel space, or an autoencoder saved by diffusers.

    Raises:
        ScdError: there is no autoencoder of a known kind at `path`, or its files are damaged.
    """
    if path is None:
        return PixelCodec()
    config_file = to_read(path) / "config.json"
    if not config_file.parent.exists() and re.fullmatch(r"(https?|hf):.*|[\w.-]+/[\w.-]+", path):
        on_hub = "/".join(path.rstrip("/").split("/")[-2:])
        raise ScdError(
            f"{path}: no autoencoder there ({why_missing(Path(path), 'folder')}); published ones: "
            f"bash scripts/setup_data.sh; one on the Hugging Face hub: hf download {on_hub} "
            f"--local-dir FOLDER, then autoencoder.path=FOLDER"
        )
    if not config_file.is_file():
        raise ScdError(
            f"{path}: no autoencoder there (config.json: {why_missing(config_file)}); published "
            f"ones: bash scripts/setup_data.sh"
        )
    config = read_json(config_file)
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in KINDS:
        raise ScdError(
            f"{path}/config.json: _class_name is {name!r}, not one of {', '.join(KINDS)}"
        )
    _check_announced(config, config_file.parent)
    try:
        autoencoder, found = KINDS[name].from_pretrained(
            config_file.parent,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers raises many kinds for damaged folders
        raise ScdError(f"{path}: not a readable autoencoder ({reason(error)})") from error
    refuse_incomplete(found, f"{path}: the autoencoder's")
    return LatentCodec(autoencoder.eval().requires_grad_(False))


def _check_announced(config: dict[str, Any], folder: Path) -> None:
    """Refuse a config that announces what no weight file has, or numbers that cannot be used.

    Diffusers compares shapes, but only once the memory for them is taken, and what contradicts in
    other ways would be found by the first picture. Here both are tried without memory.
    """
    header = folder / "diffusion_pytorch_model.safetensors"
    if not header.is_file():
        raise ScdError(f"{header}: {why_missing(header)}")
    try:
        with safe_open(str(header), framework="pt") as file:
            sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    except Exception as error:  # missing and damaged files raise many kinds
        raise ScdError(f"{folder}: not a readable autoencoder ({reason(error)})") from error
    tensors = len(sizes)
    where = f"{folder}/config.json"
    for key in [key for key in config if "layers" in key]:
        counts = config[key] if isinstance(config[key], list) else [config[key]]
        if not all(isinstance(count, int) and 0 <= count <= tensors for count in counts):
            raise ScdError(f"{where}: {key} is {str(counts)[:60]}, for {tensors} tensors")
    for key, lowest in (("scaling_factor", 1e-6), ("shift_factor", -1e6)):
        value = config.get(key)
        if value is not None and not (_is_number(value) and lowest <= value <= 1e6):
            raise ScdError(f"{where}: {key} is {str(value)[:60]}")
    for key in ("latents_mean", "latents_std"):
        values = config.get(key)
        lowest = 1e-6 if key == "latents_std" else -1e6
        if values is not None and not (
            isinstance(values, list)
            and len(values) == config.get("latent_channels", len(values))
            and all(_is_number(value) and lowest <= value <= 1e6 for value in values)
        ):
            raise ScdError(f"{where}: {key} is {str(values)[:60]}, not a number a channel")
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise ScdError(f"{where}: {key} is {str(config[key])[:60]}, but videos have 3")
    try:
        with torch.device("meta"), torch.no_grad():
            announced = KINDS[config["_class_name"]].from_config(config).eval()
            side = 4 * downsampling(announced)
            latents = unscaled_latents(announced, torch.zeros(1, 3, side, side))
            if announced.decode(latents).sample.shape[-2:] != (side, side):
                raise ValueError(f"{side} pixels come back as another size")
    except Exception as error:  # diffusers raises many kinds for options that contradict
        raise ScdError(f"{where}: announces a network that cannot be ({reason(error)})") from error
    wanted = sum(tensor.numel() for tensor in announced.state_dict().values())
    if wanted > 2 * sum(sizes):  # fewer missing ones are named one by one
        raise ScdError(f"{where}: announces {wanted} weights, but {header.name} has {sum(sizes)}")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def autoencoder_hash(path: str) -> str:
    """Identify an autoencoder by the SHA-256 of its weight file."""
    return sha256(_weight_file(path))


def scaling_of(path: str) -> dict[str, Any]:
    """Read the scaling of an autoencoder's latents, which its weights do not tell."""
    config = read_json(to_read(path) / "config.json")
    keys = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return {key: config[key] for key in keys if config.get(key) is not None}


def encoder_hash(path: str) -> str:
    """Identify the latents of an autoencoder by the SHA-256 of its encoder's weights.

    It stays what it was when the decoder alone is trained on.
    """
    weights = _weight_file(path)
    digest = hashlib.sha256()
    try:
        with safe_open(str(weights), framework="pt") as file:
            for name in sorted(file.keys()):
                if name.startswith(ENCODING):
                    tensor = file.get_tensor(name)
                    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
                    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    except (SafetensorError, OSError) as error:
        raise ScdError(f"{weights}: not a readable weights file ({error})") from error
    return digest.hexdigest()


def stored_dtype(path: str) -> torch.dtype:
    """Read the type that an autoencoder's encoder is stored in; it is loaded in float32."""
    tensors, _ = read_weights(_weight_file(path))
    return next(tensor.dtype for name, tensor in tensors.items() if name.startswith(ENCODING))


def _weight_file(path: str) -> Path:
    weights = to_read(path) / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise ScdError(f"{weights}: {why_missing(weights)}")
    return weights
