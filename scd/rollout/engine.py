"""The rollout: encode once per frame, denoise T times. Everything that makes frames uses it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from scd.errors import ScdError
from scd.flow.sampler import Generators, guide, integrate, noise_levels
from scd.models.cpu import PackedWeights
from scd.models.world_model import MAX_TIMESTEP, CausalWorldModel, FrameDenoiser, WorldModel
from scd.options import Guidance, RolloutOptions, check_rollout
from scd.rollout.cache import KVCache, Window
from scd.rollout.conditions import RolloutConditions
from scd.rollout.joint import denoise_jointly
from scd.utils.precision import float32_products, resolve_precision, with_weights_in

SLIDING_FRAMES = 64  # that slide in at once; bounds their memory


class Rollout:
    """Generates frames one after another, like an environment: `reset`, then `step` by `step`.

    Guidance `context`: the negative branch has a perturbed context (one encoder pass; SCD only);
    `condition`: it has the null action or label everywhere, and the negative text.

    Where a model denoises chunks of frames, each frame of a chunk is given out by a step of its
    own; contexts, window and sink frames must be whole chunks.

    A model in bf16 computes in bf16 unless `settings.precision` says more than the default: as
    diffusers' `torch_dtype` promises, but in float32 where bf16 is slow. A model whose weights are
    of another type is copied: whoever makes many rollouts brings it in the right one
    (`scd.utils.precision.with_weights_in`).

    Args:
        settings: how a frame is made, and how much of the past it sees.
        max_frames: of context and new frames together, where `settings.window` is 0.

    Raises:
        ScdError: settings that the model cannot follow; see also `reset` and `step`.
    """

    def __init__(self, model: WorldModel, settings: RolloutOptions, max_frames: int = 0):
        s = settings
        check_rollout(s)
        self.guidance = s.guidance if s.guidance_scale != 1.0 else "none"
        if self.guidance == "condition" and model.condition == "none" and not model.has_text:
            raise ScdError("condition guidance needs a model with a condition")
        if self.guidance == "context" and not model.has_context:
            raise ScdError(
                f"{type(model).__name__} has no separate context to perturb: use guidance "
                f"condition or none"
            )
        unsaid = s.precision == "fp32"  # the default
        wanted = "auto" if model.dtype == torch.bfloat16 and unsaid else s.precision
        self.precision = resolve_precision(wanted, model.device)
        if not isinstance(model, CausalWorldModel):
            raise ScdError(
                f"{type(model).__name__} denoises all frames of a clip at once: it cannot be "
                f"rolled out frame by frame"
            )
        self.model = model = with_weights_in(model, self.precision)
        self.settings = settings
        if s.compile:
            model.compile_steps()
        self.levels = noise_levels(s.steps, s.spacing, s.shift)
        self._timesteps = MAX_TIMESTEP * torch.tensor(self.levels[:-1], device=model.device)
        self._chunk = model.chunk_frames
        if s.window:
            window, sink = self._chunks(s.window, "window"), self._chunks(s.sink_frames, "sink")
            sink = sink + model.start_slots if sink else 0
            slots = window + model.start_slots + model.noisy_slots
            self.window = Window(slots, "slide", sink)
        else:
            self.window = Window(-(-max_frames // self._chunk), "error")
        # Called between the two parts of a step, for whoever times the encoder and the denoising.
        self.on_encoded: Callable[[], object] = lambda: None
        self._newest: Tensor | None = None
        self._waiting: list[Tensor] = []  # the rest of the newest chunk

    @torch.no_grad()
    def reset(
        self,
        context: Tensor,
        actions: Tensor | None = None,
        labels: Tensor | None = None,
        generator: Generators = None,
        text: Tensor | None = None,
        negative_text: Tensor | None = None,
    ) -> None:
        """Start from given frames.

        Args:
            context: (B, K, C, H, W); K may be 0 for a model that predicts first frames.
            actions: (B, K) or (B, K, V), the action that led to each of them.
            labels: (B,).
            generator: one for the batch, or one a sample: then a sample's frames do not depend
                on the batch it is in.
            text, negative_text: see `set_text`.
        """
        batch, frames, _, height, width = context.shape
        if frames < self.model.first_predicted:
            raise ScdError(
                "a rollout needs at least one context frame: this model was not trained to predict "
                "first frames (model.first_frame)"
            )
        known = (self._chunks(frames, "context") - 1) * self._chunk
        model = self.model
        guided = self.guidance == "condition"
        conditions = RolloutConditions(model, batch, labels, self._timesteps, guided)
        frame_conditions = conditions.frame_conditions(actions, frames)
        self._conditions = conditions
        self._packed = PackedWeights(model)
        self._graph: Callable[..., Tensor] | None = None  # made for the shapes of this reset
        context = context.to(model.device)
        self._generator = generator
        self._batch = batch
        tokens = model.tokens_per_frame(height, width)
        self.cache = KVCache(model, (1 + guided) * batch, self.window, tokens * self._chunk)
        self._newest, self._newest_condition = context[:, -self._chunk :], frame_conditions[:, -1:]
        self._waiting = []
        if model.has_text or text is not None:
            self.set_text(text, negative_text)
        # All but the newest frame, which may need the action that is yet to come. What the window
        # holds goes in at once, the rest slides in.
        fits = (self.window.frames - model.start_slots) * self._chunk
        at_once = SLIDING_FRAMES // self._chunk * self._chunk
        with self._packed.in_use(), float32_products(self.precision):
            if frames > model.first_predicted:
                self._prefill(context, frame_conditions, 0, min(known, fits))
            for first in range(fits, known, at_once):
                last = min(first + at_once, known)
                self._prefill(context, frame_conditions, first, last)

    @torch.no_grad()
    def set_text(self, text: Tensor | None, negative_text: Tensor | None = None) -> None:
        """Give the frames to come another text; those in the KV cache keep theirs.

        Args:
            text: (B, T, text_dim), the text encoder's output.
            negative_text: as `text`, what condition guidance leads away from.

        Raises:
            ScdError: a text is missing, or has another shape; the model takes none; or before
                `reset`.
        """
        if self._newest is None:
            raise ScdError("set_text before reset")
        model, given = self.model, [text]
        if self.guidance == "condition":
            given.append(negative_text)
        texts = [model.check_text(one, self._batch).to(model.device) for one in given]
        if len({one.shape for one in texts}) > 1:
            raise ScdError("text and negative_text differ in length: pad them")
        with float32_products(self.precision):
            self.cache.text = model.precompute_text(torch.cat(texts))

    @torch.no_grad()
    def step(self, action: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Generate the next frame.

        Args:
            action: (B,) or (B, V), the action that leads to it; None: the null action.
            noise: (B, C, H, W), the frame's initial noise, unless frames come in chunks; None: from
                the generator.

        Returns:
            (B, C, H, W), float32.

        Raises:
            ScdError: before `reset`, beyond `max_frames`, or noise of a frame of a chunk.
        """
        if self._newest is None:
            raise ScdError("step before reset")
        if noise is not None and self._chunk > 1:
            raise ScdError(f"frames come in chunks of {self._chunk}: give a generator, not noise")
        if self._waiting:
            return self._waiting.pop(0)
        model = self.model
        action = None if action is None else action[:, None]
        condition = self._conditions.frame_conditions(action, 1)
        ids, next_ids, modulation = self._conditions.modulation(
            self._newest_condition, condition, denoised=True
        )
        tokens = model.tokens_per_frame(*self._newest.shape[-2:])
        if noise is None:
            each = [self._randn(self._newest.shape[2:]) for _ in range(self._chunk)]
            start = torch.stack(each, dim=1)  # (B, 1, C, H, W), or a chunk
        else:
            start = noise[:, None]
        start = start.to(model.device, torch.float32)
        perturbation = None
        if self.guidance == "context":
            context_noise = self._randn((tokens, model.width))[:, None]
            perturbation = self.settings.guidance_noise * context_noise
        with self._packed.in_use(), float32_products(self.precision):
            denoiser = model.begin_frame(
                self._both(self._newest),
                ids,
                next_ids,
                self.cache,
                modulation,
                perturbation,
                self._both(start),
            )
            self.on_encoded()
            self._newest = self._denoise(denoiser, start)
        self._newest_condition = condition
        frame, *self._waiting = self._newest.unbind(dim=1)
        return frame

    def stream(self, actions: Iterable[Tensor | None]) -> Iterator[Tensor]:
        """Yield a frame (B, C, H, W) for every action (B,) or (B, V), as soon as it is done."""
        for action in actions:
            yield self.step(action)

    def _chunks(self, frames: int, what: str) -> int:
        """Count the chunks of some frames, which must be whole."""
        chunks, rest = divmod(frames, self._chunk)
        if rest:
            raise ScdError(f"{what} of {frames} frames: this model needs chunks of {self._chunk}")
        return chunks

    def _denoise(self, denoiser: FrameDenoiser, noise: Tensor) -> Tensor:
        """Take all steps of a frame: from noise (B, 1, C, H, W) to the frame, as the noise."""
        if not self.settings.compile or not denoiser.capturable:
            return self._integrate(denoiser, noise)
        if self._graph is None:
            self._graph = graphed(
                lambda noise, *inputs: self._integrate(denoiser._replace(inputs=inputs), noise),
                (noise, *denoiser.inputs),
            )
        return self._graph(noise, *denoiser.inputs)

    def _integrate(self, denoiser: FrameDenoiser, noise: Tensor) -> Tensor:
        lowest, highest = self.settings.guidance_interval

        def velocity(x: Tensor, step: int) -> Tensor:
            if self.guidance == "none" or not lowest <= self.levels[step] <= highest:
                return denoiser(x, step)
            positive, negative = denoiser(x.repeat(2, 1, 1, 1, 1), step).chunk(2)
            return guide(positive, negative, self.settings.guidance_scale)

        return integrate(velocity, noise, self.levels, self.settings.solver)

    def _prefill(self, context: Tensor, conditions: Tensor, first: int, last: int) -> None:
        """Encode frames first..last-1 of the context into the KV cache."""
        # A learned start comes before frame 0, and then needs the condition of that frame.
        begin = first + 1 if first or self.model.first_predicted else 0
        ids, next_ids, modulation = self._conditions.modulation(
            conditions[:, first:last], conditions[:, begin : last + 1], denoised=False
        )
        latents = self._both(context[:, first:last])
        self.model.prefill(latents, ids, next_ids, self.cache, modulation)

    def _both(self, latents: Tensor) -> Tensor:
        """Double frames for condition guidance, whose second history never sees a condition."""
        return torch.cat([latents, latents]) if self.guidance == "condition" else latents

    def _randn(self, shape: tuple[int, ...]) -> Tensor:
        return randn_tensor((self._batch, *shape), self._generator, self.model.device)


