"""Prepare a process: its memory and threads, its home, user name and locale."""

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

LOOK_SECONDS = 0.25
BUSY_CORES = 0.4  # taken by others, in all: more than what an idle desktop does
# A user who sets one of these has chosen; LOCAL_WORLD_SIZE: the launcher has divided the cores.
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "LOCAL_WORLD_SIZE")


def prepare_process() -> None:
    """Set up memory and threads; call it before torch is imported."""
    keep_freed_memory()
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOSEN):
        choose_waiting()


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


def choose_waiting() -> None:
    """Let OpenMP's threads sleep while they wait, if other programs want the cores.

    Idle threads of libgomp spin for milliseconds. On free cores that is what makes small operations
    fast (asleep, a training step of the Doom model takes 1.25 times as long); beside a busy program
    they burn the time that the thread they wait for would need, and it takes 3.2 times as long
    instead of twice. What OpenMP reads at its start can't be changed later, so this looks once.
    """
    try:
        busy, cores = busy_cores()
    except (OSError, RuntimeError, ImportError):  # as in some sandboxes
        return
    if busy < BUSY_CORES:
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"  # also for the processes that this one starts
    print(
        f"note: other programs keep {busy:.1f} of {cores} cores busy: threads sleep while they "
        f"wait (OMP_WAIT_POLICY=passive; set it to choose otherwise)",
        file=sys.stderr,
    )


def busy_cores() -> tuple[float, int]:
    """Measure how many of this process's cores others use now, and count its cores."""
    import psutil

    shares = psutil.cpu_percent(LOOK_SECONDS, percpu=True)
    mine = getattr(os, "sched_getaffinity", lambda _: range(len(shares)))(0)
    return sum(shares[core] / 100 for core in mine if core < len(shares)), len(mine)


def prepare_environment() -> None:
    """Make a process work in any locale and without a home; call it before torch is imported."""
    for stream in (sys.stdout, sys.stderr):
        # What the locale's encoding lacks is written as \u2191, which loses nothing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _name_user()
    _find_home()


def _name_user() -> None:
    """Libraries ask for the user's name, as torch.compile for its cache's."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the second since Python 3.13
        os.environ["USER"] = f"uid{os.getuid()}"


def _find_home() -> None:
    """Give caches a place: in containers HOME may be unset, the user unknown, the folder missing.

    A folder below the temporary one stands in, the same every time, so that fetched weights are
    found again.
    """
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)  # an empty one would mean the working directory
    home = os.path.expanduser("~")
    if os.path.isdir(home) and home != "~":
        return
    os.environ["HOME"] = str(_own_folder(Path(tempfile.gettempdir()) / f"scd-home-{os.getuid()}"))
    told = "HOME is not set, and passwd has no home" if home == "~" else f"{home} is no folder"
    print(
        f"note: {told}: caches go to {os.environ['HOME']}; set HOME to keep them elsewhere",
        file=sys.stderr,
    )


def _own_folder(path: Path) -> Path:
    """Make a folder that nobody else can write to; if somebody has taken its name, another one."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix=f"{path.name}-"))
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return path
    return Path(tempfile.mkdtemp(prefix=f"{path.name}-"))
