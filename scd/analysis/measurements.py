"""Measure a model on a fixed set of validation clips: loss by noise level, and generated frames.

Clips, noise and noise levels are always the same, so that two models are compared in pairs.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from scipy.stats import norm, t
from torch import Tensor

from scd.data.clips import clip_folder
from scd.errors import ScdError
from scd.evaluation.fvd import frechet_distance
from scd.evaluation.i3d import SHORTEST, i3d_features
from scd.evaluation.metrics import AvailableMetrics
from scd.evaluation.protocol import read_evaluation_batch
from scd.flow.objective import errors_by_level
from scd.models import CausalWorldModel
from scd.models.autoencoder import Codec
from scd.models.load import LoadedModel
from scd.options import RolloutOptions
from scd.rollout import continue_videos
from scd.utils.precision import Precision, autocast, float32_products, resolve_precision
from scd.utils.seeding import generator

CLIPS_AT_ONCE = 16  # in one forward pass; bounds the memory
RESAMPLES = 2000  # of a bootstrap
FVD_CLIPS = 64  # with fewer, FVD can hardly tell a bad model from real video


@dataclass(frozen=True)
class ProbeClips:
    """n validation clips of F frames, of which the first `known` are context frames of rollouts."""

    latents: Tensor  # (n, F, C, h, w), scaled
    video: Tensor  # (n, F, 3, H, W) in [0, 1]
    actions: Tensor | None  # (n, F)
    labels: Tensor | None  # (n,)
    known: int
    numbers: tuple[int, ...]  # of the clips in the validation list; they seed all randomness
    precision: Precision = "fp32"  # of the probes' forward passes: fp32, tf32 or bf16

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def new_frames(self) -> int:
        return self.latents.shape[1] - self.known

    def parts(self, size: int = CLIPS_AT_ONCE) -> Iterator["ProbeClips"]:
        """Yield the clips in batches of at most `size`."""
        for start in range(0, len(self), size):
            own = slice(start, start + size)
            yield replace(
                self,
                latents=self.latents[own],
                video=self.video[own],
                actions=None if self.actions is None else self.actions[own],
                labels=None if self.labels is None else self.labels[own],
                numbers=self.numbers[own],
            )

    def cut(self, new_frames: int) -> "ProbeClips":
        """Cut the clips to `new_frames` frames after the context frames."""
        frames = self.known + new_frames
        actions = None if self.actions is None else self.actions[:, :frames]
        latents, video = self.latents[:, :frames], self.video[:, :frames]
        return replace(self, latents=latents, video=video, actions=actions)

    def conditions(self, model: CausalWorldModel) -> Tensor | None:
        """Look up the condition of every frame, (n, F); None for a model without conditions."""
        conditions = model.frame_conditions(self.latents.shape[:2], self.actions, self.labels)
        model.check_conditions(conditions)
        return conditions

    def noise(self, seed: int) -> Tensor:
        """Draw the noise that the new frames start from, (n, new frames, C, h, w)."""
        shape = (self.new_frames, *self.latents.shape[2:])
        return torch.stack(
            [torch.randn(shape, generator=generator("cpu", "probe", seed, i)) for i in self.numbers]
        )


Intervention = Callable[[ProbeClips], AbstractContextManager]
"""Makes the context manager that a model runs under while it processes the given clips."""


@dataclass(frozen=True)
class FrameScores:
    """Metrics of generated frames: name -> (n, new frames), and FVD of the whole clips."""

    metrics: dict[str, Tensor]
    fvd: float | None


def clip_numbers(text: str) -> tuple[int, ...]:
    """Parse `--clips`: `16` means the first 16 clips, `3,17,40` these three.

    Raises:
        ScdError: the text is neither, or names fewer than two clips.
    """
    try:
        given = [int(part) for part in text.split(",")]
    except ValueError:
        given = []
    numbers = list(range(given[0])) if len(given) == 1 else given
    if len(numbers) < 2 or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise ScdError(
            f"--clips {text}: give how many (2 or more), or the numbers of two or more different "
            f"clips, such as 3,17,40"
        )
    return tuple(numbers)


def read_probe_clips(loaded: LoadedModel, numbers: tuple[int, ...], new_frames: int) -> ProbeClips:
    """Read and encode validation clips, cut as an evaluation of `new_frames` frames cuts them.

    Encoding, and later every probe, runs in `rollout.precision`.

    Raises:
        ScdError: clips are missing, broken or too short, or there are too few context frames.
    """
    options = loaded.options
    known = options.eval.context_frames
    if known < 2:
        raise ScdError(
            f"eval.context_frames={known}: probes measure attention to past frames and need 2 or "
            f"more; add eval.context_frames=8, for example"
        )
    options = replace(options, eval=replace(options.eval, new_frames=new_frames))
    data = clip_folder(options, options.data.val_list, "video")
    if max(numbers) >= len(data):
        raise ScdError(
            f"--clips: {data.list_path} has clips 0 to {len(data) - 1}, but no clip {max(numbers)}"
        )
    batch = read_evaluation_batch(data, list(numbers), options, loaded.model.device)
    precision = resolve_precision(options.rollout.precision, loaded.model.device)
    loaded.codec.precision = precision
    latents = loaded.codec.encode(batch["video"])
    actions, labels = batch.get("actions"), batch.get("label")
    return ProbeClips(latents, batch["video"], actions, labels, known, numbers, precision)


def roll_out(model: CausalWorldModel, clips: ProbeClips, steps: int, seed: int) -> Tensor:
    """Generate the clips' new frames without guidance, (n, new frames, C, h, w)."""
    # In bf16 a rollout would copy the model, but the probes' hooks are on the original.
    own = "fp32" if clips.precision == "bf16" else clips.precision
    with autocast(model.device, clips.precision):
        return continue_videos(
            model,
            RolloutOptions(steps, guidance="none", precision=own),
            clips.latents[:, : clips.known],
            clips.new_frames,
            clips.actions,
            clips.labels,
            noise=clips.noise(seed),
        )


