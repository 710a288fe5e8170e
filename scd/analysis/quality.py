"""How good a model is under a surgery: its loss by noise level, and its first new frames.

Clips, noise and levels are always the same, so that two models are compared pair by pair.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from scd.analysis.probe_clips import ProbeClips, roll_out
from scd.evaluation.fvd import frechet_distance
from scd.evaluation.i3d import SHORTEST, i3d_features
from scd.evaluation.metrics import AvailableMetrics
from scd.flow.objective import errors_by_level
from scd.models import WorldModel
from scd.models.autoencoder import Codec
from scd.utils.precision import autocast, float32_products
from scd.utils.seeding import generator

FVD_CLIPS = 64  # below, FVD hardly tells a bad model from real video


Around = Callable[[ProbeClips], AbstractContextManager]
"""What a model is put under while it works on some of the clips."""


@torch.no_grad()
def loss_by_level(
    model: WorldModel,
    clips: ProbeClips,
    seed: int,
    around: Around = nullcontext,
    last_frame: bool = False,
) -> Tensor:
    """Mean squared error of the velocity ε − x under teacher forcing, (n, levels).

    Of every frame that can be predicted, or of the last one only; see `errors_by_level`.
    """
    losses = []
    for clip in clips.parts(1):
        shape = clip.latents[:, None, model.first_predicted :].shape
        of_clip = generator("cpu", "probe loss", seed, clip.numbers[0])
        noise = torch.randn(shape, generator=of_clip).to(model.device)
        computing = autocast(model.device, clip.precision)
        with around(clip), computing, float32_products(clip.precision):
            errors = errors_by_level(model, clip.latents, clip.conditions(model), noise)[0]
        losses.append(errors[:, -1] if last_frame else errors.mean(dim=1))
    return torch.stack(losses).cpu()


@dataclass(frozen=True)
class Frames:
    """Metric -> (n, new frames), of a rollout; FVD of the whole clips."""

    metrics: dict[str, Tensor]
    fvd: float | None


class FrameJudge:
    """Measures new frames against the real ones, and FVD where there are clips enough.

    Raises:
        ScdError: the weights of a metric are damaged.
    """

    def __init__(self, codec: Codec, clips: ProbeClips, steps: int, seed: int):
        self.codec = codec
        self.clips = clips
        self.steps = steps
        self.seed = seed
        self.available = AvailableMetrics()
        enough = len(clips) >= FVD_CLIPS and clips.latents.shape[1] >= SHORTEST
        fvd = enough and "fvd" in self.available.metrics
        self._real = i3d_features(clips.video) if fvd else None

    @torch.no_grad()
    def __call__(self, model: WorldModel, around: Around = nullcontext) -> Frames:
        known = self.clips.known
        found: list[dict[str, Tensor]] = []
        features: list[Tensor] = []
        for part in self.clips.parts():
            with around(part):
                latents = roll_out(model, part, self.steps, self.seed)
            new = (self.codec.decode(latents) * 255).round() / 255
            found.append(self.available.compare_frames(new, part.video[:, known:]))
            if self._real is not None:
                features.append(i3d_features(torch.cat([part.video[:, :known], new], dim=1)))
        metrics = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        fvd = None if self._real is None else frechet_distance(self._real, torch.cat(features))
        return Frames(metrics, fvd)


def paired(values: Tensor, others: Tensor) -> tuple[float, float]:
    """Mean difference of the clips' means, (n, …) each, and its standard error over clips."""
    difference = (values - others).flatten(1).double().mean(dim=1)
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


def increase(loss: Tensor, untouched: Tensor) -> tuple[float, float]:
    """By which share the mean over clips and levels is larger, (n, levels) each, and its standard
    error over clips.

    The mean of each level's ratio: else the level with the largest loss would decide alone.
    """
    loss, untouched = loss.double(), untouched.double()
    ratio = loss.mean(dim=0) / untouched.mean(dim=0)
    # Of a ratio of means, to first order: clip by clip, what the ratio leaves unexplained.
    rest = ((loss - ratio * untouched) / untouched.mean(dim=0)).mean(dim=1)
    return float(ratio.mean() - 1), float(rest.std() / len(rest) ** 0.5)
