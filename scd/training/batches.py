"""The batches of a run from any step on."""

from accelerate import Accelerator
from torch.utils.data import DataLoader

from scd.data.clips import StepSampler, TrainingClips
from scd.options import TrainOptions
from scd.training.signals import leave_signals_to_the_trainer


def batches_from(
    step: int, clips: TrainingClips, options: TrainOptions, accelerator: Accelerator
) -> DataLoader:
    """This process's batches, `gradient_accumulation` a step, after so many steps to the end."""
    sampler = StepSampler(
        options.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        step * options.gradient_accumulation,
        options.steps * options.gradient_accumulation,
    )
    return DataLoader(
        clips,
        batch_sampler=sampler,
        num_workers=options.workers,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=4 if options.workers else None,
        worker_init_fn=leave_signals_to_the_trainer,
    )
