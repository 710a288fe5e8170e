"""`SCDPipeline`: the model and its autoencoder as one diffusers pipeline."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from scd.errors import ScdError
from scd.models.autoencoder import Codec, LatentCodec, PixelCodec
from scd.models.world_model import WorldModel
from scd.options import RolloutOptions
from scd.precision import with_weights_in
from scd.rollout import Rollout


@dataclass
class SCDPipelineOutput(BaseOutput):
    """`frames`: context and new frames, (B, K + num_frames, 3, H, W) in [0, 1], or as NumPy with
    channels last."""

    frames: Tensor | np.ndarray


class SCDPipeline(DiffusionPipeline):
    """Continue videos, frame by frame, under actions or a label.

    `save_pretrained`, `from_pretrained` and `push_to_hub` work as in every diffusers pipeline.

    Args:
        transformer: the world model.
        vae: its autoencoder; None for a model of pixels.
        rollout: fields of `RolloutOptions`, which are saved with it: how this model's frames are
            made unless a call says otherwise.
    """

    _optional_components = ["vae"]

    def __init__(
        self,
        transformer: WorldModel,
        vae: AutoencoderDC | AutoencoderKL | None = None,
        rollout: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(rollout=asdict(RolloutOptions(**(rollout or {}))))

    @torch.no_grad()
    def __call__(
        self,
        video: Tensor | np.ndarray,
        *,
        num_frames: int,
        actions: Tensor | None = None,
        labels: Tensor | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pt",
        **rollout: Any,
    ) -> SCDPipelineOutput:
        """Generate `num_frames` frames after the given ones.

        Args:
            video: (B, K, 3, H, W), or NumPy frames (B, K, H, W, 3); uint8, or floats in [0, 1].
            actions: (B, K + num_frames), of the given and the new frames; None: the null action.
            labels: (B,).
            num_inference_steps: a frame; None: as saved with the model.
            output_type: `pt` or `np`.
            rollout: other fields of `RolloutOptions`, such as guidance_scale, solver or window.

        Raises:
            ScdError: shapes that do not fit together, or an unknown setting.
        """
        if output_type not in ("pt", "np"):
            raise ScdError(f"output_type is {output_type!r}, not pt or np")
        if isinstance(video, np.ndarray):
            video = torch.from_numpy(video).movedim(-1, 2)
        if video.dtype != torch.uint8 and not video.is_floating_point():
            raise ScdError(f"video holds {video.dtype}, not uint8 or floats")
        video = video.float() / (255 if video.dtype == torch.uint8 else 1)
        if video.ndim != 5 or video.shape[2] != 3:
            raise ScdError(f"video is {tuple(video.shape)}, expected (B, K, 3, H, W)")
        known = video.shape[1]
        if actions is not None and tuple(actions.shape) != (len(video), known + num_frames):
            raise ScdError(
                f"actions are {tuple(actions.shape)}, expected {(len(video), known + num_frames)}"
            )
        device = self.transformer.device
        video = video.to(device)
        settings = self._settings(num_inference_steps, rollout)
        engine = Rollout(self.transformer, settings, known + num_frames)
        codec: Codec = PixelCodec()
        if self.vae is not None:
            # Autocast takes weights of either type.
            in_bf16 = engine.precision == "bf16"
            vae = self.vae if in_bf16 else with_weights_in(self.vae, engine.precision)
            codec = LatentCodec(vae, engine.precision)
        past = None if actions is None else actions[:, :known]
        engine.reset(codec.encode(video), past, labels, generator)
        to_come = [None if actions is None else actions[:, known + i] for i in range(num_frames)]
        new = []
        with self.progress_bar(total=num_frames) as bar:
            for frame in engine.stream(to_come):
                new.append(codec.decode(frame[:, None]))
                bar.update()
        frames = torch.cat([video, *new], dim=1)
        if output_type == "np":
            return SCDPipelineOutput(frames=frames.movedim(2, -1).cpu().numpy())
        return SCDPipelineOutput(frames=frames)

    def _settings(self, steps: int | None, changes: dict[str, Any]) -> RolloutOptions:
        if steps is not None:
            changes = {**changes, "steps": steps}
        known = [field.name for field in fields(RolloutOptions)]
        for name in changes:
            if name not in known:
                raise ScdError(f"unknown setting {name!r}; known: {', '.join(known)}")
        return replace(RolloutOptions(**self.config.rollout), **changes)