def loss_noise(model: CausalWorldModel, clip: ProbeClips, seed: int) -> Tensor:
    """Draw the noise of one clip's losses, (1, 1, F', C, h, w), the same at all levels."""
    shape = clip.latents[:, None, model.first_predicted :].shape
    of_clip = generator("cpu", "probe loss", seed, clip.numbers[0])
    return torch.randn(shape, generator=of_clip).to(model.device)


@torch.no_grad()
def loss_by_level(
    model: CausalWorldModel,
    clips: ProbeClips,
    seed: int,
    intervention: Intervention = nullcontext,
    last_frame: bool = False,
) -> Tensor:
    """Measure the squared error of the velocity ε − x under teacher forcing, (n, levels).

    The mean is over every frame that can be predicted, or of the last frame only; see
    `errors_by_level`.
    """
    losses = []
    for clip in clips.parts(1):
        noise = loss_noise(model, clip, seed)
        computing = autocast(model.device, clip.precision)
        with intervention(clip), computing, float32_products(clip.precision):
            errors = errors_by_level(model, clip.latents, clip.conditions(model), noise)[0]
        losses.append(errors[:, -1] if last_frame else errors.mean(dim=1))
    return torch.stack(losses).cpu()


class FrameEvaluator:
    """Compares generated frames with the real ones; also by FVD, given at least `FVD_CLIPS` clips.

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
        # Also None where the weights of FVD's network are missing.
        fvd = enough and "fvd" in self.available.metrics
        self._real = i3d_features(clips.video) if fvd else None

    @torch.no_grad()
    def __call__(
        self, model: CausalWorldModel, intervention: Intervention = nullcontext
    ) -> FrameScores:
        """Generate the clips' new frames under an intervention, and score them."""
        known = self.clips.known
        scores: list[dict[str, Tensor]] = []
        features: list[Tensor] = []
        for part in self.clips.parts():
            with intervention(part):
                latents = roll_out(model, part, self.steps, self.seed)
            new = (self.codec.decode(latents) * 255).round() / 255
            scores.append(self.available.compare_frames(new, part.video[:, known:]))
            if self._real is not None:
                features.append(i3d_features(torch.cat([part.video[:, :known], new], dim=1)))
        metrics = {name: torch.cat([part[name] for part in scores]) for name in scores[0]}
        fvd = None if self._real is None else frechet_distance(self._real, torch.cat(features))
        return FrameScores(metrics, fvd)


def paired_difference(values: Tensor, others: Tensor) -> tuple[float, float]:
    """Average the clips' differences, (n, …) each; returns the mean and its standard error."""
    difference = (values - others).flatten(1).double().mean(dim=1)
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


class Estimate(NamedTuple):
    """A mean over clips and its 95 % interval, three tensors of one shape."""

    mean: Tensor
    low: Tensor
    high: Tensor


def bootstrap(
    values: Tensor, seed: int, statistic: Callable[[Tensor], Tensor] = torch.Tensor.clone
) -> Estimate:
    """Estimate a statistic of the clips' mean, with the percentiles of clips drawn again.

    Of few clips the percentiles lie too close together (of 4, they hold the mean in 78 % of cases).
    So they are moved away from the estimate as Student's t is wider than a normal distribution and
    as the variance is underestimated: for 16 clips by an eighth. One clip has no interval: NaN.

    Args:
        values: (n, …), of n clips.
        statistic: of means (…, *rest), as (…, *result); by default the means themselves.
    """
    n = len(values)
    drawn = torch.randint(n, (RESAMPLES, n), generator=generator("cpu", "bootstrap", seed))
    times_drawn = torch.zeros(RESAMPLES, n, dtype=torch.double)
    times_drawn.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.double))
    values = values.double()
    again = statistic(torch.einsum("rn,n...->r...", times_drawn / n, values))
    mean = statistic(values.mean(dim=0))
    bounds = again.quantile(torch.tensor([0.025, 0.975], dtype=torch.double), dim=0)
    widening = math.nan
    if n > 1:
        widening = t.ppf(0.975, n - 1) / norm.ppf(0.975) * math.sqrt(n / (n - 1))
    low, high = mean + widening * (bounds - mean)
    return Estimate(mean, low, high)


def relative_increase(loss: Tensor, reference: Tensor) -> tuple[float, float]:
    """Compare two losses, (n, levels) each: relative increase, and its standard error over clips.

    It is the mean of each level's ratio: otherwise the level with the largest loss would dominate.
    """
    loss, reference = loss.double(), reference.double()
    ratio = loss.mean(dim=0) / reference.mean(dim=0)
    # The error of a ratio of means, to first order: each clip's residual from the ratio.
    rest = ((loss - ratio * reference) / reference.mean(dim=0)).mean(dim=1)
    return float(ratio.mean() - 1), float(rest.std() / len(rest) ** 0.5)
