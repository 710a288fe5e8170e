"""Train a Wan on latents of captioned videos, or distil it on prompts alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scd.data.clips import Clips
from scd.data.prompts import prompts_in
from scd.data.video import write_video
from scd.evaluation.pictures import to_bytes
from scd.flow.objective import with_scaled_latents
from scd.options import Options
from scd.rollout import Rollout
from scd.training.build import build_codec, latent_shape, make_objective
from scd.training.checkpoint import start_is_lost
from scd.training.encode import check_training_latents
from scd.training.world_model_task import HeldOutLoss, WorldModelTask
from scd.utils.precision import resolve_precision
from scd.utils.processes import error_barrier, processes, split_between_processes
from scd.utils.seeding import generator
from scd.wan.captioned import CaptionedLatents, Prompts, open_prompts
from scd.wan.from_options import start_wan
from scd.wan.training_run import pipeline_of_run, save_run
from scd.wan.video_codec import WanCodec

VALIDATION_VIDEOS = 4


class WanTask(WorldModelTask):
    """The task of training a model of Wan's blocks; see `scd.training.tasks.Task`."""

    pictures = {"*.mp4": "generated from the validation list's first prompts"}
    codec: WanCodec  # type: ignore[assignment]
    training_data: Clips  # type: ignore[assignment]

    def __init__(self, options: Options, device: torch.device):
        self.options = options
        self.device = device
        codec = build_codec(options)
        assert isinstance(codec, WanCodec)
        self.codec = codec.to(device)
        self.codec.precision = resolve_precision("auto", device)
        torch.manual_seed(options.seed)
        start = replace(options, init_from=None) if start_is_lost(options) else options
        self.network = start_wan(start, codec.channels, codec.downsampling)
        self.network.set_gradient_checkpointing(options.train.gradient_checkpointing)
        self.objective = make_objective(self.network, options.flow, options.seed)
        self.texts = open_prompts(options)
        negative = options.wan.negative_prompt
        data: CaptionedLatents | Prompts
        if options.data.source == "prompts":
            data = Prompts(options)
        else:
            data = CaptionedLatents(options, options.data.train_list, codec.frames_per_latent)
            check_training_latents(data, codec, options)
        self.training_data = data
        self.prompts: list[str] = []  # of validation
        if options.train.sample_every:
            prompts = prompts_in(Path(options.data.root) / options.data.val_list)
            self.prompts = prompts[: min(options.eval.videos, VALIDATION_VIDEOS)]
        with error_barrier():
            if processes().is_main_process:
                self.texts.check([negative, *self.prompts, *data.prompts])
        self.null_text = self._text_of(negative)[None]
        self.held_out = None
        if options.train.val_loss_every:
            clips = CaptionedLatents(options, options.data.val_list, codec.frames_per_latent)
            self.held_out = HeldOutLoss(clips, codec, options, device)

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = {**batch, "null_text": self.null_text}
        if "latents" in batch:
            return with_scaled_latents(batch, self.codec)
        # Of a rollout from prompts alone, nothing but the shape is read.
        shape = (
            len(batch["text"]),
            self.options.data.frames,
            *latent_shape(self.codec, self.options),
        )
        return {**batch, "latents": self.null_text.new_zeros(()).expand(shape)}

    @torch.no_grad()
    def validate(self, network: Any, folder: Path) -> dict[str, float]:
        """Generate a video of each of the first prompts; metrics there are none."""
        o = self.options
        empty = torch.zeros(1, 0, *latent_shape(self.codec, o), device=self.device)
        with error_barrier():
            for number in split_between_processes(range(len(self.prompts))):
                rollout = Rollout(network, o.rollout, o.eval.new_frames)
                rollout.reset(
                    empty,
                    generator=generator("cpu", "validate", o.seed, number),
                    text=self._text_of(self.prompts[number])[None],
                    negative_text=self.null_text,
                )
                latents = [rollout.step() for _ in range(o.eval.new_frames)]
                video = self.codec.decode(torch.stack(latents, dim=1))[0].cpu()
                write_video(folder / f"{number:02d}.mp4", to_bytes(video), o.data.fps)
        return {}

    def export(self, network: Any, folder: Path) -> None:
        """Save the model as `scd wan convert` does, with all options of the run beside it."""
        pipeline = pipeline_of_run(network, self.codec.autoencoder, self.options)
        save_run(pipeline, self.options, folder)

    def _text_of(self, prompt: str) -> Tensor:
        return self.texts.embedding(prompt).float().to(self.device)
