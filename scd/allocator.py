"""Memory of the CPU, kept by the process once it has it."""

import ctypes
import platform

# Parameters of glibc's mallopt, from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MOST = 2**31 - 1  # bytes; mallopt takes an int


def keep_freed_memory() -> None:
    """Let malloc keep what is freed instead of giving it back to the system.

    By default glibc asks the system for every large tensor and gives it back when it is freed. The
    next step then pays for its pages once more, which takes up to a fifth of a training step and
    of I3D features. Does nothing under another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _MOST)
    libc.mallopt(_M_TRIM_THRESHOLD, _MOST)