def generate(
    model: WorldModel,
    context: Tensor,
    *,
    actions: Tensor | None = None,
    labels: Tensor | None = None,
    num_frames: int,
    num_steps: int,
    guidance_scale: float = 1.0,
    guidance: Guidance = "context",
    noise: Tensor | None = None,
    generator: Generators = None,
) -> Tensor:
    """Continue videos with the usual settings.

    See `continue_videos`, which takes all settings of `scd.options.RolloutOptions`.
    """
    settings = RolloutOptions(num_steps, guidance=guidance, guidance_scale=guidance_scale)
    return continue_videos(
        model, settings, context, num_frames, actions, labels, noise=noise, generator=generator
    )


def continue_videos(
    model: WorldModel,
    settings: RolloutOptions,
    context: Tensor,
    num_frames: int,
    actions: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    generator: Generators = None,
) -> Tensor:
    """Continue videos by `num_frames` frames: one after another, or jointly, as the model does.

    Args:
        context: latents (B, K, C, H, W) of the context frames; see `Rollout.reset` for K = 0.
        actions: (B, K + num_frames) or (B, K + num_frames, V), of the context and the new frames.
        labels: (B,).
        noise: (B, num_frames, C, H, W), initial noise of the new frames.

    Returns:
        The new frames, (B, num_frames, C, H, W).

    Raises:
        ScdError: shapes that do not fit together.
    """
    known = context.shape[1]
    expected = model.actions_shape(context.shape[0], known + num_frames)
    if actions is not None and tuple(actions.shape) != expected:
        raise ScdError(
            f"actions are {tuple(actions.shape)}, expected {expected}: one a context frame and one "
            f"a new frame"
        )
    if noise is not None and noise.shape[:2] != (context.shape[0], num_frames):
        raise ScdError(f"noise is {tuple(noise.shape)}, expected (batch, {num_frames}, C, H, W)")
    if not isinstance(model, CausalWorldModel):
        return denoise_jointly(
            model, settings, context, num_frames, actions, labels, noise=noise, generator=generator
        )
    rollout = Rollout(model, settings, known + num_frames)
    rollout.reset(context, None if actions is None else actions[:, :known], labels, generator)
    frames = [
        rollout.step(
            None if actions is None else actions[:, known + i],
            None if noise is None else noise[:, i],
        )
        for i in range(num_frames)
    ]
    return torch.stack(frames, dim=1)


def graphed(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """Capture a function of tensors as a CUDA graph: one launch, for inputs of these shapes.

    It is warmed up first, at full shapes. Off CUDA, the function itself is returned.
    """
    if inputs[0].device.type != "cuda":
        return function
    # Inputs of its own: each replay overwrites them.
    captured: Any = torch.cuda.make_graphed_callables(function, tuple(x.clone() for x in inputs))
    return lambda *tensors: captured(*tensors).clone()  # the next call writes its result there
