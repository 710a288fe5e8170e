"""A model under probe: measured unmodified and ablated, and fine-tuned for a few steps."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scd.analysis.figures import Panels
from scd.analysis.measurements import (
    FVD_CLIPS,
    FrameEvaluator,
    FrameScores,
    Intervention,
    ProbeClips,
    loss_by_level,
    paired_difference,
    relative_increase,
)
from scd.data.clips import clip_folder
from scd.data.loader import TrainingClips
from scd.errors import ScdError
from scd.evaluation.metrics import METRICS
from scd.flow.objective import with_scaled_latents
from scd.models import CausalWorldModel
from scd.models.autoencoder import Codec
from scd.models.load import LoadedModel
from scd.options import Options
from scd.training.build import make_objective
from scd.training.encode import check_training_latents
from scd.training.optimizer import make_optimizer
from scd.training.world_model_task import parameter_groups
from scd.utils.precision import autocast, has_bf16, resolve_precision
from scd.utils.table import Table

FRAME_METRICS = ("psnr", "lpips")
TOLERANCE = 0.05  # relative increase of the loss up to which a change counts as harmless
WARMUP = 10  # steps of a fine-tune


@dataclass(frozen=True)
class Measurement:
    """Loss and frame scores of a model, unmodified or ablated; either may be left out."""

    name: str
    loss: Tensor | None = None  # (n, levels)
    frames: FrameScores | None = None


class ProbedModel:
    """A loaded model with its probe clips, and its unmodified measurement to compare with.

    Args:
        steps: denoising steps per frame, in all probes.
        progress: a bar that advances with every measurement and training step.
        training: the clips to fine-tune on; None: no fine-tuning.
        fine_tune: training steps of a fine-tune.
        last_frame: measure the loss of the clips' last frame only, not of all frames.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        clips: ProbeClips,
        steps: int,
        progress: tqdm,
        training: TrainingClips | None = None,
        fine_tune: int = 0,
        last_frame: bool = False,
    ):
        self.loaded = loaded
        self.model: CausalWorldModel = loaded.model
        self.clips = clips
        self.steps = steps
        self.training = training
        self.fine_tune = fine_tune if training is not None else 0
        self.last_frame = last_frame
        self.progress = progress
        self.seed = loaded.options.seed
        self.evaluator = FrameEvaluator(loaded.codec, clips, steps, self.seed)
        self.unmodified = self.measure("unmodified", self.model)

    @property
    def tokens(self) -> int:
        return self.model.tokens_per_frame(*self.clips.latents.shape[-2:])

    def measure(
        self,
        name: str,
        model: CausalWorldModel,
        loss: bool = True,
        frames: bool = True,
        intervention: Intervention = nullcontext,
    ) -> Measurement:
        """Measure a model as it is now, under an intervention."""
        measurement = Measurement(
            name,
            self.loss(model, intervention) if loss else None,
            self.evaluator(model, intervention) if frames else None,
        )
        self.progress.update()
        return measurement

    def loss(self, model: CausalWorldModel, intervention: Intervention = nullcontext) -> Tensor:
        """Measure the loss by noise level, (n, levels)."""
        return loss_by_level(model, self.clips, self.seed, intervention, self.last_frame)

    def train(
        self, model: CausalWorldModel, options: Options, lr_scale: float = 1.0
    ) -> Iterator[int]:
        """Fine-tune a model; see `fine_tuning`."""
        assert self.training is not None
        for step in fine_tuning(
            model, self.loaded.codec, options, self.training, self.fine_tune, lr_scale
        ):
            self.progress.update()
            yield step

    @property
    def missing_metrics(self) -> dict[str, str]:
        """List the metrics that cannot be computed: name -> reason."""
        wanted = [*FRAME_METRICS, "fvd"] if len(self.clips) >= FVD_CLIPS else FRAME_METRICS
        missing = self.evaluator.available.missing
        return {metric: why for metric, why in missing.items() if metric in wanted}

    def difference(self, measurement: Measurement, metric: str) -> tuple[float, float]:
        """Compare a frame metric with the unmodified model's: difference, standard error."""
        assert measurement.frames is not None and self.unmodified.frames is not None
        return paired_difference(
            measurement.frames.metrics[metric], self.unmodified.frames.metrics[metric]
        )

    def loss_increase(self, measurement: Measurement) -> tuple[float, float]:
        """Compare the loss with the unmodified model's: relative increase, standard error."""
        assert measurement.loss is not None and self.unmodified.loss is not None
        return relative_increase(measurement.loss, self.unmodified.loss)

    def loss_percent(self, measurements: Sequence[Measurement]) -> np.ndarray:
        """Compute the increase of each loss in percent, (measurements, levels)."""
        assert self.unmodified.loss is not None
        base = self.unmodified.loss.mean(dim=0)
        losses = [m.loss.mean(dim=0) for m in measurements if m.loss is not None]
        return np.stack([100 * (loss / base - 1).numpy() for loss in losses])

    def frame_panels(self, curves: dict[str, list[Measurement | None]]) -> Panels:
        """Make a panel of `figures.differences` for each frame metric."""
        assert self.unmodified.frames is not None
        return {
            f"{_label(metric)}, difference": {
                name: [None if m is None else self.difference(m, metric) for m in curve]
                for name, curve in curves.items()
            }
            for metric in FRAME_METRICS
            if metric in self.unmodified.frames.metrics
        }

    def table(self, measurements: Sequence[Measurement]) -> Table:
        """Tabulate measurements: increase of the loss, differences of the frame metrics, FVD."""
        unmodified = self.unmodified
        assert unmodified.frames is not None and unmodified.loss is not None
        metrics = [metric for metric in FRAME_METRICS if metric in unmodified.frames.metrics]
        heads = ["", "loss"] + [_label(metric) for metric in metrics]
        absolute = [
            METRICS[metric].format(float(unmodified.frames.metrics[metric].mean()))
            for metric in metrics
        ]
        rows = [[unmodified.name, f"{unmodified.loss.mean():.4f}", *absolute]]
        for measurement in measurements:
            row = [measurement.name]
            row.append(
                "–" if measurement.loss is None else percent(self.loss_increase(measurement))
            )
            for metric in metrics:
                mean, error = self.difference(measurement, metric)
                digits = METRICS[metric].decimals
                row.append(f"{mean:+.{digits}f} ± {error:.{digits}f}")
            rows.append(row)
        if unmodified.frames.fvd is not None:
            heads.append(f"FVD (n={len(self.clips)})")
            for row, measurement in zip(rows, [unmodified, *measurements], strict=True):
                frames = measurement.frames
                row.append("–" if frames is None or frames.fvd is None else f"{frames.fvd:.1f}")
        notes = [
            f"Differences from the unmodified model, ± standard error over {len(self.clips)} "
            f"clips; mean of {self.clips.new_frames} new frames, {self.steps} steps, same noise."
        ]
        notes += [
            f"{metric.upper()} is missing: {why}" for metric, why in self.missing_metrics.items()
        ]
        return Table(heads, rows, 1, notes)

    def to_json(self, measurement: Measurement) -> dict[str, Any]:
        """Collect a measurement's numbers for `probe.json`."""
        out: dict[str, Any] = {"name": measurement.name}
        if measurement.loss is not None:
            out["loss_by_level"] = measurement.loss.mean(dim=0)
            out["loss_increase"] = self.loss_increase(measurement)
        if measurement.frames is not None:
            for metric, values in measurement.frames.metrics.items():
                out[metric] = float(values.mean())
                out[f"{metric}_difference"] = self.difference(measurement, metric)
            out["fvd"] = measurement.frames.fvd
        return out


