"""The rollout: encode once per frame, denoise T times. All causal models make frames with it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from scd.errors import ScdError
from scd.flow.sampler import Generators, frame_noise, guide, integrate, noise_levels
from scd.models.cpu import PackedWeights
from scd.models.world_model import MAX_TIMESTEP, CausalWorldModel, FrameDenoiser, WorldModel
from scd.options import RolloutOptions, check_rollout
from scd.rollout.cache import KVCache, Window
from scd.rollout.conditions import RolloutConditions
from scd.utils.precision import float32_products, precision_for, with_weights_in

SLIDING_FRAMES = 64  # that slide in at once; bounds their memory


class Exit(NamedTuple):
    """A frame that is the clean prediction of one of its steps, and what that was made from."""

    frame: Tensor  # (B, C, H, W)
    noisy: Tensor  # (B, C, H, W)
    sigma: float  # the noise level of `noisy`
    first_look: Tensor | None  # (B, C, H, W), what the encoder saw in the frame's place, if it does


class _Denoising(NamedTuple):
    """A frame, or chunk, that is encoded and not yet denoised."""

    denoiser: FrameDenoiser
    noises: Tensor  # (B, 1 + fresh, 1 or a chunk, C, H, W)
    levels: list[float]
    first_look: Tensor | None  # (B, C, H, W)


class Rollout:
    """Generates frames one after another, like an environment: `reset`, then `step` by `step`.

    Guidance `context`: the negative branch has a perturbed context (one encoder pass; SCD only);
    `condition`: it has the null action or label everywhere, and the negative text.

    Where a model denoises chunks of frames, each frame of a chunk is given out by a step of its
    own; contexts, window and sink frames must be whole chunks.

    A model in bf16 computes in bf16 unless `settings.precision` says more than the default: as
    diffusers' `torch_dtype` promises, but in float32 where bf16 is slow. A model whose weights are
    of another type is copied: for many rollouts, convert it once
    (`scd.utils.precision.with_weights_in`).

    Args:
        settings: how a frame is made, and how much of the past it sees.
        max_frames: of context and new frames together, where `settings.window` is 0.
        levels: the noise levels between the steps of every frame, instead of those of `settings`.
            Where the first is below 1, `noise` of a step is a frame of that level.

    Raises:
        ScdError: settings that the model cannot follow; see also `reset` and `step`.
    """

    def __init__(
        self,
        model: WorldModel,
        settings: RolloutOptions,
        max_frames: int = 0,
        levels: list[float] | None = None,
    ):
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
        self.precision = precision_for(model, s.precision)
        if not isinstance(model, CausalWorldModel):
            raise ScdError(
                f"{type(model).__name__} denoises all frames of a clip at once: it cannot be "
                f"rolled out frame by frame"
            )
        self.model = model = with_weights_in(model, self.precision)
        self.settings = settings
        if s.compile:
            model.compile_steps()
        self.levels = levels or noise_levels(s.steps, s.spacing, s.shift)
        self.first_levels = self.levels
        if s.first_frame_steps:
            self.first_levels = noise_levels(s.first_frame_steps, s.spacing, s.shift)
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
            actions: (B, K) or (B, K, V), the action that led to each of them. Here and in `step`
                values are checked on the CPU only: reading them from a GPU would wait for it.
            labels: (B,).
            generator: one for the batch, or one a sample: then a sample's frames do not depend
                on the batch it is in.
            text, negative_text: see `set_text`.
        """
        self._forget()
        try:
            self._begin_video(context, actions, labels, generator, text, negative_text)
        except BaseException:
            self._forget()
            raise

    def _begin_video(
        self,
        context: Tensor,
        actions: Tensor | None,
        labels: Tensor | None,
        generator: Generators,
        text: Tensor | None,
        negative_text: Tensor | None,
    ) -> None:
        self._check_context(context)
        batch, frames, _, height, width = context.shape
        if frames < self.model.first_predicted:
            raise ScdError(
                "a rollout needs at least one context frame: this model was not trained to predict "
                "first frames (model.first_frame)"
            )
        known = (self._chunks(frames, "context") - 1) * self._chunk
        model = self.model
        guided = self.guidance == "condition"

        def conditions_at(levels: list[float]) -> RolloutConditions:
            timesteps = MAX_TIMESTEP * torch.tensor(levels[:-1], device=model.device)
            return RolloutConditions(model, batch, labels, timesteps, guided)

        self._conditions = conditions_at(self.levels)
        # Where the first new frame has steps of its own, and until it is made.
        self._first_conditions = (
            conditions_at(self.first_levels) if self.settings.first_frame_steps else None
        )
        frame_conditions = self._conditions.frame_conditions(actions, frames)
        self._packed = PackedWeights(model)
        self._graph: Callable[..., Tensor] | None = None  # made for the shapes of this reset
        context = context.to(model.device)
        self._generator = generator
        self._batch = batch
        tokens = model.tokens_per_frame(height, width)
        self.cache = KVCache(model, (1 + guided) * batch, self.window, tokens * self._chunk)
        self._newest = context[:, -self._chunk :].clone()  # the caller may use its own again
        self._newest_condition = frame_conditions[:, -1:]
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
            ScdError: before `reset`, or beyond `max_frames`; noise of a frame of a chunk.
        """
        if noise is not None and self._chunk > 1:
            raise ScdError(f"frames come in chunks of {self._chunk}: give a generator, not noise")
        if not self._waiting:
            with self._computing():
                denoiser, noises, levels, _ = self._begin(action, noise)
                self._newest = self._denoise(denoiser, noises, levels)
            self._waiting = list(self._newest.unbind(dim=1))
        return self._waiting.pop(0).clone()  # the history is not the caller's to change

    @torch.no_grad()
    def step_to_exit(
        self, exit_step: int, action: Tensor | None = None, noise: Tensor | None = None
    ) -> Exit:
        """Generate the next frame, but leave its denoising after one of the steps, for training.

        The exit's frame becomes the history. Only `rollout.solver=consistency` has exits.

        Args:
            exit_step: from 0, the step whose clean prediction is the frame.
            action, noise: see `step`.

        Raises:
            ScdError: before `reset`, or beyond `max_frames`; an exit that there is not.
        """
        with self._computing():
            self._check_exit(exit_step)
            denoiser, noises, levels, first_look = self._begin(action, noise)
            noisy = self._integrate(denoiser, noises, levels[: exit_step + 1])
            velocity = self._guided(denoiser, levels)(noisy, exit_step)
            self._newest = noisy - levels[exit_step] * velocity
        return Exit(self._newest[:, 0].clone(), noisy[:, 0], levels[exit_step], first_look)

    def stream(self, actions: Iterable[Tensor | None]) -> Iterator[Tensor]:
        """Yield a frame (B, C, H, W) for every action (B,) or (B, V), as soon as it is done."""
        for action in actions:
            yield self.step(action)

    def _forget(self) -> None:
        """Drop the video before: a refused `reset` leaves none, and its cache frees its memory."""
        self._newest, self._waiting = None, []
        for name in ("cache", "_packed", "_graph"):
            self.__dict__.pop(name, None)

    def _check_context(self, context: Tensor) -> None:
        """Refuse frames that are not (B, K, C, H, W) of the model's channels."""
        channels = self.model.channels
        if context.ndim != 5 or context.shape[2] != channels:
            raise ScdError(
                f"context has shape {tuple(context.shape)}, expected (B, K, {channels}, H, W)"
            )

    def _begin(self, action: Tensor | None, noise: Tensor | None) -> _Denoising:
        """Draw the noise of the next frame, or chunk, and encode what comes before it."""
        assert self._newest is not None
        model, levels = self.model, self._next_levels
        conditions = self._first_conditions or self._conditions
        action = None if action is None else action[:, None]
        condition = conditions.frame_conditions(action, 1)
        ids, next_ids, modulation = conditions.modulation(
            self._newest_condition, condition, denoised=True
        )
        tokens = model.tokens_per_frame(*self._newest.shape[-2:])
        s, shape, steps = self.settings, (self._batch, *self._newest.shape[2:]), len(levels) - 1
        each = [
            frame_noise(shape, steps, s.solver, s.temperature, self._generator, model.device, noise)
            for _ in range(self._chunk)
        ]
        noises = torch.stack(each, dim=2)  # (B, 1 + fresh, 1 or a chunk, C, H, W)
        look, first_look = noises[:, 0], None  # (B, 1 or a chunk, C, H, W)
        if model.takes_first_look:
            first_look = randn_tensor(shape, self._generator, model.device)
            look = first_look[:, None]  # (B, 1, C, H, W)
        perturbation = None
        if self.guidance == "context":
            of_tokens = (self._batch, tokens, model.width)
            context_noise = randn_tensor(of_tokens, self._generator, model.device)
            perturbation = s.guidance_noise * context_noise[:, None]
        denoiser = model.begin_frame(
            self._both(self._newest),
            ids,
            next_ids,
            self.cache,
            modulation,
            perturbation,
            self._both(look),
        )
        self._newest_condition, self._first_conditions = condition, None
        self.on_encoded()
        return _Denoising(denoiser, noises, levels, first_look)

    @property
    def _next_levels(self) -> list[float]:
        return self.first_levels if self._first_conditions else self.levels

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Multiply by the weights that `reset` packed, in the rollout's precision."""
        if self._newest is None:
            raise ScdError("step before reset")
        with self._packed.in_use(), float32_products(self.precision):
            yield

    def _chunks(self, frames: int, what: str) -> int:
        """Count the chunks of some frames, which must be whole."""
        chunks, rest = divmod(frames, self._chunk)
        if rest:
            raise ScdError(f"{what} of {frames} frames: this model needs chunks of {self._chunk}")
        return chunks

    def _denoise(self, denoiser: FrameDenoiser, noises: Tensor, levels: list[float]) -> Tensor:
        """Take all steps of a frame: from noises (B, 1 + fresh, 1, C, H, W) to (B, 1, C, H, W)."""
        often = levels is self.levels  # the first frame's own steps are not worth a graph
        if not (self.settings.compile and denoiser.capturable and often):
            return self._integrate(denoiser, noises, levels)
        if self._graph is None:

            def steps(noises: Tensor, *inputs: Tensor) -> Tensor:
                return self._integrate(denoiser._replace(inputs=inputs), noises, levels)

            self._graph = graphed(steps, (noises, *denoiser.inputs))
        return self._graph(noises, *denoiser.inputs)

    def _integrate(self, denoiser: FrameDenoiser, noises: Tensor, levels: list[float]) -> Tensor:
        """Integrate from levels[0] to levels[-1], also to one in between."""
        noise, *fresh = noises.unbind(dim=1)  # (B, 1, C, H, W) each
        velocity = self._guided(denoiser, levels)
        return integrate(velocity, noise, levels, self.settings.solver, fresh)

    def _check_exit(self, step: int) -> None:
        if self._chunk > 1:
            raise ScdError(f"exit_step cannot be used with frames in chunks of {self._chunk}")
        if self.settings.solver != "consistency":
            raise ScdError(
                f"exit_step needs rollout.solver=consistency, not {self.settings.solver}: only its "
                f"steps each predict the clean frame"
            )
        if self.settings.compile:
            raise ScdError("exit_step cannot be used with rollout.compile, whose graph has no exit")
        steps = len(self._next_levels) - 1
        if not 0 <= step < steps:
            raise ScdError(f"exit_step={step} is not one of the frame's steps 0..{steps - 1}")

    def _guided(
        self, denoiser: FrameDenoiser, levels: list[float]
    ) -> Callable[[Tensor, int], Tensor]:
        """Return the function (noisy, step) -> velocity, with guidance where it applies."""
        lowest, highest = self.settings.guidance_interval

        def velocity(x: Tensor, step: int) -> Tensor:
            if self.guidance == "none" or not lowest <= levels[step] <= highest:
                return denoiser(x, step)
            positive, negative = denoiser(x.repeat(2, 1, 1, 1, 1), step).chunk(2)
            return guide(positive, negative, self.settings.guidance_scale)

        return velocity

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


def graphed(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """Capture a function of tensors as a CUDA graph: one launch, for inputs of these shapes.

    It is warmed up first, at full shapes. Off CUDA, the function itself is returned.
    """
    if inputs[0].device.type != "cuda":
        return function
    # Inputs of its own: each replay overwrites them.
    captured: Any = torch.cuda.make_graphed_callables(function, tuple(x.clone() for x in inputs))
    return lambda *tensors: captured(*tensors).clone()  # the next call writes its result there
