"""`SCDWanPipeline`: text to video, picture by picture, as a diffusers pipeline."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from scd.errors import ScdError
from scd.flow.sampler import Generators
from scd.pipeline import RolloutPipeline, SCDPipelineOutput, as_numbers
from scd.rollout import Rollout
from scd.wan.network import WanWorldModel
from scd.wan.text import clean_prompt, encode_prompts
from scd.wan.video_decoder import VideoDecoder

Prompts = str | list[str]


class SCDWanPipeline(RolloutPipeline):
    """Pipeline that makes videos of prompts with a `CausalWan` or an `SCDWan`.

    `scd wan convert` writes folders for `from_pretrained`. `save_pretrained` and `push_to_hub` work
    as in every diffusers pipeline.

    Args:
        transformer: the causal model.
        vae: Wan's autoencoder.
        text_encoder, tokenizer: as `scd.wan.text.load_text_encoder` finds them. None: calls take
            `prompt_embeds` in place of prompts, such as `scd wan encode-prompts` makes.
        rollout: fields of `RolloutOptions`: the defaults for generating, saved with the pipeline.
        options: where the model comes from; saved as `options.yml`.
    """

    _optional_components = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: WanWorldModel,
        vae: AutoencoderKLWan,
        text_encoder: nn.Module | None = None,
        tokenizer: object | None = None,
        rollout: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_settings(rollout, options)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline, see diffusers; with `options.yml`, if it is known."""
        # Diffusers has a folder `wan` of its own, and would look for the model's class in there.
        model = type(self.transformer)
        self.register_to_config(transformer=(model.__module__, model.__name__))
        super().save_pretrained(save_directory, *args, **kwargs)

    def encode_prompt(self, prompt: Prompts) -> Tensor:
        """Encode one prompt for each video: (B, 512, text_dim).

        Raises:
            ScdError: the pipeline has no text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ScdError(
                "this pipeline has no text encoder: give prompt_embeds and "
                "negative_prompt_embeds, or a text_encoder and tokenizer"
            )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return encode_prompts(self.tokenizer, self.text_encoder, list(map(clean_prompt, prompts)))

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts | None = None,
        negative_prompt: Prompts = "",
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        actions: Tensor | None = None,
        output_type: str = "pt",
        **rollout: Any,
    ) -> SCDPipelineOutput:
        """Generate videos.

        Args:
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds: see `stream`.
            num_frames: pictures of a video. Whole latent frames are generated: 1, 5, 9, …
            num_inference_steps: denoising steps of a latent frame; None: as saved with the model.
            generator: one for all videos, or one a video: then a video does not depend on the
                others.
            actions: (B, latent frames) integers, for a model that has actions.
            output_type: `pt` or `np`.
            rollout: other fields of `RolloutOptions`, such as guidance_scale or solver.

        Returns:
            `frames` (B, num_frames, 3, H, W) in [0, 1], as NumPy with channels last.

        Raises:
            ScdError: a value or shape does not fit, or a setting is unknown.
        """
        if output_type not in ("pt", "np"):
            raise ScdError(f"output_type is {output_type!r}, not pt or np")
        stream = self.stream(
            prompt,
            negative_prompt,
            height,
            width,
            num_frames,
            num_inference_steps,
            generator,
            prompt_embeds,
            negative_prompt_embeds,
            **rollout,
        )
        shape = (stream.batch, stream.latent_frames)
        actions = as_numbers("actions", actions, shape)
        pictures = []
        with self.progress_bar(total=stream.latent_frames) as bar:
            for number in range(stream.latent_frames):
                pictures.append(stream.step(None if actions is None else actions[:, number]))
                bar.update()
        frames = torch.cat(pictures, dim=1)
        if output_type == "np":
            return SCDPipelineOutput(frames=frames.movedim(2, -1).cpu().numpy())
        return SCDPipelineOutput(frames=frames)

    @torch.no_grad()
    def stream(
        self,
        prompt: Prompts | None = None,
        negative_prompt: Prompts = "",
        height: int = 480,
        width: int = 832,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **rollout: Any,
    ) -> "VideoStream":
        """Begin videos whose pictures come as soon as they are there.

        Args: as of a call, and
            prompt: one for each video; a string is one video.
            negative_prompt: what guidance leads away from, for all or for each; else not used.
            prompt_embeds, negative_prompt_embeds: (B, T, text_dim), in place of prompts.
            num_frames: None: without end, which needs a `window`; memory then stays the same.

        Raises:
            ScdError: a value or shape does not fit, or a setting is unknown.
        """
        settings = self.settings(num_inference_steps, **rollout)
        if num_frames is not None and (not isinstance(num_frames, int) or num_frames < 1):
            raise ScdError(f"num_frames is {num_frames!r}, not a positive integer")
        if num_frames is None and not settings.window:
            raise ScdError("a stream without end needs a window of past latent frames: window=21")
        shape = self._latent_shape(height, width)
        model = self.transformer
        latent_frames = 0 if num_frames is None else self._latent_frames(num_frames)
        engine = Rollout(model, settings, latent_frames)
        text = self.text_embeds("prompt", prompt, prompt_embeds)
        negative = None
        if engine.guidance == "condition":
            given = negative_prompt if negative_prompt_embeds is None else None
            negative = self.text_embeds("negative_prompt", given, negative_prompt_embeds)
            negative = for_all(negative, len(text), "negative_prompt")
        if isinstance(generator, list) and len(generator) != len(text):
            raise ScdError(f"{len(generator)} generators for {len(text)} videos")
        nothing = torch.zeros(len(text), 0, *shape, device=model.device)
        engine.reset(nothing, generator=generator, text=text, negative_text=negative)
        return VideoStream(self, engine, len(text), negative, num_frames, latent_frames)

    def text_embeds(self, name: str, prompt: Prompts | None, embeds: Tensor | None) -> Tensor:
        """Take embeddings (B, T, text_dim) as they are, or make them of prompts.

        Raises:
            ScdError: neither or both are given, or there is no text encoder.
        """
        if (prompt is None) == (embeds is None):
            raise ScdError(f"give either {name} or {name}_embeds")
        return self.encode_prompt(prompt) if embeds is None else embeds  # type: ignore[arg-type]

    def _latent_frames(self, pictures: int) -> int:
        """Count the latent frames of so many pictures: the first is one, the others four each."""
        return 1 + math.ceil((pictures - 1) / self.vae.config.scale_factor_temporal)

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        cell = self.vae.config.scale_factor_spatial
        _, rows, columns = self.transformer.config.patch_size
        if min(height, width) < 1 or height % (cell * rows) or width % (cell * columns):
            raise ScdError(
                f"pictures of {height}x{width} (height x width): {cell * rows} must divide the "
                f"height and {cell * columns} the width"
            )
        return (self.transformer.config.in_channels, height // cell, width // cell)


class VideoStream(Iterator[Tensor]):
    """Videos in the making: every `step` makes the pictures of the next latent frame.

    As an iterator it gives out (B, 1, 3, H, W) first and then (B, 4, 3, H, W), up to `num_frames`
    pictures. Made by `SCDWanPipeline.stream`.

    Attributes:
        rollout: what generates the latent frames.
        decoder: what decodes them.
        batch: number of videos.
        latent_frames: of `num_frames` pictures; 0: without end.
    """

    def __init__(
        self,
        pipeline: SCDWanPipeline,
        rollout: Rollout,
        batch: int,
        negative: Tensor | None,
        num_frames: int | None,
        latent_frames: int,
    ):
        self.rollout = rollout
        self.decoder = VideoDecoder(pipeline.vae, rollout.precision)
        self.batch = batch
        self.latent_frames = latent_frames
        self._pipeline = pipeline
        self._negative = negative
        self._left = num_frames

    def set_prompt(
        self, prompt: Prompts | None = None, prompt_embeds: Tensor | None = None
    ) -> None:
        """Give the frames to come another prompt, one for all videos or one for each.

        The frames before keep theirs in the KV cache; the negative prompt stays. Of a model that
        denoises chunks of frames, the rest of the present chunk is made already.

        Raises:
            ScdError: neither or both are given, or there are too many or too few of them.
        """
        embeds = self._pipeline.text_embeds("prompt", prompt, prompt_embeds)
        self.rollout.set_text(for_all(embeds, self.batch, "prompt"), self._negative)

    @torch.no_grad()
    def step(self, action: Tensor | None = None) -> Tensor:
        """Make the pictures of the next latent frame: (B, 1 or 4, 3, H, W) in [0, 1].

        Args:
            action: (B,), the action that leads to it, of a model that has actions.

        Raises:
            ScdError: beyond `num_frames`.
        """
        if self._left is not None and self._left < 1:
            raise ScdError("the video is complete: begin another stream")
        pictures = self.decoder.decode(self.rollout.step(action))
        if self._left is not None:
            pictures = pictures[:, : self._left]
            self._left -= pictures.shape[1]
        return pictures

    def __next__(self) -> Tensor:
        if self._left == 0:
            raise StopIteration
        return self.step()


def for_all(embeds: Tensor, batch: int, name: str) -> Tensor:
    """Give each of a batch's videos an embedding: its own, or the only one that there is.

    Raises:
        ScdError: their number is neither 1 nor that of the videos.
    """
    if len(embeds) not in (1, batch):
        raise ScdError(f"{len(embeds)} of {name} for {batch} videos: give one, or one for each")
    return embeds.expand(batch, -1, -1)
