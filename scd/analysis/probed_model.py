"""What all probes of a report share: the model, its clips, what it measures untouched."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from scd.analysis.figures import Panels
from scd.analysis.fine_tune import fine_tuning
from scd.analysis.probe_clips import ProbeClips
from scd.analysis.quality import (
    FVD_CLIPS,
    Around,
    FrameJudge,
    Frames,
    increase,
    loss_by_level,
    paired,
)
from scd.data.loader import TrainingClips
from scd.evaluation.metrics import METRICS
from scd.models import WorldModel
from scd.models.load import LoadedModel
from scd.options import Options
from scd.utils.table import Table

FRAME_METRICS = ("psnr", "lpips")
TOLERANCE = 0.05  # increase of the loss at which a change counts as harmless


@dataclass(frozen=True)
class Variant:
    """A changed model as it was measured; either measurement may be left out."""

    name: str
    loss: Tensor | None = None  # (n, levels)
    frames: Frames | None = None


class ProbedModel:
    """
    Args:
        steps: of a frame, in all probes.
        bar: to advance with every measurement and training step.
        training: the clips to fine-tune on; None: nothing is fine-tuned.
        fine_tune: steps.
        last_frame: the loss is that of the clips' last frame only, not of all.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        clips: ProbeClips,
        steps: int,
        bar: tqdm,
        training: TrainingClips | None = None,
        fine_tune: int = 0,
        last_frame: bool = False,
    ):
        self.loaded = loaded
        self.model: WorldModel = loaded.model
        self.clips = clips
        self.steps = steps
        self.training = training
        self.fine_tune = fine_tune if training is not None else 0
        self.last_frame = last_frame
        self.bar = bar
        self.seed = loaded.options.seed
        self.judge = FrameJudge(loaded.codec, clips, steps, self.seed)
        self.untouched = self.measure("untouched", self.model)

    @property
    def tokens(self) -> int:
        return self.model.tokens_per_frame(*self.clips.latents.shape[-2:])

    def measure(
        self,
        name: str,
        model: WorldModel,
        loss: bool = True,
        frames: bool = True,
        around: Around = nullcontext,
    ) -> Variant:
        """The model as it is now."""
        variant = Variant(
            name,
            self.loss(model, around) if loss else None,
            self.judge(model, around) if frames else None,
        )
        self.bar.update()
        return variant

    def loss(self, model: WorldModel, around: Around = nullcontext) -> Tensor:
        """(n, levels)."""
        return loss_by_level(model, self.clips, self.seed, around, self.last_frame)

    def train(self, model: WorldModel, options: Options, share: float = 1.0) -> Iterator[int]:
        """See `fine_tuning`."""
        assert self.training is not None
        for step in fine_tuning(
            model, self.loaded.codec, options, self.training, self.fine_tune, share
        ):
            self.bar.update()
            yield step

    @property
    def missing(self) -> dict[str, str]:
        """Metrics that would be measured, and why they are not."""
        wanted = [*FRAME_METRICS, "fvd"] if len(self.clips) >= FVD_CLIPS else FRAME_METRICS
        missing = self.judge.available.missing
        return {metric: why for metric, why in missing.items() if metric in wanted}

    def difference(self, variant: Variant, metric: str) -> tuple[float, float]:
        """Compare a frame metric with the untouched model's: difference, standard error."""
        assert variant.frames is not None and self.untouched.frames is not None
        return paired(variant.frames.metrics[metric], self.untouched.frames.metrics[metric])

    def loss_increase(self, variant: Variant) -> tuple[float, float]:
        """As a share, mean over noise levels, with its standard error over clips."""
        assert variant.loss is not None and self.untouched.loss is not None
        return increase(variant.loss, self.untouched.loss)

    def loss_percent(self, variants: Sequence[Variant]) -> np.ndarray:
        """(variants, levels), the increase in percent."""
        assert self.untouched.loss is not None
        base = self.untouched.loss.mean(dim=0)
        losses = [variant.loss.mean(dim=0) for variant in variants if variant.loss is not None]
        return np.stack([100 * (loss / base - 1).numpy() for loss in losses])

    def frame_panels(self, lines: dict[str, list[Variant | None]]) -> Panels:
        """For `figures.differences`: a panel for each metric of the frames."""
        assert self.untouched.frames is not None
        return {
            f"{_label(metric)}, difference": {
                name: [None if v is None else self.difference(v, metric) for v in line]
                for name, line in lines.items()
            }
            for metric in FRAME_METRICS
            if metric in self.untouched.frames.metrics
        }

    def table(self, variants: Sequence[Variant]) -> Table:
        """A line for each: increase of the loss, difference of the frames' metrics, FVD."""
        untouched = self.untouched
        assert untouched.frames is not None
        metrics = [metric for metric in FRAME_METRICS if metric in untouched.frames.metrics]
        heads = ["", "loss"] + [_label(metric) for metric in metrics]
        lines = []
        plain = [
            METRICS[metric].format(float(untouched.frames.metrics[metric].mean()))
            for metric in metrics
        ]
        assert untouched.loss is not None
        lines.append(["untouched", f"{untouched.loss.mean():.4f}", *plain])
        for variant in variants:
            line = [variant.name]
            line.append("–" if variant.loss is None else percent(self.loss_increase(variant)))
            for metric in metrics:
                mean, error = self.difference(variant, metric)
                digits = METRICS[metric].decimals
                line.append(f"{mean:+.{digits}f} ± {error:.{digits}f}")
            lines.append(line)
        if untouched.frames.fvd is not None:
            heads.append(f"FVD (n={len(self.clips)})")
            for line, variant in zip(lines, [untouched, *variants], strict=True):
                frames = variant.frames
                line.append("–" if frames is None or frames.fvd is None else f"{frames.fvd:.1f}")
        notes = [
            f"Differences to the untouched model, ± standard error over {len(self.clips)} clips; "
            f"mean of {self.clips.new_frames} new frames, {self.steps} steps, the same noise."
        ]
        notes += [f"{metric.upper()} is missing: {why}" for metric, why in self.missing.items()]
        return Table(heads, lines, 1, notes)

    def numbers(self, variant: Variant) -> dict[str, Any]:
        """For the JSON."""
        out: dict[str, Any] = {"name": variant.name}
        if variant.loss is not None:
            out["loss_by_level"] = variant.loss.mean(dim=0)
            out["loss_increase"] = self.loss_increase(variant)
        if variant.frames is not None:
            for metric, values in variant.frames.metrics.items():
                out[metric] = float(values.mean())
                out[f"{metric}_difference"] = self.difference(variant, metric)
            out["fvd"] = variant.frames.fvd
        return out


def _label(metric: str) -> str:
    """Name a metric with its unit."""
    return ", ".join(filter(None, (METRICS[metric].title, METRICS[metric].unit)))


def percent(share: tuple[float, float]) -> str:
    """A share and its standard error."""
    mean, error = (100 * value for value in share)
    digits = 0 if abs(mean) >= 100 else 1
    return f"{mean:+.{digits}f} ± {error:.{digits}f} %"
