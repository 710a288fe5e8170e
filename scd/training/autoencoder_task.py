"""Train an autoencoder: first all of it, then its decoder alone.

The first stage minimises L1 + LPIPS on single frames (arXiv 2410.10733).

In the second, the encoder is frozen, so that its latents, and every model trained on them, stay
valid. The decoder learns from latents that a world model predicts, which are a little wrong in ways
of their own, or against a patch discriminator, or both.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from scd.data.clips import clip_folder, with_float_pixels
from scd.errors import ScdError, naming_option
from scd.evaluation.metrics import AvailableMetrics
from scd.models.autoencoder import (
    ENCODING,
    Autoencoder,
    LatentCodec,
    build_autoencoder,
    downsampling,
    encode_alike,
    load_codec,
    stored_dtype,
)
from scd.models.discriminator import PatchDiscriminator
from scd.models.load import load_checkpoint_for_use
from scd.models.world_model import CausalWorldModel
from scd.options import Options
from scd.rollout import Rollout
from scd.training.autoencoder_objective import (
    DecoderObjective,
    ReconstructionLoss,
    ReconstructionObjective,
)
from scd.training.build import start_from
from scd.utils.files import write_atomically
from scd.utils.precision import resolve_precision, without_autocast
from scd.utils.processes import processes
from scd.utils.seeding import generator

RECONSTRUCTIONS_SHOWN = 16


class AutoencoderTask:
    """The task of training an autoencoder; see `scd.training.tasks.Task`."""

    pictures = {"reconstructions.png": "real above reconstructed"}
    held_out = None  # there are no noise levels

    def __init__(self, options: Options, device: torch.device):
        self.options = options
        self.device = device
        self.critic: PatchDiscriminator | None = None
        self.codec: LatentCodec | None = None  # of the second stage
        self.predictor: Predictor | None = None
        self.network: Autoencoder
        self.objective: nn.Module
        reconstruction = ReconstructionLoss(options.autoencoder.lpips_weight, device)
        torch.manual_seed(options.seed)
        clips = options
        if options.autoencoder.path is None:
            self.network = build_autoencoder(options.autoencoder)
            start_from(options, self.network)
            self.objective = ReconstructionObjective(self.network, reconstruction)
        else:
            # For 8-bit pixels, TF32 is precise enough, and fp32 takes many times as long.
            tf32 = resolve_precision("tf32", device)
            self.codec = LatentCodec(_with_frozen_encoder(options), tf32).to(device)
            self.network = self.codec.autoencoder
            d = options.discriminator
            if d.weight:
                self.critic = PatchDiscriminator(d.channels, d.layers, d.frames)
            self.objective = DecoderObjective(
                self.network, reconstruction, self.critic, d.weight, d.frames
            )
            if options.autoencoder.world_model is not None:
                self.predictor = Predictor(options, self.codec, device)
                clips = replace(options, model=self.predictor.options.model)
        self.training_data = clip_folder(clips, options.data.train_list, "video")
        self.validation_data = clip_folder(clips, options.data.val_list, "video")

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turn pixels into floats; for a decoder, add `latents` of the frames that it decodes."""
        batch = with_float_pixels(batch)
        if self.codec is None:
            return batch
        latents = self.codec.encode(batch["video"])
        if self.predictor is not None:
            latents = self.predictor.continue_clips(latents, batch)
        video = batch["video"][:, -latents.shape[1] :]
        return {**batch, "video": video, "latents": self.codec.unscale(latents)}

    def clip_cost(self) -> None:
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        lr, scale = self.options.optim.lr, self.options.optim.decoder_lr_scale
        encoding: list[nn.Parameter] = []
        decoding: list[nn.Parameter] = []
        for name, parameter in self.network.named_parameters():
            (encoding if name.startswith(ENCODING) else decoding).append(parameter)
        groups = [{"params": encoding, "lr": lr}, {"params": decoding, "lr": lr * scale}]
        return groups if self.codec is None else groups[1:]

    def critic_groups(self) -> list[dict[str, Any]]:
        assert self.critic is not None
        lr = self.options.optim.discriminator_lr
        return [{"params": list(self.critic.parameters()), "lr": lr}]

    def trains_network(self, step: int) -> bool:
        return True

    def on_average_changed(self, average: dict[str, Tensor]) -> None:
        pass

    @torch.no_grad()
    def validate(self, network: Autoencoder, folder: Path) -> dict[str, float]:
        if not processes().is_main_process:
            return {}
        real = self._validation_frames()
        codec = LatentCodec(network)
        out = codec.decode(codec.encode(real))
        shown = RECONSTRUCTIONS_SHOWN
        pairs = torch.stack([real[:shown, 0], out[:shown, 0]]).clamp(0, 1)
        rows = rearrange(pairs, "k n c h w -> (k h) (n w) c").mul(255).round().byte().cpu().numpy()
        picture = Image.fromarray(rows)
        picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
        write_atomically(folder / "reconstructions.png", picture.save)
        metrics = AvailableMetrics()
        found = metrics.compare_frames(out, real)
        if self.predictor is not None:
            parts = []
            for clips in self._validation_clips(self.options.data.frames):
                latents = self.predictor.continue_clips(codec.encode(clips["video"]), clips)
                predicted, real = latents[:, 1:], clips["video"][:, 1 - latents.shape[1] :]
                parts.append(metrics.compare_frames(codec.decode(predicted), real))
            for name in parts[0]:
                found[f"predicted_{name}"] = torch.cat([part[name] for part in parts])
        return {name: float(values.mean()) for name, values in found.items()}

    @torch.no_grad()
    def export(self, network: Autoencoder, folder: Path) -> None:
        """Save in half precision, with the scaling factor that gives the latents unit variance.

        Rounding the weights moves a reconstruction by far less than its error. The second stage
        leaves the latents alone: their scaling factor, and the precision of the encoder.
        """
        dtype = torch.float16
        if self.codec is None:
            codec = LatentCodec(network)
            unscaled = codec.unscale(codec.encode(self._validation_frames().to(network.device)))
            network.register_to_config(scaling_factor=round(1 / float(unscaled.std()), 4))
        else:
            assert self.options.autoencoder.path is not None
            dtype = stored_dtype(self.options.autoencoder.path)
        network.to(dtype).save_pretrained(folder)

    def _validation_frames(self) -> Tensor:
        """Read fixed frames of `eval.videos` different clips, (n, 1, 3, H, W) in [0, 1]."""
        return torch.cat([clips["video"] for clips in self._validation_clips(1)])

    def _validation_clips(self, frames: int) -> Iterator[dict[str, Any]]:
        """Read a fixed clip of each of `eval.videos` videos, in batches of `eval.batch_size`."""
        count = min(self.options.eval.videos, len(self.validation_data))
        size, stride = self.options.eval.batch_size, self.options.data.frame_stride
        for numbers in (range(i, min(i + size, count)) for i in range(0, count, size)):
            clips = [
                self.validation_data.read(i, frames, stride, np.random.default_rng(i))
                for i in numbers
            ]
            stacked = {key: torch.stack([clip[key] for clip in clips]) for key in clips[0]}
            tensors = {key: values.to(self.device) for key, values in stacked.items()}
            yield {**tensors, "sample": list(numbers)}


