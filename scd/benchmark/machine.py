"""The machine's rates of arithmetic and copying, the floor they imply for a frame, and memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scd.benchmark.cases import SIDE, RolloutCase
from scd.models.cpu import Linear, PackedWeights
from scd.utils.environment import peak_resident_bytes


@dataclass(frozen=True)
class Machine:
    """Measured rates of one device for one dtype."""

    plain_flops: float  # per second, of a large matrix product `a @ b`
    best_flops: float  # per second, of that or of the same product with packed weights
    bytes: float  # per second, read and written by a copy


def measure_machine(dtype: torch.dtype, device: torch.device) -> Machine:
    """Measure the rates, each as the median of five runs."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    layer = Linear(size, size, bias=False, device=device, dtype=dtype)
    with torch.no_grad(), PackedWeights(layer).in_use():
        plain, packed = (
            2 * size**3 / statistics.median(seconds(run, 5, device))
            for run in (lambda: a @ b, lambda: layer(a))
        )
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * len(source) / statistics.median(seconds(lambda: target.copy_(source), 5, device))
    if device.type == "cuda":  # the peak is to be that of what is measured afterwards
        del a, b, layer, source, target
        torch.cuda.reset_peak_memory_stats(device)
    return Machine(plain, max(plain, packed), copied)


def seconds(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Time several runs after one as warmup; returns wall-clock seconds of each."""
    out = []
    for number in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        if number:
            out.append(time.perf_counter() - started)
    return out


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Read the peak memory of this process: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


TOKENS = SIDE**2


@dataclass(frozen=True)
class Floor:
    """The least work of one frame, without embeddings, norms and modulations."""

    flops: int  # matrix products and attention
    bytes: int  # of the weights, once per step, and of the cache, once per layer and pass

    def seconds(self, machine: Machine) -> float:
        """Compute the time at the machine's rates: of the operations or the bytes, if longer."""
        return max(self.flops / machine.best_flops, self.bytes / machine.bytes)


def frame_floor(case: RolloutCase) -> Floor:
    """Count the operations and bytes of one frame of a case."""
    width = 64 * case.heads
    item = {"float32": 4, "bfloat16": 2}[case.dtype]  # bytes per number
    branches = 1 if case.guidance == "none" else 2
    products = 2 * 12 * width**2  # per token and layer
    weights = 12 * width**2 * item  # per layer
    keys = TOKENS * case.context
    cache = 2 * keys * width * item  # per layer
    over_past = TOKENS * products + 4 * TOKENS * (keys + TOKENS) * width
    if not case.encoder_layers:  # one pass per step, and one over the finished frame
        passes = case.decoder_layers * (branches * case.steps + 1)
        layers = case.decoder_layers * (case.steps + 1)
        return Floor(passes * over_past, layers * weights + passes * cache)
    # The decoder reads context and noisy tokens; its last layer needs only q, k, v of the former.
    both = 2 * TOKENS
    layer = both * products + 4 * both * both * width
    last = TOKENS * products + TOKENS * 2 * 3 * width**2 + 4 * TOKENS * both * width
    step = (case.decoder_layers - 1) * layer + last
    return Floor(
        case.encoder_layers * over_past + branches * case.steps * step,
        case.encoder_layers * (weights + cache) + case.steps * case.decoder_layers * weights,
    )
