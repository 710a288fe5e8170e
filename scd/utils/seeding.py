"""Randomness as a pure function of what it is for.

Every draw comes from a generator seeded by (seed, stream, number), so nothing depends on batch
size, on the number of processes or on how often a run was interrupted.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """Make a generator on a device, seeded by a hash of the key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def normal_per_sample(
    shape: tuple[int, ...], samples: Iterable[int], device: torch.device, *key: int | str
) -> Tensor:
    """Draw standard normal numbers (B, *shape), row b from the generator of (key, sample b)."""
    return torch.stack(
        [
            torch.randn(shape, generator=generator(device, *key, int(sample)), device=device)
            for sample in samples
        ]
    )


def uniform_per_sample(
    shape: tuple[int, ...], samples: Iterable[int], device: torch.device, *key: int | str
) -> Tensor:
    """Draw uniform numbers in [0, 1) (B, *shape), row b as in `normal_per_sample`."""
    return torch.stack(
        [
            torch.rand(shape, generator=generator(device, *key, int(sample)), device=device)
            for sample in samples
        ]
    )
