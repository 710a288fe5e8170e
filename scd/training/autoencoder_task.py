"""Training an autoencoder: L1 + LPIPS on single frames (first stage of arXiv 2410.10733)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from scd.data.clips import ClipFolder
from scd.evaluation.frame_metrics import load_lpips
from scd.evaluation.measures import Measures
from scd.evaluation.processes import processes
from scd.files import write_whole
from scd.models.autoencoder import LatentCodec, build_autoencoder
from scd.options import Options

SHOWN = 16  # reconstructions in the picture


class ReconstructionObjective(nn.Module):
    """|x̂ − x| + w · LPIPS(x̂, x), averaged over the frames of a batch; pixels in [−1, 1]."""

    def __init__(self, autoencoder: AutoencoderDC, lpips_weight: float, device: torch.device):
        super().__init__()
        self.autoencoder = autoencoder
        self.lpips_weight = lpips_weight
        self.perceptual: nn.Module | None = load_lpips(device) if lpips_weight else None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = rearrange(batch["video"], "b f c h w -> (b f) c h w") * 2 - 1
        latents = self.autoencoder.encode(images).latent
        reconstruction = self.autoencoder.decode(latents).sample
        l1 = (reconstruction.float() - images).abs().mean()
        values = {"loss": l1, "l1": l1.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(reconstruction, images).float().mean()
            values = {
                **values,
                "loss": l1 + self.lpips_weight * distance,
                "lpips": distance.detach(),
            }
        return values


class AutoencoderTask:
    """See `scd.training.tasks.Task`."""

    def __init__(self, options: Options, device: torch.device):
        self.options = options
        self.device = device
        torch.manual_seed(options.seed)
        self.network = build_autoencoder(options.autoencoder)
        weight = options.autoencoder.lpips_weight
        self.objective = ReconstructionObjective(self.network, weight, device)
        root = Path(options.data.root)
        self.training_data = ClipFolder(root, options.data.train_list, "video")
        self.validation_data = ClipFolder(root, options.data.val_list, "video")

    def parameter_groups(self) -> list[dict[str, Any]]:
        lr, scale = self.options.optim.lr, self.options.optim.decoder_lr_scale
        return [
            {"params": list(self.network.encoder.parameters()), "lr": lr},
            {"params": list(self.network.decoder.parameters()), "lr": lr * scale},
        ]

    @torch.no_grad()
    def validate(self, folder: Path) -> dict[str, float]:
        if not processes().is_main_process:
            return {}
        real = self._validation_frames()
        codec = LatentCodec(self.network)
        out = codec.decode(codec.encode(real))
        pairs = torch.stack([real[:SHOWN, 0], out[:SHOWN, 0]]).clamp(0, 1)
        rows = rearrange(pairs, "k n c h w -> (k h) (n w) c").mul(255).round().byte().cpu().numpy()
        picture = Image.fromarray(rows)
        picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
        write_whole(folder / "reconstructions.png", picture.save)
        return {name: float(v.mean()) for name, v in Measures().frames(out, real).items()}

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Save in half precision, with the scaling factor that gives the latents unit variance.

        Rounding the weights moves a reconstruction by far less than its error.
        """
        codec = LatentCodec(self.network)
        latents = codec.encode(self._validation_frames()) / self.network.config.scaling_factor
        self.network.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
        shipped = build_autoencoder(self.options.autoencoder)
        shipped.register_to_config(scaling_factor=self.network.config.scaling_factor)
        shipped.load_state_dict(self.network.state_dict())
        shipped.half().save_pretrained(folder)

    def _validation_frames(self) -> Tensor:
        """`eval.videos` frames of different clips, always the same: (n, 1, 3, H, W) in [0, 1]."""
        count = min(self.options.eval.videos, len(self.validation_data))
        frames = [
            self.validation_data.read(i, 1, rng=np.random.default_rng(i))["video"]
            for i in range(count)
        ]
        return torch.stack(frames).to(self.device)
