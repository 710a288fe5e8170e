"""Describe what a result was made with: package versions, git commit, device."""

import platform
import resource
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from scd.utils.precision import resolve_precision

PACKAGES = [
    "scd",
    "torch",
    "accelerate",
    "diffusers",
    "einops",
    "omegaconf",
    "decord",
    "decord2",
    "torchmetrics",
    "lpips",
    "numpy",
]


def environment() -> dict[str, Any]:
    """Collect package versions, git commit, device, and what precision `auto` means on it."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.is_available()
    return {
        "packages": versions,
        "python": platform.python_version(),
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "best_precision": resolve_precision("auto", torch.device("cuda" if cuda else "cpu")),
    }


def peak_resident_bytes() -> int:
    """Read the most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, KiB on Linux


def _processor() -> str:
    """Name the processor, the instruction set that torch uses, and the number of threads."""
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line for line in lines if line.startswith("model name")).split(": ", 1)[-1]
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"CPU, {name} ({instructions}), {torch.get_num_threads()} threads"


@cache
def git_commit() -> str | None:
    """Return the commit of this code, `-dirty` if files differ from it; None outside a checkout."""
    try:
        here = Path(__file__).parent
        run = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
