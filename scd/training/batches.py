"""The batches of a run from any step on."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from scd.data.clips import StepSampler, TrainingClips
from scd.options import TrainOptions
from scd.training.signals import leave_signals_to_the_trainer


@contextmanager
def batches_from(
    step: int, clips: TrainingClips, options: TrainOptions, accelerator: Accelerator
) -> Iterator[Iterator[dict[str, Tensor]]]:
    """This process's batches, `gradient_accumulation` a step, after so many steps to the end."""
    sampler = StepSampler(
        options.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        step * options.gradient_accumulation,
        options.steps * options.gradient_accumulation,
    )
    loader = DataLoader(
        clips,
        batch_sampler=sampler,
        num_workers=options.workers,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=4 if options.workers else None,
        worker_init_fn=leave_signals_to_the_trainer,
    )
    batches = iter(loader)
    try:
        yield batches
    finally:
        # Only their iterator can stop workers that leave signals to the trainer, and the traceback
        # of an error may keep it for ever: the process would wait for them when it leaves.
        if options.workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]
