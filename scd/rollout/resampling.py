"""Histories that follow a clip and yet have the model's own errors: Resampling Forcing.

Teacher forcing shows a model nothing but real frames as history; in a rollout its own errors are
there too, and grow. Whole own rollouts would show them, but after a second of video they are
elsewhere than the clip, whose frames then are no continuation of them. Between the two: the first
frames stay real, and every later one is noised to one level, and denoised after the own frames
before it (arXiv 2512.15702). At a low level they stay near the clip, at level 1 they are a rollout.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scd.flow.objective import FlowObjective
from scd.models.world_model import CausalWorldModel
from scd.options import FlowOptions, RolloutOptions
from scd.rollout.engine import Rollout
from scd.utils.precision import Precision, without_autocast
from scd.utils.seeding import generator
from scd.utils.sharding import unsharded

STEPS = 2  # for each frame, of a model that takes many
MAX_GIVEN = 12  # real frames that a resampled clip begins with


class Resampling(NamedTuple):
    """How all clips of a training step are resampled, on all processes."""

    sigma: float  # the level that frames are noised to
    given: int  # frames at the start that stay real


def draw_resampling(options: FlowOptions, seed: int, step: int, frames: int) -> Resampling | None:
    """Draw whether a step's clips are resampled, a level and a number of given frames."""
    of_step = generator("cpu", seed, "resampling", step)
    if float(torch.rand((), generator=of_step)) >= options.self_forcing_prob:
        return None
    lowest, highest = options.self_forcing_sigma
    sigma = lowest + (highest - lowest) * float(torch.rand((), generator=of_step))
    most = max(1, min(MAX_GIVEN, frames - 2))  # no frame follows the last one
    given = int(torch.randint(1, most + 1, (), generator=of_step))
    return Resampling(sigma, given)


class ResamplingObjective(FlowObjective):
    """The flow-matching loss of a batch, in a share of steps under histories of the model's own.

    Its `forward` needs the training step's number, `step`, in the batch.
    """

    def own_history(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Resample the clips, if it is a step that shows such histories."""
        return own_history(self.model, self.options, self.seed, batch, STEPS)


def own_history(
    model: CausalWorldModel, options: FlowOptions, seed: int, batch: dict[str, Tensor], steps: int
) -> Tensor | None:
    """Resample the clips of a training step, see `draw_resampling`; None: it shows real frames.

    Collective where weights are sharded. What it draws depends on the seed, the step and each
    clip's number, not on the batch or on the number of processes.
    """
    if not options.self_forcing_prob:
        return None
    latents = batch["latents"]
    how = draw_resampling(options, seed, int(batch["step"]), latents.shape[1])
    if how is None:
        return None
    generators = [generator("cpu", seed, "resampled", int(number)) for number in batch["sample"]]
    actions, labels, text = (batch.get(key) for key in ("actions", "label", "text"))
    return resample(model, latents, how, generators, actions, labels, text, steps)


@torch.no_grad()
def resample(
    model: CausalWorldModel,
    frames: Tensor,
    how: Resampling,
    generators: list[torch.Generator],
    actions: Tensor | None = None,
    labels: Tensor | None = None,
    text: Tensor | None = None,
    steps: int = STEPS,
) -> Tensor:
    """Make clips (B, F, C, H, W) anew: frame after frame, out of the clips' noised frames.

    Args:
        generators: one for each clip.
        actions: (B, F) or (B, F, V).
        labels: (B,).
        text: (B, T, text_dim), for a model that `has_text`.
        steps: of denoising, for each frame.
    """
    device = frames.device.type
    in_bf16 = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    precision: Precision = "bf16" if in_bf16 else "fp32"  # that of the training step
    settings = RolloutOptions(steps, "multistep", guidance="none", precision=precision)
    levels = [how.sigma * (1 - step / steps) for step in range(steps + 1)]
    real = frames[:, how.given :]
    noise = torch.stack([torch.randn(real.shape[1:], generator=g) for g in generators]).to(real)
    noisy = how.sigma * noise + (1 - how.sigma) * real  # (B, F', C, H, W)
    with without_autocast(frames.device), unsharded(model):
        rollout = Rollout(model, settings, frames.shape[1], levels)
        known = None if actions is None else actions[:, : how.given]
        rollout.reset(frames[:, : how.given], known, labels, generators, text)
        made = [*frames[:, : how.given].unbind(dim=1)]
        for number, frame in enumerate(noisy.unbind(dim=1), how.given):
            made.append(rollout.step(None if actions is None else actions[:, number], frame))
    return torch.stack(made, dim=1)
