"""What a run measures of itself between two log entries: time, waiting for data, memory."""

import resource
import time
from collections.abc import Iterator

import torch
from torch import Tensor


class Meter:
    """Adds up steps; time between them (saving, validation) does not count.

    Args:
        clips: of a step, over all processes.
    """

    def __init__(self, clips: int):
        self.clips = clips
        self._clear()

    def _clear(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self.waited = 0.0

    def next_batch(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def add_step(self, seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds

    def entry(self, device: torch.device) -> dict[str, float]:
        """Means since the last entry, of this process: seconds a step, clips a second (of all
        processes), the share of the time spent waiting for data; peak memory in GiB so far."""
        values = {
            "seconds": self.seconds / self.steps,
            "clips_per_second": self.clips * self.steps / self.seconds,
            "data_wait": self.waited / self.seconds,
            "memory_gib": _peak_bytes(device) / 2**30,
        }
        self._clear()
        return values


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
