"""What a run measures of itself between two log entries: time, work, waiting for data, memory."""

import re
import resource
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from scd.training.estimate import ClipCost

# TFLOP/s of dense matrix products in bf16, and of float32 ones as TF32, by the name that CUDA
# gives the device: NVIDIA's data sheets, halved where they count sparsity. Laptop cards, slices of
# a card (MIG) and what is not here have other peaks.
PEAKS = {
    r"A100(-SXM4-\d+GB|-PCIE-\d+GB| 80GB PCIe)": (312, 156),
    r"H100 80GB HBM3": (989, 495),
    r"H100 PCIe": (756, 378),
    r"H100 NVL": (835, 418),
    r"H200": (989, 495),
    r"B200": (2250, 1125),
    r"L40S": (362, 183),
    r"GeForce RTX 4090": (165, 83),
}


class Meter:
    """Adds up steps; time between them (saving, validation) does not count.

    Args:
        clips: of a step, over all processes.
        processes: how many share them.
        cost: of a clip; None: unknown.
        peak: FLOP/s of a process's device; None: unknown.
    """

    def __init__(self, clips: int, processes: int, cost: ClipCost | None, peak: float | None):
        self.clips = clips
        self.processes = processes
        self.cost = cost
        self.peak = peak
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
        """Means since the last entry, and peaks so far, of this process.

        `seconds` a step; `clips_per_second` and `tokens_per_second` of all processes, each token of
        a clip counted once; `tflops` (TFLOP/s) of this process and `mfu`, its share of the device's
        peak; `data_wait`, the share of the time spent waiting for data; memory in GiB. What is
        unknown is left out.
        """
        clips_per_second = self.clips * self.steps / self.seconds
        values = {
            "seconds": self.seconds / self.steps,
            "clips_per_second": clips_per_second,
            "data_wait": self.waited / self.seconds,
            **_peak_memory(device),
        }
        if self.cost is not None:
            flops = self.cost.flops * clips_per_second / self.processes
            values["tokens_per_second"] = self.cost.tokens * clips_per_second
            values["tflops"] = flops / 1e12
            if self.peak is not None:
                values["mfu"] = flops / self.peak
        self._clear()
        return values


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a device is sold with, of `bf16`, or of `fp32` as TF32; None: not in `PEAKS`.

    TF32 counts for float32 even where torch does not use it: the device could.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for pattern, (bf16, tf32) in PEAKS.items():
        if re.fullmatch(f"NVIDIA {pattern}", name):
            return 1e12 * (bf16 if precision == "bf16" else tf32)
    return None


def _peak_memory(device: torch.device) -> dict[str, float]:
    """In GiB; of a GPU what tensors took, and what torch had reserved for them."""
    if device.type == "cuda":
        return {
            "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
    # Linux counts in KiB.
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