def _label(metric: str) -> str:
    """Name a metric with its unit."""
    return ", ".join(filter(None, (METRICS[metric].title, METRICS[metric].unit)))


def percent(increase: tuple[float, float]) -> str:
    """Format a relative increase and its standard error, as `+3.4 ± 0.3 %`."""
    mean, error = (100 * value for value in increase)
    digits = 0 if abs(mean) >= 100 else 1
    return f"{mean:+.{digits}f} ± {error:.{digits}f} %"


def open_training_clips(loaded: LoadedModel) -> TrainingClips:
    """Open the training clips of the options, and read one to see that they can be read.

    Raises:
        ScdError: they cannot, or their latents are not what the options' autoencoder makes.
    """
    options, o = loaded.options, loaded.options.data
    try:
        data = clip_folder(options, o.train_list, o.source)
        if o.source == "latents":
            check_training_latents(data, loaded.codec, options)
        clips = TrainingClips(data, o.frames, o.frame_stride, options.seed, o.max_broken_clips)
        clips[0]
    except ScdError as error:
        raise ScdError(f"{error}; --fine-tune 0 probes without training data") from error
    return clips


def fine_tuning(
    model: CausalWorldModel,
    codec: Codec,
    options: Options,
    clips: TrainingClips,
    steps: int,
    lr_scale: float,
) -> Iterator[int]:
    """Train a model in place for a few steps; yields the number of steps done, from 0.

    Objective, optimizer and batches are those of the options, in one process. All models see the
    same clips: those that follow the ones of the options' own run.

    Args:
        lr_scale: factor on the options' learning rates, constant after a warmup.
    """
    yield 0
    t = options.train
    model.set_gradient_checkpointing(t.gradient_checkpointing)
    objective = make_objective(model, options.flow, options.seed)
    optimizer = make_optimizer(
        parameter_groups(model, options.optim), options.optim, has_bf16(model.device)
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    device = model.device
    precision = resolve_precision(t.mixed_precision, device)
    for step in range(steps):
        model.train()
        for part in range(t.gradient_accumulation):
            first = ((t.steps + step) * t.gradient_accumulation + part) * t.batch_size
            read = [clips[number] for number in range(first, first + t.batch_size)]
            batch = {key: torch.stack([clip[key] for clip in read]) for key in read[0]}
            samples = batch.pop("sample").tolist()
            batch = with_scaled_latents({k: v.to(device) for k, v in batch.items()}, codec)
            with autocast(device, precision):
                loss = objective({**batch, "sample": samples, "step": t.steps + step + 1})["loss"]
            (loss / t.gradient_accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.optim.max_grad_norm)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr_scale * rate * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.eval()
        yield step + 1
