"""The rollout: encode once per frame, denoise T times. Everything that makes frames uses it."""

from collections.abc import Iterable, Iterator

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from scd.errors import ScdError
from scd.flow.sampler import euler, guide, noise_levels
from scd.models.scd import MAX_TIMESTEP, SCD, next_conditions
from scd.rollout.cache import KVCache

Generators = torch.Generator | list[torch.Generator] | None


class Rollout:
    """Generates frames one after another, like an environment: `reset`, then `step` by `step`.

    Args:
        num_steps: T, Euler steps a frame.
        guidance: `context`: the negative branch has a perturbed context (one encoder pass);
            `condition`: it has the null action or label in encoder and decoder; `none`.
        guidance_scale: w in v = v⁻ + w·(v⁺ − v⁻); 1 is no guidance.
        guidance_noise: η of the perturbed context.
        max_frames: context and new frames that one rollout may have.

    Raises:
        ScdError: guidance that the model cannot give; see also `reset` and `step`.
    """

    def __init__(
        self,
        model: SCD,
        *,
        num_steps: int,
        max_frames: int,
        guidance: str = "context",
        guidance_scale: float = 1.0,
        guidance_noise: float = 0.05,
    ):
        if guidance not in ("none", "context", "condition"):
            raise ScdError(f"guidance is {guidance!r}, not one of none, context, condition")
        self.guidance = guidance if guidance_scale != 1.0 else "none"
        if self.guidance == "condition" and model.config.condition == "none":
            raise ScdError("condition guidance needs a model with a condition")
        self.model = model
        self.levels = noise_levels(num_steps)
        self.guidance_scale = guidance_scale
        self.guidance_noise = guidance_noise
        self.max_frames = max_frames
        self._newest: Tensor | None = None

    @torch.no_grad()
    def reset(
        self,
        context: Tensor,
        actions: Tensor | None = None,
        labels: Tensor | None = None,
        generator: Generators = None,
    ) -> None:
        """Start from given frames.

        Args:
            context: (B, K, C, H, W), at least one frame.
            actions: (B, K), the action that led to each of them.
            labels: (B,).
            generator: one for the batch, or one a sample: then a sample's frames do not depend
                on the batch it is in.
        """
        batch, frames, _, height, width = context.shape
        if frames < 1:
            raise ScdError("a rollout needs at least one context frame")
        model = self.model
        context = context.to(model.device)
        self._labels = None if labels is None else labels.to(model.device)
        self._generator = generator
        self._batch = batch
        tokens = model.tokens_per_frame(height, width)
        branches = 2 if self.guidance == "condition" else 1
        self._cache = KVCache(model, branches * batch, self.max_frames, tokens)
        actions = None if actions is None else actions.to(model.device)
        conditions = model.frame_conditions((batch, frames), actions, self._labels)
        # All but the newest frame, whose context needs the action that is yet to come.
        if frames > 1:
            earlier = next_conditions(conditions)
            earlier = None if earlier is None else earlier[:, :-1]
            model.encoder.hidden(*self._branches(context[:, :-1], earlier), self._cache)
        self._newest = context[:, -1:]

    @torch.no_grad()
    def step(self, action: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Generate the next frame.

        Args:
            action: (B,), the action that leads to it; None: the null action.
            noise: (B, C, H, W), the frame's initial noise; None: from the generator.

        Returns:
            (B, C, H, W), float32.

        Raises:
            ScdError: before `reset`, or beyond `max_frames`.
        """
        if self._newest is None:
            raise ScdError("step before reset")
        model = self.model
        actions = None if action is None else action.to(model.device)[:, None]
        condition = model.frame_conditions((self._batch, 1), actions, self._labels)
        hidden, e = model.encoder.hidden(*self._branches(self._newest, condition), self._cache)
        context = model.encoder.norm_out(hidden, e)
        if noise is None:
            noise = self._randn(self._newest.shape[2:])
        if self.guidance == "context":
            zeta = self._randn(hidden.shape[2:])[:, None].type_as(hidden)
            perturbed = model.encoder.norm_out(hidden, e, self.guidance_noise * zeta)
            context = torch.cat([context, perturbed])
            if condition is not None:
                condition = torch.cat([condition, condition])
        elif self.guidance == "condition":
            assert condition is not None
            condition = torch.cat([condition, torch.full_like(condition, model.null_condition)])
        copies = context.shape[0] // self._batch

        def velocity(x: Tensor, sigma: float) -> Tensor:
            timesteps = torch.full((context.shape[0], 1), sigma * MAX_TIMESTEP, device=x.device)
            v = model.decode(x.repeat(copies, 1, 1, 1, 1), timesteps, context, condition)
            if copies == 1:
                return v
            positive, negative = v.chunk(2)
            return guide(positive, negative, self.guidance_scale)

        start = noise.to(model.device, torch.float32)[:, None]
        self._newest = euler(velocity, start, self.levels)
        return self._newest[:, 0]

    def stream(self, actions: Iterable[Tensor | None]) -> Iterator[Tensor]:
        """A frame (B, C, H, W) for every action (B,), as soon as it is done."""
        for action in actions:
            yield self.step(action)

    def _branches(self, latents: Tensor, conditions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Condition guidance keeps a second history, which has never seen a condition."""
        if self.guidance != "condition":
            return latents, conditions
        assert conditions is not None
        null = torch.full_like(conditions, self.model.null_condition)
        return torch.cat([latents, latents]), torch.cat([conditions, null])

    def _randn(self, shape: tuple[int, ...]) -> Tensor:
        return randn_tensor((self._batch, *shape), self._generator, self.model.device)


def generate(
    model: SCD,
    context: Tensor,
    *,
    actions: Tensor | None = None,
    labels: Tensor | None = None,
    num_frames: int,
    num_steps: int,
    guidance_scale: float = 1.0,
    guidance: str = "context",
    guidance_noise: float = 0.05,
    noise: Tensor | None = None,
    generator: Generators = None,
) -> Tensor:
    """Continue videos by `num_frames` frames.

    Args:
        context: latents (B, K, C, H, W).
        actions: (B, K + num_frames), of the context and of the new frames.
        labels: (B,).
        noise: (B, num_frames, C, H, W), initial noise of the new frames.

    Returns:
        The new frames, (B, num_frames, C, H, W).

    Raises:
        ScdError: shapes that do not fit together.
    """
    known = context.shape[1]
    if actions is not None and tuple(actions.shape) != (context.shape[0], known + num_frames):
        raise ScdError(
            f"actions are {tuple(actions.shape)}, expected "
            f"{(context.shape[0], known + num_frames)}: one a context frame and one a new frame"
        )
    if noise is not None and noise.shape[:2] != (context.shape[0], num_frames):
        raise ScdError(f"noise is {tuple(noise.shape)}, expected (batch, {num_frames}, C, H, W)")
    rollout = Rollout(
        model,
        num_steps=num_steps,
        max_frames=known + num_frames,
        guidance=guidance,
        guidance_scale=guidance_scale,
        guidance_noise=guidance_noise,
    )
    rollout.reset(context, None if actions is None else actions[:, :known], labels, generator)
    frames = [
        rollout.step(
            None if actions is None else actions[:, known + i],
            None if noise is None else noise[:, i],
        )
        for i in range(num_frames)
    ]
    return torch.stack(frames, dim=1)
