"""Measure how fast training steps run: throughput, MFU, peak memory, traces of torch's profiler."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from scd.training.step_cost import ClipCost
from scd.utils.environment import peak_resident_bytes
from scd.utils.files import write_atomically

# TFLOP/s of dense matrix products in bf16, and of float32 ones as TF32, by CUDA's name of the
# device: from NVIDIA's data sheets, halved where they count sparsity. Laptop cards and slices of a
# card (MIG) have other peaks.
PEAK_TFLOPS = {
    r"A100(-SXM4-\d+GB|-PCIE-\d+GB| 80GB PCIe)": (312, 156),
    r"H100 80GB HBM3": (989, 495),
    r"H100 PCIe": (756, 378),
    r"H100 NVL": (835, 418),
    r"H200": (989, 495),
    r"B200": (2250, 1125),
    r"L40S": (362, 183),
    r"GeForce RTX 4090": (165, 83),
}


class ThroughputMeter:
    """Throughput of the steps since the last report; the time between steps does not count.

    Args:
        clips: per step, over all processes.
        processes: the number of processes that share them.
        cost: of one clip; None: unknown.
        peak: peak FLOP/s of one process's device; None: unknown.
    """

    def __init__(self, clips: int, processes: int, cost: ClipCost | None, peak: float | None):
        self.clips = clips
        self.processes = processes
        self.cost = cost
        self.peak = peak
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self.waited = 0.0

    def time_waiting(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Pass batches on, and measure how long each is waited for."""
        began = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def add_step(self, seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds

    def report(self, device: torch.device) -> dict[str, float]:
        """Return means since the last report, and this process's peak memory so far.

        `seconds` per step; `clips_per_second` and `tokens_per_second` of all processes, each token
        of a clip counted once; `tflops` (TFLOP/s) of this process and `mfu`, its share of the
        device's peak; `data_wait`, the share of the time spent waiting for data; memory in GiB.
        Unknown values are left out.
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
        self._reset()
        return values


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Look up a device's peak FLOP/s in `bf16`, or in `fp32` as TF32; None: not in `PEAK_TFLOPS`.

    TF32 counts for float32 even where torch does not use it: the device could.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for pattern, (bf16, tf32) in PEAK_TFLOPS.items():
        if re.fullmatch(f"NVIDIA {pattern}", name):
            return 1e12 * (bf16 if precision == "bf16" else tf32)
    return None


def _peak_memory(device: torch.device) -> dict[str, float]:
    """Read peak memory in GiB; of a GPU, allocated by tensors and reserved by torch for them.

    A GPU's `alloc_retries` count how often torch freed its cache to find memory: each one stalls.
    """
    if device.type == "cuda":
        return {
            "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
            "alloc_retries": torch.cuda.memory_stats(device).get("num_alloc_retries", 0),
        }
    return {"memory_gib": peak_resident_bytes() / 2**30}


class ProfilerTrace:
    """A trace of chosen steps by torch's profiler: `traces/steps-<first>-<last>.json.gz`.

    A run that begins or ends among these steps writes none.

    Args:
        output: the run's folder.
        steps: the first and the last step; empty: none.
        enabled: on the main process.
    """

    def __init__(self, output: Path, steps: list[int], enabled: bool):
        self.first, self.last = steps or (0, 0)
        self.path = output / "traces" / f"steps-{self.first}-{self.last}.json.gz"
        self.enabled = enabled
        self.profiler: profile | None = None

    def close(self) -> None:
        """Drop a trace that is not finished."""
        if self.profiler is not None:
            self.profiler.stop()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record the block as this step, if it is among the chosen ones."""
        if self.enabled and number == self.first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(activities=activities, record_shapes=True)
            self.profiler.start()
        if self.profiler is None:
            yield
            return
        with record_function(f"training step {number}"):
            yield
        if number == self.last:
            recorded, self.profiler = self.profiler, None
            recorded.stop()
            write_atomically(self.path, lambda aside: recorded.export_chrome_trace(str(aside)))
            print(f"{self.path}: open it at https://ui.perfetto.dev")
