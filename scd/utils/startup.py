"""Prepare a process: memory, threads, home folder, user name and locale."""

import ctypes
import getpass
import io
import os
import platform
import stat
import sys
import tempfile
from pathlib import Path

# Parameters of glibc's mallopt, from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MOST = 2**31 - 1  # bytes; mallopt takes an int

SAMPLE_SECONDS = 0.25
BUSY_CORES = 0.4  # used by others, in all: more than an idle desktop uses
# Variables by which users choose; with LOCAL_WORLD_SIZE, the launcher has divided the cores.
USER_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "LOCAL_WORLD_SIZE")


def prepare_process() -> None:
    """Configure memory and threads; call it before torch is imported."""
    keep_freed_memory()
    if "torch" not in sys.modules and not any(name in os.environ for name in USER_CHOICES):
        choose_wait_policy()


def keep_freed_memory() -> None:
    """Make malloc keep freed memory instead of returning it to the system.

    By default glibc maps every large tensor anew and unmaps it when it is freed. The next step then
    pays for its pages once more, which takes up to a fifth of a training step and of I3D features.
    Does nothing under another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _MOST)
    libc.mallopt(_M_TRIM_THRESHOLD, _MOST)


def choose_wait_policy() -> None:
    """Make OpenMP's threads sleep while they wait, if other programs use the cores.

    Idle threads of libgomp spin for milliseconds. On free cores that makes small operations fast
    (with sleeping threads, a training step of the Doom model takes 1.25 times as long). Beside a
    busy program, spinning threads burn the time that the thread they wait for would need, and the
    step takes 3.2 times as long instead of twice. OpenMP reads its settings once, when it starts.
    """
    try:
        busy, cores = busy_cores()
    except (OSError, RuntimeError, ImportError):  # in some sandboxes
        return
    if busy < BUSY_CORES:
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"  # child processes inherit it
    print(
        f"note: other programs keep {busy:.1f} of {cores} cores busy: threads sleep while they "
        f"wait (OMP_WAIT_POLICY=passive; set it to override this)",
        file=sys.stderr,
    )


def usable_cores() -> list[int]:
    """List the cores that this process may use."""
    count = os.cpu_count() or 1
    return sorted(getattr(os, "sched_getaffinity", lambda _: range(count))(0))


def busy_cores() -> tuple[float, int]:
    """Measure how many of this process's cores other programs use; return that and their number."""
    import psutil

    shares = psutil.cpu_percent(SAMPLE_SECONDS, percpu=True)
    mine = usable_cores()
    return sum(shares[core] / 100 for core in mine if core < len(shares)), len(mine)


def prepare_environment() -> None:
    """Make a process work in any locale and without a home; call it before torch is imported."""
    for stream in (sys.stdout, sys.stderr):
        # Characters that the locale's encoding lacks are written as \u2191.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _ensure_user_name()
    _ensure_home()


def _ensure_user_name() -> None:
    """Set USER where the user has no name: torch.compile, for one, names its cache after it."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the second since Python 3.13
        os.environ["USER"] = f"uid{os.getuid()}"


def _ensure_home() -> None:
    """Set HOME to a folder below the temporary one where there is none, as in some containers.

    It is the same folder every time, so that downloaded weights are found again.
    """
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)  # an empty one would mean the working directory
    home = os.path.expanduser("~")
    if os.path.isdir(home) and home != "~":
        return
    os.environ["HOME"] = str(_own_folder(Path(tempfile.gettempdir()) / f"scd-home-{os.getuid()}"))
    problem = "HOME is not set, and passwd has no home" if home == "~" else f"{home} is no folder"
    print(
        f"note: {problem}: caches go to {os.environ['HOME']}; set HOME to keep them elsewhere",
        file=sys.stderr,
    )


def _own_folder(path: Path) -> Path:
    """Make a folder that nobody else can write to, under another name if this one is taken."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix=f"{path.name}-"))
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return path
    return Path(tempfile.mkdtemp(prefix=f"{path.name}-"))
