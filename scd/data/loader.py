"""The clips of training: which comes when, and the batches of a run from any step on.

A training clip is a pure function of (seed, sample number). Neither the number of data workers nor
the history of the run changes it. Sample numbers count clips over all processes and steps.
"""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from scd.data.clips import Clips
from scd.errors import ScdError
from scd.options import TrainOptions
from scd.utils.signals import ignore_stop_signals

# Sub-streams of the seed; no two draws share a number. Stream 3 belongs to evaluation.
ORDER_STREAM, START_STREAM, FRAMING_STREAM, HELD_OUT_STREAM = 1, 2, 4, 5


class TrainingClips(Dataset):
    """Random clips: every epoch visits each entry once, in a new order and at a new first frame.

    Crops and mirroring are drawn anew as well. `video` is in uint8 and becomes floats on the device
    (`scd.data.clips.with_float_pixels`).

    Args:
        max_broken: 0: a clip that cannot be read is an error. Above 0: the next readable clip in
            the order of the epoch replaces it, and `broken` (max_broken,) holds the numbers of the
            entries that were skipped, padded with -1. A sample depends on the files alone, not on
            which other clips are broken; the caller counts them over the run
            (`scd.training.faults`).
    """

    def __init__(self, folder: Clips, frames: int, stride: int, seed: int, max_broken: int = 0):
        self.folder = folder
        self.frames = frames
        self.stride = stride
        self.seed = seed
        self.max_broken = max_broken
        self._epoch: tuple[int, np.ndarray] | None = None

    def number(self, sample: int) -> int:
        """Find the entry of the folder that a sample is cut from."""
        epoch, position = divmod(sample, len(self.folder))
        return int(self._order(epoch)[position])

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        epoch, position = divmod(sample, len(self.folder))
        order = self._order(epoch)
        broken: dict[int, str] = {}
        for following in range(min(self.max_broken + 1, len(self.folder))):
            number = int(order[(position + following) % len(self.folder)])
            try:
                clip = {"sample": torch.tensor(sample), **self._read(sample, number)}
            except ScdError as error:
                if not self.max_broken:
                    raise
                broken[number] = str(error)
                continue
            if self.max_broken:
                clip["broken"] = torch.tensor([*broken, *[-1] * (self.max_broken - len(broken))])
            return clip
        raise too_many_broken(broken.values(), self.max_broken)

    def problem(self, sample: int, number: int) -> str:
        """Read a skipped entry once more, and return the message of its error."""
        try:
            self._read(sample, number)
        except ScdError as error:
            return str(error)
        return f"{self.folder.list_path}: entry {number} could not be read for a while"

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, ORDER_STREAM, epoch])
            self._epoch = epoch, order.permutation(len(self.folder))
        return self._epoch[1]

    def _read(self, sample: int, number: int) -> dict[str, Tensor]:
        start, framing = (
            np.random.default_rng([self.seed, stream, sample])
            for stream in (START_STREAM, FRAMING_STREAM)
        )
        return self.folder.read_bytes(number, self.frames, self.stride, start, framing)


def too_many_broken(problems: Collection[str], limit: int) -> ScdError:
    """Make the error that ends a run with more broken clips than `data.max_broken_clips`."""
    return ScdError(
        f"{len(problems)} broken clips, but data.max_broken_clips is {limit}: {'; '.join(problems)}"
    )


class StepSampler(Sampler[list[int]]):
    """The sample numbers of one process from a given micro-step on.

    Micro-step m uses samples m·W·B … (m+1)·W·B − 1 for W processes of B clips. So W processes of B
    clips together see what one process of W·B clips sees.
    """

    def __init__(self, batch_size: int, rank: int, world_size: int, first: int, last: int):
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.micro_steps = range(first, last)

    def __len__(self) -> int:
        return len(self.micro_steps)

    def __iter__(self) -> Iterator[list[int]]:
        for micro_step in self.micro_steps:
            start = (micro_step * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


@contextmanager
def training_batches(
    step: int, clips: TrainingClips, options: TrainOptions, accelerator: Accelerator
) -> Iterator[Iterator[dict[str, Tensor]]]:
    """Load the batches of this process from a step to the end, `gradient_accumulation` per step.

    Raises:
        ScdError: a clip cannot be read, or shared memory is too small for the workers' batches.
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
        yield _explain_full_shared_memory(batches)
    finally:
        # Workers that ignore signals are stopped by their iterator alone. The traceback of an error
        # may keep it alive, and the process would wait for the workers as it exits.
        if options.workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _explain_full_shared_memory(
    batches: Iterator[dict[str, Tensor]],
) -> Iterator[dict[str, Tensor]]:
    """Pass batches on, and replace the error of a full /dev/shm by one clear line.

    Workers pass their batches through shared memory, of which Docker gives a container 64 MB. Torch
    says so in the traceback of a worker, or reports a bus error.
    """
    try:
        yield from batches
    except RuntimeError as error:
        if "shared memory" not in str(error) and "</torch_" not in str(error):
            raise
        size = shutil.disk_usage("/dev/shm").total / 1e6
        raise ScdError(
            f"/dev/shm has {size:.0f} MB, too few for the batches of the data workers: give the "
            f"container more (docker run --shm-size=8g), or set train.workers=0"
        ) from error
