"""What a result was made with: package versions, git commit, device."""

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = [
    "scd",
    "torch",
    "accelerate",
    "diffusers",
    "einops",
    "omegaconf",
    "decord",
    "torchmetrics",
    "lpips",
    "numpy",
]


def environment() -> dict[str, Any]:
    """Package versions, git commit and device."""
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
        "device": torch.cuda.get_device_name()
        if cuda
        else f"CPU, {torch.get_num_threads()} threads",
    }


@cache
def git_commit() -> str | None:
    """The commit of this code, `-dirty` where files differ from it; None outside a git checkout."""
    try:
        here = Path(__file__).parent
        run = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
