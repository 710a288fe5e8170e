"""A short training in memory, to see what a changed model recovers."""

from collections.abc import Iterator

import torch

from scd.data.clips import clip_folder
from scd.data.loader import TrainingClips
from scd.errors import ScdError
from scd.flow.objective import FlowObjective, with_scaled_latents
from scd.models import WorldModel
from scd.models.autoencoder import Codec
from scd.models.load import LoadedModel
from scd.options import Options
from scd.training.encode import check_training_latents
from scd.training.optimizer import make_optimizer
from scd.training.world_model_task import parameter_groups
from scd.utils.precision import autocast, has_bf16, resolve_precision

WARMUP = 10  # steps


def open_training_clips(loaded: LoadedModel) -> TrainingClips:
    """The clips that the options train on; one is read, to see that they can be.

    Raises:
        ScdError: they cannot, or their latents are not what the options' autoencoder makes.
    """
    options, o = loaded.options, loaded.options.data
    try:
        data = clip_folder(options, o.train_list, o.source)
        if o.source == "latents":
            check_training_latents(data, loaded.codec, options)
        clips = TrainingClips(data, o.frames, o.frame_stride, options.seed, o.max_broken_clips)
        clips[0]
    except ScdError as error:
        raise ScdError(f"{error}; --fine-tune 0 probes without training data") from error
    return clips


def fine_tuning(
    model: WorldModel,
    codec: Codec,
    options: Options,
    clips: TrainingClips,
    steps: int,
    share: float,
) -> Iterator[int]:
    """Train in place by the options' objective, optimiser and batches of one process; yields the
    number of steps done, from 0.

    All models see the same clips: those that follow the ones of the options' own run.

    Args:
        share: of the options' learning rates, constant after a warm-up.
    """
    yield 0
    t = options.train
    model.set_gradient_checkpointing(t.gradient_checkpointing)
    objective = FlowObjective(model, options.flow, options.seed)
    optimizer = make_optimizer(
        parameter_groups(model, options.optim), options.optim, has_bf16(model.device)
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    device = model.device
    precision = resolve_precision(t.mixed_precision, device)
    for step in range(steps):
        model.train()
        for part in range(t.gradient_accumulation):
            first = ((t.steps + step) * t.gradient_accumulation + part) * t.batch_size
            read = [clips[number] for number in range(first, first + t.batch_size)]
            batch = {key: torch.stack([clip[key] for clip in read]) for key in read[0]}
            samples = batch.pop("sample").tolist()
            batch = with_scaled_latents({k: v.to(device) for k, v in batch.items()}, codec)
            with autocast(device, precision):
                loss = objective({**batch, "sample": samples})["loss"]
            (loss / t.gradient_accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.optim.max_grad_norm)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = share * rate * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.eval()
        yield step + 1
