"""Training an autoencoder: first all of it, then its decoder against an adversary."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from scd.data.clips import clip_folder, with_float_pixels
from scd.errors import ScdError
from scd.evaluation.measures import Measures
from scd.files import write_whole
from scd.models.autoencoder import (
    ENCODING,
    Autoencoder,
    LatentCodec,
    build_autoencoder,
    downsampling,
    load_codec,
)
from scd.models.discriminator import PatchDiscriminator
from scd.options import Options
from scd.processes import processes
from scd.training.adversarial import AdversarialObjective
from scd.training.reconstruction import ReconstructionLoss, ReconstructionObjective

SHOWN = 16  # reconstructions in the picture


class AutoencoderTask:
    """See `scd.training.tasks.Task`."""

    pictures = {"reconstructions.png": "real above reconstructed"}
    held_out = None  # there are no noise levels

    def __init__(self, options: Options, device: torch.device):
        self.options = options
        self.device = device
        self.adversary: nn.Module | None = None
        self.network: Autoencoder
        self.objective: nn.Module
        reconstruction = ReconstructionLoss(options.autoencoder.lpips_weight, device)
        torch.manual_seed(options.seed)
        if options.adversary.weight:
            a = options.adversary
            self.network = _with_frozen_encoder(options)
            self.adversary = PatchDiscriminator(a.channels, a.layers)
            self.objective = AdversarialObjective(
                self.network, self.adversary, reconstruction, a.weight
            )
        else:
            self.network = build_autoencoder(options.autoencoder)
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
        return groups if self.adversary is None else groups[1:]

    @torch.no_grad()
    def validate(self, network: Autoencoder, folder: Path) -> dict[str, float]:
        if not processes().is_main_process:
            return {}
        real = self._validation_frames()
        codec = LatentCodec(network)
        out = codec.decode(codec.encode(real))
        pairs = torch.stack([real[:SHOWN, 0], out[:SHOWN, 0]]).clamp(0, 1)
        rows = rearrange(pairs, "k n c h w -> (k h) (n w) c").mul(255).round().byte().cpu().numpy()
        picture = Image.fromarray(rows)
        picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
        write_whole(folder / "reconstructions.png", picture.save)
        return {name: float(v.mean()) for name, v in Measures().frames(out, real).items()}

    @torch.no_grad()
    def export(self, network: Autoencoder, folder: Path) -> None:
        """Save in half precision, with the scaling factor that gives the latents unit variance.

        Rounding the weights moves a reconstruction by far less than its error. The adversarial
        stage leaves the latents alone, and hence their scaling factor.
        """
        if self.adversary is None:
            codec = LatentCodec(network)
            unscaled = codec.encode_images(self._validation_frames().flatten(0, 1))
            network.register_to_config(scaling_factor=round(1 / float(unscaled.std()), 4))
        network.half().save_pretrained(folder)

    def _validation_frames(self) -> Tensor:
        """`eval.videos` frames of different clips, always the same: (n, 1, 3, H, W) in [0, 1]."""
        count = min(self.options.eval.videos, len(self.validation_data))
        frames = [
            self.validation_data.read(i, 1, rng=np.random.default_rng(i))["video"]
            for i in range(count)
        ]
        return torch.stack(frames).to(self.device)


def _with_frozen_encoder(options: Options) -> Autoencoder:
    """The autoencoder at `autoencoder.path`; only its decoder takes a gradient.

    Raises:
        ScdError: see `load_codec`; or the frames do not divide into its latents.
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
