"""A short training in memory, to see what a changed model recovers."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch.optim import AdamW

from scd.data.clips import TrainingClips, clip_folder
from scd.data.encode import check_training_latents
from scd.flow.objective import FlowObjective
from scd.models import WorldModel
from scd.models.autoencoder import Codec
from scd.options import Options

WARMUP = 10  # steps


def fine_tuning(
    model: WorldModel, codec: Codec, options: Options, steps: int, rate: float
) -> Iterator[int]:
    """Train in place by the options' data and objective; yields the number of steps done, from 0.

    Clips go on where the options' own run ends, so they are fresh, and the same for all models.

    Args:
        rate: of AdamW, constant after a warm-up.

    Raises:
        ScdError: there are no training data.
    """
    yield 0
    if not steps:
        return
    data = clip_folder(options, options.data.train_list, options.data.source)
    if options.data.source == "latents":
        check_training_latents(data, codec, options)
    clips = TrainingClips(data, options.data.frames, options.data.frame_stride, options.seed)
    objective = FlowObjective(model, codec, options.flow, options.seed)
    betas = (options.optim.betas[0], options.optim.betas[1])
    optimizer = AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=0.0)
    size, device = options.train.batch_size, model.device
    bf16 = options.train.mixed_precision == "bf16"
    model.train()
    for step in range(steps):
        first = (options.train.steps + step) * size
        read = [clips[number] for number in range(first, first + size)]
        batch = {key: torch.stack([clip[key] for clip in read]).to(device) for key in read[0]}
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = objective(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.eval()
        yield step + 1
        model.train()
    model.eval()
