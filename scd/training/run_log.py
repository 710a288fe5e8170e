"""Record a run: options, environment, log, loss curve, throughput and profiler traces."""

import json
import math
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from scd.errors import ScdError
from scd.options import OPTIONS_FILE, Options, options_to_dict, options_to_yaml
from scd.training.estimate import ClipCost
from scd.training.resume import flat_options
from scd.utils.environment import environment
from scd.utils.files import write_atomically, write_json


def write_run_files(
    output: Path, options: Options, accelerator: Accelerator, precision: str
) -> dict[str, Any]:
    """Write `options.yml` (resolved) and `environment.json`.

    Returns:
        What the log begins with: device, precision and number of processes.
    """
    found = environment()
    used = {
        "device": found["device"],
        "precision": precision,
        "processes": accelerator.num_processes,
    }
    text = options_to_yaml(options)
    write_atomically(output / OPTIONS_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
    write_json(output / "environment.json", {**found, **used})
    return used


def for_trackers(options: Options) -> dict[str, str | int | float | bool]:
    """Options as the trackers want them: dotted names and plain values."""
    flat = flat_options(options_to_dict(options))
    return {k: v if isinstance(v, int | float | bool) else str(v) for k, v in flat.items()}


class RunLog:
    """Entries with a `step`, one JSON object a line; numbers that are not finite become null.

    A continued run drops what an interrupted one had logged beyond the checkpoint.

    Args:
        path: `log.jsonl`, or another of its kind.
        step: of the checkpoint.
        enabled: on the main process.
    """

    def __init__(self, path: Path, step: int, enabled: bool):
        self.path = path
        self.enabled = enabled
        if enabled and self.path.exists():
            kept = [entry for entry in read_log(self.path) if entry["step"] <= step]
            text = "".join(json.dumps(entry) + "\n" for entry in kept)
            write_atomically(self.path, lambda aside: aside.write_text(text, encoding="utf-8"))

    def write(self, entry: dict[str, Any]) -> None:
        if self.enabled:
            known = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in entry.items()
            }
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(known) + "\n")
            except OSError as error:
                raise ScdError(f"{self.path}: cannot be written ({error})") from error

    def write_where_it_changed(self, entry: dict[str, Any]) -> None:
        """Write what a run computes on and with, unless the last such entry says the same."""
        before = read_log(self.path) if self.path.exists() else []
        said = [{**old, "step": entry["step"]} for old in before if "precision" in old]
        if said[-1:] != [entry]:
            self.write(entry)

    def has(self, key: str, step: int) -> bool:
        """Whether an entry of this step has this key."""
        if not self.path.exists():
            return False
        return any(e["step"] == step and key in e for e in read_log(self.path))

    def draw(self) -> None:
        """Write `loss.png` beside the log."""
        if self.enabled and self.path.exists():
            draw_loss_curve(self.path, self.path.with_name("loss.png"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a run's log; damaged lines, as a last one cut off by a kill, are left out."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append(entry)
    return entries


def draw_loss_curve(log: Path, picture: Path) -> None:
    """Loss over steps with its moving average, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = [entry for entry in read_log(log) if entry.get("loss") is not None]
    if not entries:
        return
    steps, losses = zip(*((entry["step"], entry["loss"]) for entry in entries), strict=True)
    half = max(len(losses) // 40, 1)  # of the window that is averaged over
    smooth = [float(np.mean(losses[max(i - half, 0) : i + half + 1])) for i in range(len(losses))]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    axis.plot(steps, smooth, color="tab:blue")
    axis.set(xlabel="step", ylabel="training loss", yscale="log")
    axis.grid(alpha=0.3, which="both")
    write_atomically(picture, lambda aside: figure.savefig(aside, dpi=110))
    plt.close(figure)


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


class StepTrace:
    """Records steps with torch's profiler and writes `traces/steps-<first>-<last>.json.gz`.

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

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.profiler is not None:
            self.profiler.stop()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Of the block, which takes this step."""
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
