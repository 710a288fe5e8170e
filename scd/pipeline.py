"""`SCDPipeline`: a world model and its autoencoder as one diffusers pipeline."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
import yaml
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline
from diffusers.utils import BaseOutput
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor

from scd.errors import ScdError, reason
from scd.models.autoencoder import Codec, LatentCodec, PixelCodec, downsampling
from scd.models.world_model import WorldModel
from scd.options import (
    OPTIONS_FILE,
    Options,
    RolloutOptions,
    merge_rollout,
    options_to_dict,
    with_present_names,
)
from scd.rollout import Rollout
from scd.utils.precision import with_weights_in

SHARED = ["*.json", "*.md", "*.safetensors", "*.yml"]  # what is fetched: neither code nor pickles
FETCHING = ("cache_dir", "force_download", "local_files_only", "revision", "token")
ROUNDING = 1e-3  # how far floats may exceed [0, 1], from rounding in bf16


@dataclass
class SCDPipelineOutput(BaseOutput):
    """Output of `SCDPipeline`.

    Args:
        frames: context and new frames, (B, K + num_frames, 3, H, W) in [0, 1]; as NumPy with
            channels last.
    """

    frames: Tensor | np.ndarray


class RolloutPipeline(DiffusionPipeline):
    """Pipeline that generates by rollouts: settings that are saved with it, and no offloading.

    A subclass calls `register_settings` when it is made.
    """

    def register_settings(
        self, rollout: dict[str, Any] | None, options: dict[str, Any] | None
    ) -> None:
        """Keep the defaults for generating frames, and the options that the model comes from.

        Args:
            rollout: fields of `RolloutOptions`, under their present or former names.
            options: of the model's experiment, as nested dictionaries.
        """
        settings = with_present_names({"rollout": rollout or {}}, "rollout")["rollout"]
        if options is not None:
            options = with_present_names(options, "options")
        saved = merge_rollout(RolloutOptions(), settings, "the pipeline's settings")
        self.register_to_config(rollout=asdict(saved), options=options)

    def register_modules(self, **kwargs: Any) -> None:
        """Keep the parts of the pipeline, see diffusers.

        Raises:
            ScdError: the autoencoder's weights are not all there, of which diffusers only warns.
        """
        super().register_modules(**kwargs)
        vae = kwargs.get("vae")
        if vae is None or any(hasattr(part, "_hf_hook") for part in vae.modules()):
            return  # none, or its weights are where accelerate put them
        for name, tensor in vae.named_parameters():
            if tensor.is_meta:
                raise ScdError(f"vae: its config wants {name}, its weights lack it")

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline, see diffusers; with `options.yml`, if the experiment is known."""
        if self.config.options is not None:
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)  # push_to_hub uploads the whole folder
            text = yaml.safe_dump(dict(self.config.options), sort_keys=False, allow_unicode=True)
            (folder / OPTIONS_FILE).write_text(text, encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any
    ) -> Self:
        """Load a pipeline from a folder, or of `owner/name` on the Hugging Face hub; see diffusers.

        Raises:
            ScdError: it cannot be fetched from the hub.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            # Diffusers itself refuses a repository whose model is not of one of its own classes.
            how = {key: kwargs.pop(key) for key in FETCHING if key in kwargs}
            folder = fetch_pipeline(str(pretrained_model_name_or_path), **how)
            kwargs["use_safetensors"] = True
        return super().from_pretrained(str(folder), **kwargs)

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to offload: the KV cache stays on its device between frames, so must the model."""
        name = type(self).__name__
        raise ScdError(f"{name} cannot offload its model to the CPU: use pipeline.to(device)")

    enable_sequential_cpu_offload = enable_model_cpu_offload

    def settings(self, steps: int | None = None, /, **changes: Any) -> RolloutOptions:
        """Give the saved settings of rollouts, with changes: fields of `RolloutOptions`.

        Raises:
            ScdError: a setting is unknown, of another type, or asks for guidance that does nothing.
        """
        if steps is not None:
            changes["steps"] = steps
        known = [field.name for field in fields(RolloutOptions)]
        for name in changes:
            if name not in known:
                raise ScdError(f"unknown setting {name!r}; known: {', '.join(known)}")
        changed = merge_rollout(RolloutOptions(**self.config.rollout), changes)
        by_scale = "guidance_scale" in changes
        off = changed.guidance == "none" and "guidance" not in changes
        if by_scale and changed.guidance_scale != 1 and off:
            raise ScdError(
                f"guidance_scale={changed.guidance_scale:g} does nothing with guidance='none': "
                f"give guidance='context' or 'condition' as well"
            )
        wanted = changes.get("guidance", "none") != "none"
        if wanted and not by_scale and changed.guidance_scale == 1:
            raise ScdError(
                f"guidance={changed.guidance!r} does nothing with guidance_scale=1: give a scale "
                f"as well, such as guidance_scale=1.5"
            )
        return changed


