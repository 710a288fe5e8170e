"""A rollout of exported graphs by onnxruntime: what the page's worker does, in Python.

`files/world/world.js` is the same in JavaScript. Both differ from `scd.rollout` only in who runs
the layers, so that tests can hold them against it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scd.errors import ScdError
from scd.flow.sampler import frame_noise, integrate, noise_levels
from scd.models.rotary import ROTARY_DIMS, ROTARY_THETA
from scd.options import RolloutOptions
from scd.rollout.cache import Window

CPU = torch.device("cpu")


def all_levels(rollout: RolloutOptions, steps: Iterable[int]) -> list[float]:
    """List the noise levels of a frame's steps, for each number of steps that can be chosen."""
    chosen = (noise_levels(count, rollout.spacing, rollout.shift)[:-1] for count in steps)
    return sorted({level for levels in chosen for level in levels}, reverse=True)


def frame_angles(position: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute cosines and sines (1, 8) of a frame's angles, in double precision."""
    exponents = np.arange(0, ROTARY_DIMS[0], 2) / ROTARY_DIMS[0]
    angles = position * ROTARY_THETA**-exponents
    return np.cos(angles)[None].astype(np.float32), np.sin(angles)[None].astype(np.float32)


class OnnxRollout:
    """Generates frames one after another, one video at a time, with guidance `context` or none.

    Args:
        folder: holds encoder.onnx, decoder.onnx and picture.onnx.
        levels: the noise levels that the decoder has tables for.

    Raises:
        ScdError: onnxruntime is not installed.
    """

    def __init__(self, folder: Path, settings: RolloutOptions, levels: list[float]):
        try:
            import onnxruntime
        except ImportError as error:
            raise ScdError("web: onnxruntime is missing: pip install -e '.[web]'") from error

        def load(name: str) -> Any:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1  # a frame's few tokens are not worth more
            providers = ["CPUExecutionProvider"]
            return onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers)

        self._encoder, self._decoder, self._picture = map(load, ("encoder", "decoder", "picture"))
        self._settings = settings
        self._guided = settings.guidance == "context" and settings.guidance_scale != 1.0
        self._levels = noise_levels(settings.steps, settings.spacing, settings.shift)
        self._numbers = [levels.index(level) for level in self._levels[:-1]]
        shapes = {node.name: node.shape for node in self._encoder.get_inputs()}
        self._cache_shape, self._context_shape = shapes["keys"], shapes["perturbation"]
        frames = self._cache_shape[3] // self._context_shape[2]
        self._window = Window(frames, "slide", settings.sink_frames)

    def reset(
        self, latents: np.ndarray, actions: Iterable[int], generator: torch.Generator | None = None
    ) -> None:
        """Start from frames (K, C, H, W), with the action that led to each of them."""
        self._generator = generator
        self._keys = np.zeros(self._cache_shape, np.float32)
        self._values = np.zeros_like(self._keys)
        self._frames = 0
        *past, self._newest = latents[:, None].astype(np.float32)
        for frame, action in zip(past, list(actions)[1:], strict=True):
            self._encode(frame, action, np.zeros(self._context_shape, np.float32))

    def step(self, action: int, noise: Tensor | None = None) -> np.ndarray:
        """Generate the next frame (C, H, W); noise (1, C, H, W) comes from the generator if None.

        The draws are those of `scd.rollout.Rollout.step`, in its order.
        """
        s = self._settings
        shape = tuple(self._newest.shape)
        drawn = frame_noise(shape, s.steps, s.solver, s.temperature, self._generator, CPU, noise)
        initial, *fresh = drawn.unbind(dim=1)  # (1, C, H, W) each
        perturbation = np.zeros(self._context_shape, np.float32)
        if self._guided:
            random = torch.randn(1, *self._context_shape[2:], generator=self._generator)
            perturbation = (s.guidance_noise * random[None]).numpy()
        contexts = self._encode(self._newest, action, perturbation)
        lowest, highest = s.guidance_interval

        def velocity(noisy: Tensor, step: int) -> Tensor:
            level = self._levels[step]
            guided = self._guided and lowest <= level <= highest
            v, *negative = (
                self._decode(noisy, context, action, self._numbers[step])
                for context in contexts[: 1 + guided]
            )
            return negative[0] + s.guidance_scale * (v - negative[0]) if negative else v

        self._newest = integrate(velocity, initial, self._levels, s.solver, fresh).numpy()
        return self._newest[0]

    def picture(self, latents: np.ndarray) -> np.ndarray:
        """Decode a frame (C, H, W) to RGB (height, width, 3) uint8."""
        (picture,) = self._picture.run(None, {"latents": latents[None]})
        return picture.astype(np.uint8)

    def _encode(
        self, latents: np.ndarray, action: int, perturbation: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        cosines, sines = frame_angles(self._frames)
        held = min(self._frames + 1, self._window.frames)
        context, perturbed, self._keys, self._values = self._encoder.run(
            None,
            {
                "latents": latents,
                "action": _number(action),
                "cosines": cosines,
                "sines": sines,
                "slot": _number(self._window.slot(self._frames)),
                "held": _number(held),
                "keys": self._keys,
                "values": self._values,
                "perturbation": perturbation,
            },
        )
        self._frames += 1
        return context, perturbed

    def _decode(self, noisy: Tensor, context: np.ndarray, action: int, level: int) -> Tensor:
        inputs = {"noisy": noisy.numpy(), "context": context}
        inputs |= {"action": _number(action), "level": _number(level)}
        (velocity,) = self._decoder.run(None, inputs)
        return torch.from_numpy(velocity)


def _number(value: int) -> np.ndarray:
    return np.array([value], np.int32)