class Predictor:
    """A frozen world model that continues clips as in use, for a decoder to learn from.

    Args:
        options: name it in `autoencoder.world_model`.
        codec: that of the decoder.

    Raises:
        ScdError: it is missing or damaged, not causal, or of other latents, frames or frame rate.
    """

    def __init__(self, options: Options, codec: LatentCodec, device: torch.device):
        path = str(options.autoencoder.world_model)
        with naming_option("autoencoder.world_model"):
            loaded = load_checkpoint_for_use(Path(path)).for_rollouts()
        self.options = loaded.options
        # Compiled for each batch anew, a rollout would take longer than it saves.
        self.rollout = replace(loaded.options.rollout, compile=False)
        self.model = loaded.model.to(device).requires_grad_(False)
        self.seed = options.seed
        self.frames = options.autoencoder.predicted_frames
        if not isinstance(loaded.model, CausalWorldModel):
            raise ScdError(
                f"autoencoder.world_model={path}: a {self.options.model.type}, but clips are "
                f"continued frame by frame, by a causal model"
            )
        if not encode_alike(loaded.codec, codec):
            raise ScdError(
                f"autoencoder.world_model={path}: its latents are not those of autoencoder.path="
                f"{options.autoencoder.path}"
            )
        for key in ("frame_size", "frame_stride", "resize_shorter", "mirror"):
            was, is_ = (getattr(o.data, key) for o in (self.options, options))
            if was != is_:
                raise ScdError(
                    f"autoencoder.world_model={path}: was trained with data.{key}={was}, but here "
                    f"data.{key}={is_}"
                )

    @torch.no_grad()
    def continue_clips(self, latents: Tensor, batch: dict[str, Any]) -> Tensor:
        """Predict the last `autoencoder.predicted_frames` frames of clips from those before them.

        Args:
            latents: (B, F, C, h, w), of the clips, scaled.
            batch: `actions` or `label` of the clips, and the numbers of the samples, `sample`.

        Returns:
            The last given frame and the predicted ones, (B, 1 + predicted, C, h, w).
        """
        known = latents.shape[1] - self.frames
        actions, labels = batch.get("actions"), batch.get("label")
        generators = [generator("cpu", self.seed, "decoder", n) for n in batch["sample"]]
        with without_autocast(latents.device):
            rollout = Rollout(self.model, self.rollout, latents.shape[1])
            past = None if actions is None else actions[:, :known]
            rollout.reset(latents[:, :known], past, labels, generators)
            coming = range(known, latents.shape[1])
            frames = [rollout.step(None if actions is None else actions[:, i]) for i in coming]
        return torch.stack([latents[:, known - 1], *frames], dim=1)


def _with_frozen_encoder(options: Options) -> Autoencoder:
    """Load the autoencoder at `autoencoder.path` with gradients for its decoder only.

    Raises:
        ScdError: see `load_codec`; or the frame size does not divide by its downsampling.
    """
    codec = load_codec(options.autoencoder.path)
    assert isinstance(codec, LatentCodec)
    autoencoder = codec.autoencoder.float().train()
    cell = downsampling(autoencoder)
    if options.data.frame_size % cell:
        raise ScdError(
            f"data.frame_size={options.data.frame_size} does not divide by {cell}, the "
            f"downsampling of {options.autoencoder.path}"
        )
    for name, parameter in autoencoder.named_parameters():
        parameter.requires_grad_(not name.startswith(ENCODING))
    return autoencoder