class SCDPipeline(RolloutPipeline):
    """Pipeline that continues videos frame by frame, given actions, a class label, or neither.

    `save_pretrained`, `from_pretrained` and `push_to_hub` work as in every diffusers pipeline: the
    last writes diffusers' own model card; `hf upload OWNER/NAME FOLDER` keeps that of `scd export`.
    The experiment's `options.yml` is saved too; `scd play` needs it.

    Args:
        transformer: the world model.
        vae: its autoencoder; None for a model of pixels.
        rollout: fields of `RolloutOptions`: the defaults for generating frames, saved with the
            pipeline.
        options: of the model's experiment, from `options_to_dict`.
    """

    _optional_components = ["vae"]

    def __init__(
        self,
        transformer: WorldModel,
        vae: AutoencoderDC | AutoencoderKL | None = None,
        rollout: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_settings(rollout, options)
        channels = 3 if vae is None else vae.config.latent_channels
        if transformer.channels != channels:
            raise ScdError(
                f"the transformer is a model of {transformer.channels} channels, "
                f"{'pixels have' if vae is None else 'the vae makes'} {channels}"
            )

    @torch.no_grad()
    def __call__(
        self,
        video: Tensor | np.ndarray,
        *,
        num_frames: int,
        actions: Tensor | np.ndarray | Sequence | None = None,
        labels: Tensor | np.ndarray | Sequence | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pt",
        **rollout: Any,
    ) -> SCDPipelineOutput:
        """Generate `num_frames` frames after the context frames of each video.

        Args:
            video: K context frames, (B, K, 3, H, W), or NumPy (B, K, H, W, 3); uint8, or floats in
                [0, 1].
            actions: (B, K + num_frames) integers, for the context and the new frames. For a model
                with `action_vector`, (B, K + num_frames, V) numbers, such as 1 for a held key or
                the movement of a mouse. For one video, B can be omitted. None: the null action.
            labels: (B,) integers.
            num_inference_steps: denoising steps per frame; None: as saved with the model.
            output_type: `pt` or `np`.
            rollout: other fields of `RolloutOptions`, such as solver, window, or guidance and
                guidance_scale. With weights in bf16, precision `fp32` counts as `auto`.

        Raises:
            ScdError: a value or shape does not fit, or a setting is unknown.
        """
        if output_type not in ("pt", "np"):
            raise ScdError(f"output_type is {output_type!r}, not pt or np")
        if not isinstance(num_frames, Integral) or num_frames < 1:
            raise ScdError(f"num_frames is {num_frames!r}, not a positive integer")
        num_frames = int(num_frames)
        video = self._checked(video)
        known = video.shape[1]
        model = self.transformer
        shape = model.actions_shape(len(video), known + num_frames)
        actions = as_numbers("actions", actions, shape, integers=not model.has_vectors)
        labels = as_numbers("labels", labels, (len(video),))
        device = self.transformer.device
        video = video.to(device)
        settings = self.settings(num_inference_steps, **rollout)
        engine = Rollout(self.transformer, settings, known + num_frames)
        codec: Codec = PixelCodec()
        if self.vae is not None:
            # Autocast accepts weights of either dtype.
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

    def _checked(self, video: Tensor | np.ndarray) -> Tensor:
        """Check a video, and convert it to floats in [0, 1], (B, K, 3, H, W).

        Raises:
            ScdError: its type, shape, size or range does not fit.
        """
        if isinstance(video, np.ndarray):
            try:
                video = torch.from_numpy(np.ascontiguousarray(video))
            except TypeError as error:
                raise ScdError(f"video holds {video.dtype}, not uint8 or floats") from error
            if video.ndim == 5:
                video = video.movedim(-1, 2)
        if not isinstance(video, Tensor):
            raise ScdError(f"video is a {type(video).__name__}, not a tensor or NumPy array")
        if video.dtype != torch.uint8 and not video.is_floating_point():
            raise ScdError(f"video holds {video.dtype}, not uint8 or floats")
        if video.ndim != 5 or video.shape[2] != 3:
            raise ScdError(f"video has shape {tuple(video.shape)}, expected (B, K, 3, H, W)")
        cell = self.transformer.config.patch_size
        cell *= 1 if self.vae is None else downsampling(self.vae)
        height, width = video.shape[-2:]
        if not height or not width or height % cell or width % cell:
            raise ScdError(f"video has frames of {height}x{width}, which {cell} does not divide")
        if video.dtype == torch.uint8:
            return video.float() / 255
        video = video.float()
        low, high = (float(value) for value in video.aminmax()) if video.numel() else (0.0, 1.0)
        if not -ROUNDING <= low <= high <= 1 + ROUNDING:  # also false for NaN
            raise ScdError(
                f"video has values from {low:.4g} to {high:.4g}: floats must lie in [0, 1]; use "
                f"uint8 for 0..255"
            )
        return video


def pipeline_of(
    options: Options, model: WorldModel, vae: AutoencoderDC | AutoencoderKL | None
) -> SCDPipeline:
    """Make the pipeline of an experiment's model."""
    return SCDPipeline(model, vae, asdict(options.rollout), options_to_dict(options))


def fetch_pipeline(name: str, **how: Any) -> Path:
    """Fetch a pipeline's repository from the hub, and return the folder that it is cached in.

    Args:
        how: to do it, as `snapshot_download` takes it: `revision`, `token` and others.

    Raises:
        ScdError: no network, no access, no such repository, or no pipeline in it.
    """
    try:
        folder = Path(snapshot_download(name, allow_patterns=SHARED, **how))
    except Exception as error:  # of HTTP, of the hub, of its storage back ends: many kinds
        nothing_cached = isinstance(error, LocalEntryNotFoundError)
        why = (error.__cause__ if nothing_cached else None) or error
        raise ScdError(
            f"{name}: no such folder, and it cannot be fetched from the hub "
            f"({type(why).__name__}: {reason(why)}): check the name, the network and HF_TOKEN"
        ) from error
    if not (folder / "model_index.json").is_file():
        raise ScdError(f"{name}: holds no pipeline (model_index.json is missing): check the name")
    return folder


def as_numbers(
    name: str, values: Any, shape: tuple[int, ...], integers: bool = True
) -> Tensor | None:
    """Convert conditions from lists, arrays or tensors of any number type to a tensor.

    It is on the CPU, where rollouts check the values.

    Raises:
        ScdError: they are not numbers, or have another shape.
    """
    if values is None:
        return None
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ScdError(f"{name} are not numbers of shape {shape} ({reason(error)})") from error
    if tensor.is_complex() or (
        integers and (tensor.is_floating_point() or tensor.dtype == torch.bool)
    ):
        raise ScdError(f"{name} are {tensor.dtype}, not {'integers' if integers else 'numbers'}")
    if shape[0] == 1 and tuple(tensor.shape) == shape[1:]:
        tensor = tensor[None]
    if tuple(tensor.shape) != shape:
        raise ScdError(f"{name} have shape {tuple(tensor.shape)}, expected {shape}")
    return (tensor.long() if integers else tensor.float()).cpu()
