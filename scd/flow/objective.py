"""The training objectives: flow matching on every frame, given the frames before it or a prefix.

With σ = t/1000: x_t = σ·ε + (1−σ)·x, and the loss is the mean squared error of the velocity ε − x.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from scd.data.clips import with_float_pixels
from scd.flow.noise import FlowDraws, draw_noise
from scd.models.world_model import (
    CLEAN_TIMESTEP,
    MAX_TIMESTEP,
    FirstLook,
    WorldModel,
)
from scd.options import FlowOptions

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # noise levels σ that models are measured at


class NoisyFrames(NamedTuple):
    """K draws of every frame, at a noise level each."""

    noisy: Tensor  # (B, K, F, C, H, W)
    target: Tensor  # (B, K, F, C, H, W), the velocity
    sigmas: Tensor  # (B, K, F)


class Scaling(Protocol):
    """What makes latents of pixels, and scales latents, as far as it is used here."""

    def scale(self, latents: Tensor) -> Tensor: ...

    def encode(self, video: Tensor) -> Tensor: ...


@torch.no_grad()
def with_scaled_latents(batch: dict[str, Tensor], codec: Scaling) -> dict[str, Tensor]:
    """Replace a batch's `video` (B, F, 3, H, W), or its unscaled `latents`, by scaled latents.

    It runs before the objective, not in it: what accelerate wraps is sharded, kept in step between
    processes and autocast. A frozen autoencoder cannot be sharded, and need not be the others.
    """
    if "latents" in batch:
        return {**batch, "latents": codec.scale(batch["latents"])}
    rest = {key: value for key, value in batch.items() if key != "video"}
    return {**rest, "latents": codec.encode(with_float_pixels(batch)["video"])}


class FlowObjective(nn.Module):
    """The flow-matching loss of a batch, for the training loop.

    Frame 0 has no loss, unless the model predicts first frames. All K noise draws of a clip share
    one pass over the clean frames and the same actions.
    """

    def __init__(self, model: WorldModel, options: FlowOptions, seed: int):
        super().__init__()
        self.model = model
        self.options = options
        self.seed = seed

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of clips as `with_scaled_latents` gives them.

        Args:
            batch: `sample`, the clips' numbers, as a list or on the CPU (reading them from a GPU
                would wait for it); `latents` (B, F, C, h, w); `actions` (B, F) or (B, F, V), or
                `label` (B,), where the model has such conditions; their values are not checked
                again here. Where the model has a text, `text` (B, T, text_dim), and `null_text`
                (1, T, text_dim) for no text.
        """
        latents = batch["latents"]
        tokens = self.model.tokens_per_frame(*latents.shape[-2:])
        draws = draw_noise(
            self.options,
            self.seed,
            [int(number) for number in batch["sample"]],
            latents,
            (tokens, self.model.width) if self._perturbs else None,
            self.model.takes_first_look,
        )
        conditions = self.model.frame_conditions(
            latents.shape[:2], batch.get("actions"), batch.get("label")
        )
        text = dropped_text(batch, draws.drop_condition)
        history = self.own_history(batch)
        return {"loss": self.loss(latents, conditions, draws, text, history)}

    def own_history(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Return what the frames come after instead of the clips' own frames, if anything."""
        return None

    @property
    def _perturbs(self) -> bool:
        """Whether contexts are perturbed: the dense baseline has none."""
        return self.model.has_context and self.options.context_noise > 0

    def loss(
        self,
        latents: Tensor,
        conditions: Tensor | None,
        draws: FlowDraws,
        text: Tensor | None = None,
        history: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss for given noise.

        Args:
            latents: (B, F, C, H, W), clean.
            conditions: (B, F) or (B, F, V + 1); those of clips that `draws` drops still among them.
            text: (B, T, text_dim), with those that are dropped replaced already.
            history: as `latents`, which the frames come after instead; with `encoder_input` clean.
        """
        first = self.model.first_predicted
        frames = self._add_noise(latents, draws)
        conditions = drop_conditions(self.model, conditions, draws.drop_condition)
        perturbation = None
        if draws.context_noise is not None:
            perturbation = self.options.context_noise * draws.context_noise[:, first:]
        velocity = self.model(
            self._history(latents if history is None else history, frames, draws),  # (B, F, ...)
            frames.noisy[:, :, first:],  # (B, K, F', C, H, W)
            frames.sigmas[:, :, first:] * MAX_TIMESTEP,  # (B, K, F')
            conditions,
            perturbation=perturbation,  # (B, F', N, D)
            first_look=draws.first_look(latents, first),
            text=text,
        )  # (B, K, F', C, H, W)
        return (velocity - frames.target[:, :, first:]).square().mean()

    def _add_noise(self, latents: Tensor, draws: FlowDraws) -> NoisyFrames:
        """Mix frames with noise: x_t = σ·ε + (1−σ)·x, at logit-normal σ.

        σ is continuous; the paper's code rounds it to one of 1,000 levels.
        """
        clean = latents[:, None]
        sigmas = torch.sigmoid(self.options.logit_mean + self.options.logit_std * draws.level)
        sigma = sigmas[..., None, None, None]
        noisy = sigma * draws.noise + (1 - sigma) * clean
        if self.model.prediction == "velocity":
            return NoisyFrames(noisy, draws.noise - clean, sigmas)
        # The same lower bound as the model divides by: a right clean frame has no loss.
        return NoisyFrames(noisy, (noisy - clean) / sigma.clamp(min=self.model.sigma_min), sigmas)

    def _history(self, history: Tensor, frames: NoisyFrames, draws: FlowDraws) -> Tensor:
        """Make what the model sees of a history (B, F, C, H, W): clean, or with noise in it."""
        options = self.options
        if options.encoder_input == "noisy":
            return frames.noisy[:, 0]
        if options.encoder_input == "mixed":
            return torch.where(_over_frames(draws.clean_frame), history, frames.noisy[:, 0])
        if options.history_noise_max:
            # A frame is predicted from other noise than that of its history.
            sigma = _over_frames(draws.history_noise[:, None])
            history = sigma * draws.noise[:, 0] + (1 - sigma) * history
        return history


class JointObjective(FlowObjective):
    """The flow-matching loss of a bidirectional model: a clip's frames together, after a prefix.

    Every draw has one noise level for all its noisy frames, and its own number of given frames
    before them (`flow.prefix_frames`), which have no loss.
    """

    def loss(
        self,
        latents: Tensor,
        conditions: Tensor | None,
        draws: FlowDraws,
        text: Tensor | None = None,
        history: Tensor | None = None,
    ) -> Tensor:
        first = self.model.first_predicted
        one_level = draws.level[:, :, :1].expand_as(draws.level)
        frames = self._add_noise(latents, draws._replace(level=one_level))
        lowest, highest = self.options.prefix_frames
        prefix = lowest + (draws.prefix * (highest - lowest + 1)).floor()  # (B, K)
        positions = torch.arange(first, latents.shape[1], device=latents.device)
        new = positions >= prefix[..., None]  # (B, K, F')
        timesteps = frames.sigmas[:, :, first:] * MAX_TIMESTEP
        velocity = self.model(
            latents,  # (B, F, C, H, W)
            frames.noisy[:, :, first:],  # (B, K, F', C, H, W)
            torch.where(new, timesteps, CLEAN_TIMESTEP),  # (B, K, F')
            drop_conditions(self.model, conditions, draws.drop_condition),
            text=text,
        )  # (B, K, F', C, H, W)
        errors = (velocity - frames.target[:, :, first:]).square().mean(dim=(3, 4, 5))
        return ((errors * new).sum(dim=2) / new.sum(dim=2)).mean()


def drop_conditions(model: WorldModel, conditions: Tensor | None, dropped: Tensor) -> Tensor | None:
    """Replace the conditions (B, F) or (B, F, V + 1) of the clips in `dropped` (B,) by null."""
    if conditions is None:
        return None
    null = model.null_conditions(conditions.shape[:2])
    return torch.where(dropped[(..., *[None] * (conditions.ndim - 1))], null, conditions)


def dropped_text(batch: dict[str, Tensor], dropped: Tensor) -> Tensor | None:
    """Take a batch's `text` (B, T, text_dim), with `null_text` for the clips in `dropped` (B,)."""
    if "text" not in batch:
        return None
    return torch.where(dropped[:, None, None], batch["null_text"], batch["text"])


def errors_by_level(
    model: WorldModel,
    latents: Tensor,
    conditions: Tensor | None,
    noise: Tensor,
    prefix: int = 0,
    levels: Sequence[float] = LEVELS,
    first_look: FirstLook | None = None,
    text: Tensor | None = None,
) -> Tensor:
    """Measure the squared error of the velocity ε − x, (B, levels, frames).

    Causal models are given all frames before each, a bidirectional one `prefix` frames.

    Args:
        latents: (B, F, C, H, W), clean.
        conditions: (B, F).
        noise: (B, 1, F', C, H, W), ε of the frames that can be predicted, the same at all levels.
        prefix: first frames that are given and not measured, if the model must have any.
        levels: noise levels σ.
        first_look: at the frames F', for a model that `takes_first_look`; best pure, as in a
            rollout.
        text: (B, T, text_dim), for a model that `has_text`.
    """
    sigmas = torch.tensor(levels, device=latents.device).clamp(min=model.sigma_min)
    clean = latents[:, None, model.first_predicted :]
    # The levels are draws of one clip, which share a pass over its clean frames.
    sigma = sigmas[None, :, None, None, None, None]
    noisy = sigma * noise + (1 - sigma) * clean
    times = (MAX_TIMESTEP * sigmas)[None, :, None].repeat(len(noisy), 1, noisy.shape[2])
    given = max(prefix - model.first_predicted, 0)
    times[:, :, :given] = CLEAN_TIMESTEP
    velocity = model(latents, noisy, times, conditions, first_look=first_look, text=text)
    return (velocity - (noise - clean)).square().mean(dim=(3, 4, 5))[:, :, given:]


def _over_frames(values: Tensor) -> Tensor:
    """Reshape values (B, F) to broadcast over frames: (B, F, 1, 1, 1)."""
    return values[:, :, None, None, None]
