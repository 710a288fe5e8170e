"""The interfaces of world models: to the training objective, the rollout and diffusers."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from scd.errors import ScdError
from scd.models.config import count_patches
from scd.models.layers import HEAD_DIM
from scd.models.weights import refuse_incomplete

MAX_TIMESTEP = 1000.0
CLEAN_TIMESTEP = -1.0


class PrecomputedModulation(NamedTuple):
    """The modulation of every layer under R conditions, computed once for a whole rollout.

    See `scd.models.layers.precompute_modulation`; L blocks may be others for clean and noisy.
    """

    clean: Tensor  # (R, 6·L + 2, D), of clean frames, which go into the KV cache
    noisy: Tensor  # (R, T, 6·L + 2, D), of noisy frames at T denoising steps
    timesteps: Tensor  # (T,)
    look: Tensor | None = None  # (R, 6·L + 2, D), of first looks at pure noise


class FirstLook(NamedTuple):
    """What an encoder sees of the frames to predict, at their own place: noisy frames.

    In training they are of high noise, in a rollout pure noise (arXiv 2602.10095).
    """

    noisy: Tensor  # (B, F', C, H, W)
    timesteps: Tensor  # (B, F')

    @classmethod
    def pure(cls, noise: Tensor) -> "FirstLook":
        """Take noise (B, F', C, H, W) as it is, as a rollout does."""
        timesteps = torch.full(noise.shape[:2], MAX_TIMESTEP, device=noise.device)
        return cls(noise, timesteps)


class TextKeys(NamedTuple):
    """Keys and values of a text in all layers that attend to it, computed once per text."""

    keys: Tensor  # (L, B, heads, T, head_dim)
    values: Tensor  # as the keys


class FrameDenoiser(NamedTuple):
    """The denoiser of one frame of each sample, with all that the frame's steps share.

    Args:
        velocity: (noisy (B, 1, C, H, W), step, *inputs) -> velocities, as `noisy`, which may hold
            the first samples of the batch only.
        inputs: tensors that change from frame to frame.
        capturable: nothing else changes, so that a CUDA graph of one frame's steps makes the next
            frame from its own inputs. Steps that read a growing KV cache are not.
    """

    velocity: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    capturable: bool

    def __call__(self, noisy: Tensor, step: int) -> Tensor:
        """Predict the velocities (B, 1, C, H, W) of noisy frames at a step, from 0."""
        return self.velocity(noisy, step, *self.inputs)


class Cache(Protocol):
    """A key-value cache, as far as a model uses it (`scd.rollout.cache.KVCache`)."""

    frames: int
    text: TextKeys | None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def advance(self, frames: int) -> None: ...


class WorldModel(ModelMixin, ConfigMixin):
    """A video diffusion model: predicts the velocities of frames, given others.

    Every config has `channels`, `patch_size`, `heads`, `condition` (`none`, `action`,
    `action_vector` or `label`), `num_conditions`, `first_frame`, `prediction` and `sigma_min`; see
    `SCD`. A model of others, whose config has other names, overrides what is read from them here.

    The condition of a frame is an index from 0 to `num_conditions`, the null condition; or, where
    an action is a vector, its V = `num_conditions` components and one more that is 1 for the null
    condition alone: nothing pressed is not the same as nothing known.
    """

    _repeated_blocks = ["Block"]
    _no_split_modules = ["Block"]
    chunk_frames = 1  # frames that are denoised together, and see each other
    has_context = False  # whether a separate context can be perturbed (context guidance)
    has_text = False  # whether a text conditions the whole video

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a saved model, see diffusers; only weights that fit its config entirely.

        Raises:
            ScdError: tensors are missing or too many, of which diffusers only warns.
        """
        where = pretrained_model_name_or_path
        model, found = super().from_pretrained(where, output_loading_info=True, **kwargs)
        refuse_incomplete(found, f"{where}: the model's")
        return (model, found) if output_loading_info else model

    @property
    def takes_first_look(self) -> bool:
        """Whether an encoder takes a first look at the frames to predict, with noise of its own."""
        return False

    @property
    def heads(self) -> int:
        return self.config.heads

    @property
    def head_dim(self) -> int:
        return HEAD_DIM

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.config.channels

    @property
    def prediction(self) -> str:
        """What the network's own output is: `velocity`, or clean `data`."""
        return self.config.prediction

    @property
    def sigma_min(self) -> float:
        """What a noise level at least counts as where a velocity is divided by it."""
        return self.config.sigma_min

    @property
    def condition(self) -> str:
        """The kind of condition that a frame has, beside the text."""
        return self.config.condition

    @property
    def num_conditions(self) -> int:
        return self.config.num_conditions

    @property
    def null_condition(self) -> int:
        return self.num_conditions

    @property
    def has_vectors(self) -> bool:
        """Whether an action is a vector: several keys at once, or how far a mouse has moved."""
        return self.condition == "action_vector"

    @property
    def first_predicted(self) -> int:
        """The first frame of a clip that the model can predict."""
        return 0 if self.config.first_frame else 1

    @abstractmethod
    def forward(
        self,
        latents: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Tensor | None,
        *,
        perturbation: Tensor | None = None,
        history_gradient: bool = True,
        first_look: FirstLook | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        """Predict velocities under teacher forcing, of K draws of the last F' frames.

        Args:
            latents: (B, F, C, H, W), the frames as the history shows them.
            noisy: (B, K, F', C, H, W), with F' at most F - `first_predicted`.
            timesteps: (B, K, F') in [0, 1000]; of a bidirectional model -1 for given frames.
            conditions: (B, F) or (B, F, V + 1), of the frames.
            perturbation: as the context, (B, F - `first_predicted`, N, D), or (B, F', N, D) with a
                first look; added to the normed context of a model that `has_context`.
            history_gradient: False: no gradient through the keys and values of earlier frames, as
                if they came from a rollout's cache.
            first_look: what a model that `takes_first_look` sees of the last F' frames, under every
                draw.
            text: (B, T, text_dim), the text encoder's output, for a model that `has_text`.

        Returns:
            (B, K, F', C, H, W), in float32.

        Raises:
            ScdError: a first look or a text is missing, or one of these or a perturbation is given
                to a model that takes none.
        """

    def refuse_unused(
        self, perturbation: Tensor | None, first_look: FirstLook | None, text: Tensor | None
    ) -> None:
        """Refuse what is given to `forward` and the model does not take.

        Raises:
            ScdError: says what it is.
        """
        for name, given, taken in (
            ("perturbation", perturbation, self.has_context),
            ("first look", first_look, self.takes_first_look),
            ("text", text, self.has_text),
        ):
            if given is not None and not taken:
                raise ScdError(f"{type(self).__name__} takes no {name}")

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute every block's activations in the backward pass instead of keeping them."""
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = enabled

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Count the tokens of a frame.

        Raises:
            ScdError: it does not divide into patches.
        """
        return count_patches(height, width, self.config.patch_size, self.config.patch_size)

    def velocity(
        self,
        latents: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        actions: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        first_look: FirstLook | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        """Predict velocities under teacher forcing, of every frame F' to predict (mostly F - 1).

        Args:
            latents: (B, F, C, H, W), the clean frames.
            noisy: (B, F, C, H, W).
            timesteps: (B, F) in [0, 1000], the noise levels of `noisy`.
            actions: (B, F) or (B, F, V) as recorded (action i leads to frame i).
            labels: (B,).
            first_look, text: at the frames F', and of each clip; see `forward`.

        Returns:
            (B, F', C, H, W).

        Raises:
            ScdError: shapes that do not fit together, something that the model does not have, or a
                first look or a text that is missing.
        """
        self.check_clip(latents, noisy, timesteps)
        first = self.first_predicted
        conditions = self.frame_conditions(latents.shape[:2], actions, labels)
        self.check_conditions(conditions)
        drawn = noisy[:, None, first:], timesteps[:, None, first:]
        return self(latents, *drawn, conditions, first_look=first_look, text=text)[:, 0]

    def check_clip(self, latents: Tensor, noisy: Tensor, timesteps: Tensor) -> None:
        """Refuse the frames of `velocity` if they do not fit together, or not the model."""
        shape = tuple(latents.shape)
        if len(shape) != 5 or shape[2] != self.channels:
            raise ScdError(f"latents are {shape}, expected (B, F, {self.channels}, H, W)")
        if tuple(noisy.shape) != shape or tuple(timesteps.shape) != shape[:2]:
            raise ScdError(
                f"noisy frames are {tuple(noisy.shape)} and timesteps {tuple(timesteps.shape)}, "
                f"expected {shape} and {shape[:2]} as the latents"
            )
        self.tokens_per_frame(*shape[3:])
        least = 1 + self.first_predicted
        if shape[1] < least or shape[1] % self.chunk_frames:
            chunks = f", in chunks of {self.chunk_frames}" if self.chunk_frames > 1 else ""
            raise ScdError(f"{shape[1]} frames: expected at least {least}{chunks}")

    def frame_conditions(
        self, shape: tuple[int, ...], actions: Tensor | None, labels: Tensor | None
    ) -> Tensor | None:
        """Turn actions or labels into conditions, (B, F) or (B, F, V + 1); None without any.

        Only `check_conditions` reads the values: on a GPU that waits for the device.

        Raises:
            ScdError: a kind of condition that the model does not have, or of another shape.
        """
        kind = self.condition
        under_actions = kind in ("action", "action_vector")
        if (actions is not None and not under_actions) or (labels is not None and kind != "label"):
            given = "labels" if actions is None or under_actions else "actions"
            raise ScdError(f"{given} given to a model with condition {kind!r}")
        if kind == "none":
            return None
        if actions is not None:
            expected = self.actions_shape(*shape)
            if tuple(actions.shape) != expected:
                raise ScdError(f"actions are {tuple(actions.shape)}, expected {expected}")
            if not self.has_vectors:
                return _as_indices("actions", actions)
            # The null condition's component is 0: the action is known.
            return nn.functional.pad(actions.float(), (0, 1))
        elif labels is not None:
            if tuple(labels.shape) != tuple(shape[:1]):
                raise ScdError(f"labels are {tuple(labels.shape)}, expected {tuple(shape[:1])}")
            return _as_indices("labels", labels)[:, None].expand(shape)
        return self.null_conditions(shape)

    def null_conditions(self, shape: tuple[int, ...]) -> Tensor:
        """Make the null condition for a shape (B, F): (B, F) or (B, F, V + 1)."""
        if not self.has_vectors:
            return torch.full(tuple(shape), self.null_condition, device=self.device)
        null = torch.zeros(*shape, self.null_condition + 1, device=self.device)
        null[..., -1] = 1
        return null

    def actions_shape(self, batch: int, frames: int) -> tuple[int, ...]:
        """Give the shape of actions: (B, F) for integers, (B, F, V) for vectors."""
        return (batch, frames, self.num_conditions)[: 3 if self.has_vectors else 2]

    def check_conditions(self, conditions: Tensor | None) -> None:
        """Refuse actions, labels or conditions, of any shape, that the model does not have.

        Raises:
            ScdError: an index outside of 0 to the null condition, or a vector that is not finite.
        """
        if conditions is None:
            return
        if self.has_vectors:
            if not conditions.isfinite().all():
                raise ScdError("actions must be finite")
            return
        if ((conditions < 0) | (conditions > self.null_condition)).any():
            raise ScdError(f"conditions must lie in 0..{self.null_condition} (null)")

    def as_velocity(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Turn predictions for frames (..., C, H, W) at timesteps (...) into velocities."""
        prediction = prediction.float()
        if self.prediction == "velocity":
            return prediction
        sigma = (timesteps / MAX_TIMESTEP).clamp(min=self.sigma_min)
        return (noisy - prediction) / sigma[..., None, None, None]


class CausalWorldModel(WorldModel):
    """A world model whose frames depend on earlier ones only, so that it can be rolled out."""

    @property
    def start_slots(self) -> int:
        """Slots of a KV cache for a learned start before frame 0."""
        return 0

    @property
    def noisy_slots(self) -> int:
        """Slots of a KV cache for the frame that is being denoised or looked at."""
        return 0

    @property
    @abstractmethod
    def cached_layers(self) -> int:
        """Layers that attend to past frames, and so need a cache."""

    @abstractmethod
    def precompute_modulation(self, conditions: Tensor, timesteps: Tensor) -> PrecomputedModulation:
        """Compute all that depends on conditions and noise levels alone, for many of them at once.

        Args:
            conditions: (R,) or (R, V + 1), those that frames may have; `prefill` and `begin_frame`
                take their ids 0..R-1.
            timesteps: (T,) in [0, 1000], of the denoising steps; `prefill` needs none.
        """

    def check_text(self, text: Tensor | None, batch: int) -> Tensor:
        """Return a text (B, T, text_dim) that fits the model and a batch.

        Raises:
            ScdError: there is none, it has another shape, or the model takes none.
        """
        raise ScdError(f"{type(self).__name__} takes no text")

    def precompute_text(self, text: Tensor) -> TextKeys:
        """Compute keys and values of the text encoder's output (B, T, text_dim).

        They are put into the KV cache, where `prefill` and `begin_frame` find them.

        Raises:
            ScdError: the model takes no text.
        """
        raise ScdError(f"{type(self).__name__} takes no text")

    @abstractmethod
    def prefill(
        self,
        latents: Tensor,
        condition_ids: Tensor,
        next_condition_ids: Tensor,
        cache: Cache,
        modulation: PrecomputedModulation,
    ) -> None:
        """Encode clean frames into the KV cache, behind those that it holds.

        Args:
            latents: (B, F, C, H, W).
            condition_ids: (B, F), of these frames.
            next_condition_ids: (B, F), of the frames after each of them. At the start of a video, a
                model that predicts first frames takes one more: the condition of frame 0.
        """

    @abstractmethod
    def begin_frame(
        self,
        newest: Tensor,
        condition_ids: Tensor,
        next_condition_ids: Tensor,
        cache: Cache,
        modulation: PrecomputedModulation,
        perturbation: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> FrameDenoiser:
        """Encode the newest clean frame into the KV cache, and make the next frame's denoiser.

        Args:
            newest: (B, 1, C, H, W), or a chunk; (B, 0, C, H, W) before the first frame of a video.
            condition_ids: (B, 1) or (B, 0), of the newest frame.
            next_condition_ids: (B, 1), of the frame to come.
            perturbation: (B, 1, N, D): the denoiser is then one of 2B frames, the second half under
                the perturbed context.
            noise: as `newest`, what a model that encodes the frame to come sees of it: where it
                `takes_first_look` noise of its own, else what the frame starts from.
        """

    def compile_steps(self) -> None:
        """Compile the network that runs at every denoising step.

        Raises:
            ScdError: the steps read the KV cache, whose size changes from frame to frame.
        """
        raise ScdError(f"{type(self).__name__}: only the steps of an SCD can be compiled")


def _as_indices(name: str, values: Tensor) -> Tensor:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ScdError(f"{name} are {values.dtype}, not integers")
    return values.long()


def repeat_steps(conditions: Tensor, steps: int) -> Tensor:
    """Repeat conditions (R,) or (R, V + 1) at every step: (R, T) or (R, T, V + 1)."""
    return conditions[:, None].expand(-1, steps, *conditions.shape[1:])
