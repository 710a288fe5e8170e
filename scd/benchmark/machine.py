"""What the machine can do, measured beside every figure, and the memory that a process took."""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scd.benchmark.cases import SIDE, StreamCase
from scd.models.cpu import Linear, PackedWeights


@dataclass(frozen=True)
class Machine:
    """Rates of one device at one type of number."""

    plain_flops: float  # a second, of a large product `a @ b`
    best_flops: float  # of that, or of the same product with packed weights
    bytes: float  # a second, read and written by a copy


def measure_machine(dtype: torch.dtype, device: torch.device) -> Machine:
    """Medians of five runs each."""
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
    return Machine(plain, max(plain, packed), copied)


def seconds(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Wall-clock seconds of each of several runs, after one that warms up."""
    out = []
    for number in range(repeats + 1):
        synchronise(device)
        started = time.perf_counter()
        run()
        synchronise(device)
        if number:
            out.append(time.perf_counter() - started)
    return out


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory of this process so far: on the device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


TOKENS = SIDE**2


@dataclass(frozen=True)
class Floor:
    """Of one frame, without embeddings, norms and modulations."""

    flops: int  # matrix products and attention
    bytes: int  # weights, once a step, and the cache, once a layer and pass

    def seconds(self, machine: Machine) -> float:
        """Whichever takes longer at the machine's rates."""
        return max(self.flops / machine.best_flops, self.bytes / machine.bytes)


def frame_floor(case: StreamCase) -> Floor:
    width = 64 * case.heads
    number = {"float32": 4, "bfloat16": 2}[case.dtype]  # bytes
    branches = 1 if case.guidance == "none" else 2
    products = 2 * 12 * width**2  # of one token in one layer
    weights = 12 * width**2 * number  # of one layer
    keys = TOKENS * case.context
    cache = 2 * keys * width * number  # of one layer
    over_past = TOKENS * products + 4 * TOKENS * (keys + TOKENS) * width
    if not case.encoder_layers:  # every step and one more pass, for the finished frame
        passes = case.decoder_layers * (branches * case.steps + 1)
        layers = case.decoder_layers * (case.steps + 1)
        return Floor(passes * over_past, layers * weights + passes * cache)
    both = 2 * TOKENS  # context and noisy tokens; of the last layer, the noisy ones after q, k, v
    layer = both * products + 4 * both * both * width
    last = TOKENS * products + TOKENS * 2 * 3 * width**2 + 4 * TOKENS * both * width
    step = (case.decoder_layers - 1) * layer + last
    return Floor(
        case.encoder_layers * over_past + branches * case.steps * step,
        case.encoder_layers * (weights + cache) + case.steps * case.decoder_layers * weights,
    )
