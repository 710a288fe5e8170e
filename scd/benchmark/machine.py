"""What the machine can do, measured beside every figure, and the memory that a process took."""

import resource
import statistics
import time
from collections.abc import Callable

import torch


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


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of a large matrix product: the median of five."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / statistics.median(seconds(lambda: a @ b, 5, device))


def peak_bytes(device: torch.device) -> int:
    """The most memory of this process so far: on the device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
