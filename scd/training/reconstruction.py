"""The first stage of an autoencoder's training: L1 + LPIPS on single frames (arXiv 2410.10733)."""

import torch
from einops import rearrange
from torch import Tensor, nn

from scd.evaluation.frame_metrics import load_lpips
from scd.models.autoencoder import Autoencoder, unscaled_latents


class ReconstructionLoss(nn.Module):
    """|x̂ − x| + w · LPIPS(x̂, x), averaged over images (B, 3, H, W) in [−1, 1]."""

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
    """Batch -> the reconstruction loss of its frames."""

    def __init__(self, autoencoder: Autoencoder, reconstruction: ReconstructionLoss):
        super().__init__()
        self.autoencoder = autoencoder
        self.reconstruction = reconstruction

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`video` (B, F, 3, H, W) in [0, 1]."""
        images = images_of(batch)
        latents = unscaled_latents(self.autoencoder, images)
        return self.reconstruction(self.autoencoder.decode(latents).sample, images)


def images_of(batch: dict[str, Tensor]) -> Tensor:
    """All frames of a batch as images (B·F, 3, H, W) in [−1, 1]."""
    return rearrange(batch["video"], "b f c h w -> (b f) c h w") * 2 - 1
