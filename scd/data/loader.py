"""The batches of a run from any step on."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from scd.data.clips import StepSampler, TrainingClips
from scd.errors import ScdError
from scd.options import TrainOptions
from scd.utils.signals import ignore_stop_signals


@contextmanager
def training_batches(
    step: int, clips: TrainingClips, options: TrainOptions, accelerator: Accelerator
) -> Iterator[Iterator[dict[str, Tensor]]]:
    """This process's batches, `gradient_accumulation` a step, after so many steps to the end.

    Raises:
        ScdError: a clip cannot be read, or the workers have no room to hand over their batches.
    """
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
        worker_init_fn=ignore_stop_signals,
    )
    batches = iter(loader)
    try:
        yield _told(batches)
    finally:
        # Only their iterator can stop workers that ignore stop signals, and the traceback
        # of an error may keep it for ever: the process would wait for them when it leaves.
        if options.workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _told(batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tell in one line that shared memory is full, through which workers hand over their batches.

    Docker gives a container 64 MB of it. Torch says so in a worker's traceback, or that the worker
    died of a bus error.
    """
    try:
        yield from batches
    except RuntimeError as error:
        if "shared memory" not in str(error) and "</torch_" not in str(error):
            raise
        size = shutil.disk_usage("/dev/shm").total / 1e6
        raise ScdError(
            f"/dev/shm has {size:.0f} MB, too few for the batches that data workers hand over: "
            f"give the container more (docker run --shm-size=8g), or set train.workers=0"
        ) from error
