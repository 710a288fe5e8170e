"""The loss on held-out clips by noise level: what tells, between samples, how training goes."""

from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from scd.data.clips import HELD_OUT_STREAM, ClipFolder
from scd.flow.objective import LEVELS, errors_by_level, with_scaled_latents
from scd.models.autoencoder import Codec
from scd.models.world_model import WorldModel
from scd.options import Options
from scd.precision import autocast
from scd.processes import share, together
from scd.seeding import generator

CLIPS = 16


class HeldOutLoss:
    """Mean squared error of the velocity on validation clips, always the same with the same noise.

    Clips are as long as those of training, and shared by all processes: each reads and encodes its
    own once. Nothing is dropped or perturbed, and every history is clean, whatever the training
    objective shows the model.

    Args:
        data: validation clips, as pixels.

    Raises:
        ScdError: one of them is broken or shorter than `data.frames`; see also `together`.
    """

    def __init__(self, data: ClipFolder, codec: Codec, options: Options, device: torch.device):
        self.seed = options.seed
        self.device = device
        with together():
            self.numbers = share(range(min(CLIPS, len(data))))
            self.clips = [_encoded(data, number, codec, options, device) for number in self.numbers]

    def __call__(self, network: WorldModel, precision: str) -> dict[str, float]:
        """`loss_at_<σ>` at each level, mean over clips and frames, and `loss`, the levels' mean.

        Every process calls it, and gets the same.
        """
        with together():
            mine = [
                (number, self._errors(network, number, clip, precision))
                for number, clip in zip(self.numbers, self.clips, strict=True)
            ]
        # In the clips' order, so that the number of processes has no say in the sum.
        of_clips: list[Any] = sorted(gather_object(mine))
        means = np.mean([errors for _, errors in of_clips], axis=0)
        at_levels = {f"loss_at_{s:g}": float(v) for s, v in zip(LEVELS, means, strict=True)}
        return {"loss": float(means.mean()), **at_levels}

    def _errors(
        self, network: WorldModel, number: int, clip: dict[str, Tensor], precision: str
    ) -> list[float]:
        """Of one clip, at each level."""
        latents, actions, label = (
            clip[key].to(self.device) if key in clip else None
            for key in ("latents", "actions", "label")
        )
        assert latents is not None
        conditions = network.frame_conditions(latents.shape[:2], actions, label)
        shape = latents[:, None, network.first_predicted :].shape
        noise = torch.randn(shape, generator=generator("cpu", "held-out loss", self.seed, number))
        with autocast(self.device, precision):
            errors = errors_by_level(network, latents, conditions, noise.to(self.device))
        return errors.double().mean(dim=(0, 2)).tolist()


def _encoded(
    data: ClipFolder, number: int, codec: Codec, options: Options, device: torch.device
) -> dict[str, Tensor]:
    """A clip as a batch of one, with scaled latents, on the CPU."""
    rng = np.random.default_rng([options.seed, HELD_OUT_STREAM, number])
    clip = data.read(number, options.data.frames, options.data.frame_stride, rng)
    batch = with_scaled_latents({key: v[None].to(device) for key, v in clip.items()}, codec)
    return {key: value.cpu() for key, value in batch.items()}
