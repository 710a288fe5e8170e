"""Train a world model: objective, parameter groups, validation by samples and held-out loss."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from scd.data.clips import ClipFolder, clip_folder
from scd.data.loader import HELD_OUT_STREAM
from scd.errors import ScdError
from scd.evaluation.evaluate import evaluate_in_passing
from scd.flow.objective import LEVELS, errors_by_level, with_scaled_latents
from scd.models.autoencoder import load_codec
from scd.models.load import build_world_model
from scd.models.world_model import FirstLook, WorldModel
from scd.options import OptimOptions, Options
from scd.pipeline import pipeline_of
from scd.training.build import AnyCodec, make_objective, start_from
from scd.training.encode import check_training_latents
from scd.training.step_cost import ClipCost, clip_cost
from scd.utils.precision import autocast, resolve_precision
from scd.utils.processes import error_barrier, processes, split_between_processes
from scd.utils.seeding import generator

# The parameters of a block that Muon trains, and the number of matrices that each stacks.
MATRICES = {
    "attention.qkv.weight": 3,
    "attention.out.weight": 1,
    "mlp.up.weight": 1,
    "mlp.down.weight": 1,
}
VALIDATION_VIDEOS = 16  # during training; `scd evaluate` takes all
HELD_OUT_CLIPS = 16


class WorldModelTask:
    """The task of training a world model; see `scd.training.tasks.Task`."""

    critic: nn.Module | None = None
    pictures = {
        "grid.png": "generated above real, given frames framed",
        "*.mp4": "left generated, right real, given frames framed",
    }

    def __init__(self, options: Options, device: torch.device):
        self.options = options
        self.codec = load_codec(options.autoencoder.path).to(device)
        # For 8-bit pixels, TF32 is precise enough, and fp32 takes many times as long.
        self.codec.precision = resolve_precision("tf32", device)
        torch.manual_seed(options.seed)
        self.network = build_world_model(options, self.codec)
        start_from(options, self.network)
        self.network.set_gradient_checkpointing(options.train.gradient_checkpointing)
        self.objective: nn.Module = make_objective(self.network, options.flow, options.seed)
        self.training_data = clip_folder(options, options.data.train_list, options.data.source)
        self.validation_data = clip_folder(options, options.data.val_list, "video")
        if options.data.source == "latents":
            check_training_latents(self.training_data, self.codec, options)
        if options.train.sample_every:
            refuse_short_clips(self.validation_data, options)
        self.held_out = None
        if options.train.val_loss_every:
            self.held_out = HeldOutLoss(self.validation_data, self.codec, options, device)

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_scaled_latents(batch, self.codec)

    def clip_cost(self) -> ClipCost:
        return clip_cost(self.options, self.codec)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.network, self.options.optim)

    def critic_groups(self) -> list[dict[str, Any]]:
        raise AssertionError("a world model is trained without a critic")

    def trains_network(self, step: int) -> bool:
        return True

    def on_average_changed(self, average: dict[str, Tensor]) -> None:
        pass

    def validate(self, network: WorldModel, folder: Path) -> dict[str, float]:
        """Evaluate one trajectory of a few videos, which all processes share."""
        o = self.options.eval
        videos = min(o.videos, VALIDATION_VIDEOS)
        few = replace(
            o,
            videos=videos,
            trajectories=1,
            seeds=o.seeds[:1],
            swapped_actions=[],
            windows=0,
            batch_size=min(o.batch_size, math.ceil(videos / processes().num_processes)),
        )
        options = replace(self.options, eval=few)
        return evaluate_in_passing(network, self.codec, self.validation_data, options, folder)

    def export(self, network: WorldModel, folder: Path) -> None:
        vae = getattr(self.codec, "autoencoder", None)
        pipeline_of(self.options, network, vae).save_pretrained(folder)


def refuse_short_clips(data: ClipFolder, options: Options) -> None:
    """Refuse clips too short to validate with before the first step, not after many; collective.

    Raises:
        ScdError: naming the first of them.
    """
    o = options.eval
    needed = (o.context_frames + o.new_frames - 1) * options.data.frame_stride + 1
    with error_barrier():
        if processes().is_main_process:
            for number in range(min(o.videos, VALIDATION_VIDEOS, len(data))):
                if (frames := data.length(number)) < needed:
                    raise ScdError(
                        f"{data.root / str(data.name(number))}: {frames} frames, but validation "
                        f"with eval.context_frames={o.context_frames} and eval.new_frames="
                        f"{o.new_frames} needs {needed}; train.sample_every=0 does without"
                    )


def parameter_groups(network: WorldModel, options: OptimOptions) -> list[dict[str, Any]]:
    """Group parameters by learning rate and optimizer: Muon for matrices in attention and MLPs."""
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        stacked = [count for ending, count in MATRICES.items() if name.endswith(ending)]
        muon_lr = options.muon_lr if stacked else None
        lr = options.lr if muon_lr is None else muon_lr
        lr *= options.decoder_lr_scale if name.startswith("decoder.") else 1.0
        muon = muon_lr is not None
        group = groups.setdefault((lr, muon), {"params": [], "lr": lr, "muon": []})
        group["params"].append(parameter)
        group["muon"] += stacked if muon else []
    return list(groups.values())


class HeldOutLoss:
    """Mean squared error of the velocity on fixed validation clips with fixed noise.

    Clips are as long as those of training, and shared by all processes: each reads and encodes its
    own once. Nothing is dropped or perturbed, and every history is clean, whatever the training
    objective shows the model.

    Args:
        data: validation clips, as pixels or latents.

    Raises:
        ScdError: a clip is broken or shorter than `data.frames`; see also `error_barrier`.
    """

    def __init__(self, data: ClipFolder, codec: AnyCodec, options: Options, device: torch.device):
        self.seed = options.seed
        self.device = device
        self.prefix = options.flow.prefix_frames[0] if options.flow.prefix_frames else 0
        with error_barrier():
            self.numbers = split_between_processes(range(min(HELD_OUT_CLIPS, len(data))))
            self.clips = [_encoded(data, number, codec, options, device) for number in self.numbers]

    def __call__(self, network: WorldModel, precision: str) -> dict[str, float]:
        """Measure `loss_at_<σ>`, a mean over clips and frames, and `loss`, their mean; collective.

        Returns:
            The same values on every process.
        """
        with error_barrier():
            mine = [
                (number, self._errors(network, number, clip, precision))
                for number, clip in zip(self.numbers, self.clips, strict=True)
            ]
        # In the order of the clips, so that the sum is the same for any number of processes.
        of_clips: list[Any] = sorted(gather_object(mine))
        means = np.mean([errors for _, errors in of_clips], axis=0)
        at_levels = {f"loss_at_{s:g}": float(v) for s, v in zip(LEVELS, means, strict=True)}
        return {"loss": float(means.mean()), **at_levels}

    @torch.no_grad()
    def _errors(
        self, network: WorldModel, number: int, clip: dict[str, Tensor], precision: str
    ) -> list[float]:
        """Measure the errors of one clip at each noise level."""
        latents, actions, label, text = (
            clip[key].to(self.device) if key in clip else None
            for key in ("latents", "actions", "label", "text")
        )
        assert latents is not None
        conditions = network.frame_conditions(latents.shape[:2], actions, label)
        shape = latents[:, None, network.first_predicted :].shape
        of_clip = generator("cpu", "held-out loss", self.seed, number)
        noise = torch.randn(shape, generator=of_clip).to(self.device)
        look = None
        if network.takes_first_look:
            other = torch.randn(noise[:, 0].shape, generator=of_clip)
            look = FirstLook.pure(other.to(self.device))
        with autocast(self.device, precision):
            errors = errors_by_level(
                network, latents, conditions, noise, self.prefix, first_look=look, text=text
            )
        return errors.double().mean(dim=(0, 2)).tolist()


def _encoded(
    data: ClipFolder, number: int, codec: AnyCodec, options: Options, device: torch.device
) -> dict[str, Tensor]:
    """Read a clip as a batch of one, with scaled latents, on the CPU."""
    rng = np.random.default_rng([options.seed, HELD_OUT_STREAM, number])
    clip = data.read(number, options.data.frames, options.data.frame_stride, rng)
    batch = with_scaled_latents({key: v[None].to(device) for key, v in clip.items()}, codec)
    return {key: value.cpu() for key, value in batch.items()}
